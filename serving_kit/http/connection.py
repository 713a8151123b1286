"""uvicorn's connection, with bounded request heads, and without protocol upgrades.

uvicorn bounds the time between two requests, and `bodies.py` and `client_watch.py` the size and time of
bodies. Between them a client could hold a connection without end by never finishing its head, or fill the
memory with a head that has no end.

A request may ask for another protocol (`Upgrade: h2c`: `curl --http2`, Java's default client). A server
may ignore that and answer in HTTP/1.1. The parser cannot: it takes what follows such a head for the other
protocol, and uvicorn drops it, so that the request loses its body. So such a head is parsed a second time
without its `Upgrade` header.

Not here: what a request is (`middleware.py`).
"""

from __future__ import annotations

import asyncio
import logging
import threading

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving_kit.log import Limiter

_HEAD_TIMEOUT_S = 15.0
_MAX_HEAD_BYTES = 2**16  # ten times what proxies and browsers send
# After a rejected head, what still comes is discarded within these bounds: unread bytes make the system
# reset the connection, and the client may then lose the response.
_LINGER_S, _LINGER_BYTES = 2.0, 2**24
_limiter = Limiter()  # any client can send malformed requests, at any rate
_limiter_lock = threading.Lock()


def _may_warn(now: float) -> bool:
    """Whether the log may have one more line about a malformed request. Any thread."""
    with _limiter_lock:
        _limiter.ended(now)
        return _limiter.admits(logging.WARNING, "invalid request", now)


class Connection(HttpToolsProtocol):
    """One client's connection. Loop thread only."""

    _in_head = False
    _head_bytes = 0  # of the incomplete head, without those that were read together with its beginning
    _heads = 0  # heads that have begun, on this connection
    _head_again = b""
    _rejected = False
    _discarded_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Start the timeout of the first head."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._on_head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timeout."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse; bound a head that is still incomplete afterwards."""
        if self._rejected:
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
        if self._head_bytes > _MAX_HEAD_BYTES:
            self._reject(b"431 Request Header Fields Too Large")
        elif self._timer is None:
            self._timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._on_head_timeout)

    def on_message_begin(self) -> None:
        """The parser has found the beginning of a request."""
        self._in_head, self._head_bytes = True, 0
        self._heads += 1
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The parser has reached the end of the head."""
        self._in_head = False
        if self.parser.should_upgrade():
            self._head_again = self._without_upgrade()
        else:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The parser has reached the end of the request."""
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
                    if self.parser.get_method() == b"CONNECT":  # an upgrade by itself, for proxies only
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

    def _on_head_timeout(self) -> None:
        self._timer = None
        if not self._is_idle():  # the client waits for a response meanwhile
            self._timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._on_head_timeout)
        else:
            self._reject(b"408 Request Timeout")

    def _is_idle(self) -> bool:
        """Whether no response is under way. uvicorn sets `cycle` to None before the first request."""
        return bool(getattr(self.cycle, "response_complete", True))

    def _reject(self, status: bytes) -> None:
        if self._rejected or self.transport.is_closing():
            return
        self._rejected = True
        self.transport.write(b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % status)
        self._stop_timer()
        if self._is_idle() and self.transport.can_write_eof():
            self.transport.write_eof()
            self._timer = self.loop.call_later(_LINGER_S, self.transport.close)
        else:
            self.transport.close()
