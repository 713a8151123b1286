"""uvicorn's connection, with an end to its patience for heads.

uvicorn bounds the time between two requests, and `app.py` the time and size of bodies. Between them a
client could hold a connection for ever by never finishing its head, or fill the memory with one that
has no end.

Not here: what a request is (`app.py`).
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_HEAD_S = 15.0
_MOST_HEAD_BYTES = 2**16  # ten times what proxies and browsers send


class Connection(HttpToolsProtocol):
    """One client's connection. Loop thread only."""

    _in_head = False
    _head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Give it some seconds for its first request."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(_HEAD_S, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; a head that is still open afterwards is measured."""
        super().data_received(data)
        if not self._in_head:
            self._stop_timer()
            return
        self._head_bytes += len(data)
        if self._head_bytes > _MOST_HEAD_BYTES:
            self._end(b"431 Request Header Fields Too Large")
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEAD_S, self._too_slow)

    def on_message_begin(self) -> None:
        """The parser sees a request begin."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The parser has seen the whole head."""
        self._in_head = False
        super().on_headers_complete()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not getattr(self.cycle, "response_complete", True):  # it waits for an answer meanwhile
            self._timer = self.loop.call_later(_HEAD_S, self._too_slow)
        else:
            self._end(b"408 Request Timeout")

    def _end(self, status: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % status)
            self.transport.close()
