"""uvicorn's connection, with bounded request heads, and with no protocol upgrades.

uvicorn bounds the time between two requests, and `app.py` the time and size of bodies. Between them a
client could hold a connection for ever by never finishing its head, or fill the memory with one that
has no end.

A request may ask for another protocol (`Upgrade: h2c`: `curl --http2`, Java's default client). A server
may ignore that and answer in HTTP/1.1. The parser cannot: it takes what follows such a head for the other
protocol, and uvicorn drops it, so that the request loses its body. So such a head is parsed a second time
without its `Upgrade` header.

Not here: what a request is (`app.py`).
"""

from __future__ import annotations

import asyncio
import logging
import threading

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving_kit.log import Limiter

_HEAD_S = 15.0
_MOST_HEAD_BYTES = 2**16  # ten times what proxies and browsers send
# After a refused head, what still comes is discarded within these bounds: unread bytes make the system
# reset the connection, and the client may then lose the refusal.
_LINGER_S, _LINGER_BYTES = 2.0, 2**24
_limiter = Limiter()  # any client can send what is no HTTP, as often as it likes
_limiter_lock = threading.Lock()


def _may_warn(now: float) -> bool:
    """Whether the log may have one more line about a request that is no HTTP. Any thread."""
    with _limiter_lock:
        _limiter.ended(now)
        return _limiter.admits(logging.WARNING, "invalid request", now)


class Connection(HttpToolsProtocol):
    """One client's connection. Loop thread only."""

    _in_head = False
    _head_bytes = 0  # of the open head, without those that were read together with its beginning
    _heads = 0  # heads that have begun, on this connection
    _head_again = b""
    _refused = False
    _discarded_bytes = 0
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
        if self._refused:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > _LINGER_BYTES:
                self.transport.close()
            return
        heads = self._heads
        self._feed(data)
        if not self._in_head:
            self._stop_timer()
            return
        if self._heads == heads:  # else some of these bytes belong to earlier requests
            self._head_bytes += len(data)
        if self._head_bytes > _MOST_HEAD_BYTES:
            self._end(b"431 Request Header Fields Too Large")
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEAD_S, self._too_slow)

    def on_message_begin(self) -> None:
        """The parser sees a request begin."""
        self._in_head, self._head_bytes = True, 0
        self._heads += 1
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The parser has seen the whole head."""
        self._in_head = False
        if self.parser.should_upgrade():
            self._head_again = self._without_upgrade()
        else:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The parser has seen the whole request."""
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        """As uvicorn's `data_received`, which drops what follows a head that asks for an upgrade."""
        self._unset_keepalive_if_required()
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    (end_of_head,) = upgrade.args
                    if self.parser.get_method() == b"CONNECT":  # an upgrade by its method: this is no proxy
                        raise httptools.HttpParserError from None
                    data = self._head_again + data[end_of_head:]
                    self.parser = httptools.HttpRequestParser(self)  # with `close` the old one reads no more
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        except httptools.HttpParserError:
            self._in_head = False
            if _may_warn(self.loop.time()):
                self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _without_upgrade(self) -> bytes:
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        headers = [b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, b"".join(headers))

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
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self.transport.write(b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % status)
        self._stop_timer()
        if getattr(self.cycle, "response_complete", True) and self.transport.can_write_eof():
            self.transport.write_eof()
            self._timer = self.loop.call_later(_LINGER_S, self.transport.close)
        else:
            self.transport.close()
