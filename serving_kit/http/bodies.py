"""Reading the body of a request within bounds, and answering one whose body is not read.

Not here: what a body means (`dialects/`), the time that it may take (`client_watch.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving_kit.errors import ClientGone, MalformedRequest, RequestTooLarge
from serving_kit.http.access import Headers

_BODY_READ = "serving_kit.body_read"  # in the scope of a request whose body has been read to its end
# A body that is not read is discarded within these bounds after the response (nginx: lingering_time and
# lingering_timeout, 30 and 5 s).
_LINGER_BYTES = 2**27
_LINGER_S, _LINGER_IDLE_S = 30.0, 5.0
_LINGER_POLL_S = 0.25  # how soon the lingering ends when the server stops
_BODY_LOST = (
    "the web server in front of this app has lost the body, because the request asks for another protocol "
    "(Upgrade); start uvicorn with --http h11, or let the client ask for HTTP/1.1 only"
)


async def read_body(
    scope: Scope,
    headers: Headers,
    receive: Receive,
    limit: int,
    *,
    hold: Callable[[int], None] | None = None,
    setting: str = "",
) -> bytes:
    """The whole body.

    Args:
        scope: Of the request; notes in it that the body has been read.
        headers: Of the request.
        receive: Of the request.
        limit: Its bytes at most, whatever the headers say.
        hold: Called with the size of each chunk.
        setting: The name of the limit, for the error's text.

    Raises:
        ClientGone: the client left while sending.
        MalformedRequest: a compressed body, or one that uvicorn has lost.
        RequestTooLarge: more than `limit` bytes.
    """
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise MalformedRequest("compressed bodies are not accepted; send the body as it is")
    name = f" ({setting})" if setting else ""
    announced = headers.get(b"content-length", b"")[:20]
    if announced.isdigit() and int(announced) > limit:
        raise RequestTooLarge(f"the body has {announced.decode()} bytes; the most is {limit}{name}")
    chunks: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left while sending")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise RequestTooLarge(f"the body is larger than {limit} bytes{name}")
        if hold is not None:
            hold(len(chunk))
        chunks.append(chunk)
        more = message.get("more_body", False)
    scope[_BODY_READ] = True
    if not size and b"upgrade" in headers and has_body(headers):
        raise MalformedRequest(_BODY_LOST)
    return b"".join(chunks)


def has_body(headers: Headers) -> bool:
    """Whether the head announces a body."""
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


def is_unread(scope: Scope, headers: Headers) -> bool:
    """Whether the request has a body that was not read to its end."""
    return _BODY_READ not in scope and has_body(headers)


async def answer_unread(
    response: Response, scope: Scope, receive: Receive, send: Send, stopping: Callable[[], bool]
) -> None:
    """Answer a request whose body has not been read to its end, and discard the rest within bounds.

    Most clients look for the response only when they have sent everything. If the connection were closed
    at once, the system would reset it because of the unread bytes, and the response would be lost.
    So the response is complete for the client, and the request ends only when the client has finished.
    """
    headers = response.raw_headers
    if scope["http_version"] in ("1.0", "1.1"):
        headers = [*headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    await _discard(receive, stopping)
    await send({"type": "http.response.body", "body": b""})


async def _discard(receive: Receive, stopping: Callable[[], bool]) -> None:
    """Read until the body ends, the client leaves, a bound is reached or the server stops."""
    loop = asyncio.get_running_loop()
    last = now = loop.time()
    end, size, more = now + _LINGER_S, 0, True
    while more and size < _LINGER_BYTES and now < min(end, last + _LINGER_IDLE_S) and not stopping():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_POLL_S):
                message = await receive()
                last = loop.time()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)  # which a disconnect does not have
        now = loop.time()
