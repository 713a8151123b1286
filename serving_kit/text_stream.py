"""A stream of generated text in a cell: `for piece in server.stream("...")`, or `async for`.

    cell ── next piece? ──▶ loop thread: Service.stream ── piece ──▶ cell

The request begins with the first piece that is asked for. Each piece is fetched when the cell wants it; what
the model has generated meanwhile waits on the loop thread.

Not here: the request (`service.py`), streams over HTTP (`http/predict.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from serving_kit.circular_waits import refuse_circle, waiting_for
from serving_kit.errors import MalformedRequest
from serving_kit.events import Chunk
from serving_kit.inline_server import InlineServer, ServerGone
from serving_kit.service import Service
from serving_kit.values import as_python

_END = object()


class TextStream:
    """Pieces of one generated text, as strings. One thread iterates over it, once.

    Leaving it early, by `break` and `close()` or as a context manager, ends the request.

    Args:
        service: What answers.
        inline: The thread on which it runs.
        explained: Adds what the owner may know to an error.
        value: A text, or the messages of a chat.
        parameters: As for the pipeline.
    """

    def __init__(
        self,
        service: Service,
        inline: InlineServer,
        explained: Callable[[], AbstractContextManager[None]],
        value: object,
        parameters: Mapping[str, object],
    ) -> None:
        self._service, self._inline, self._explained = service, inline, explained
        self._pieces = _pieces(service, value, {name: as_python(each) for name, each in parameters.items()})

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        """The next piece, as soon as there is one. Raises what `server(...)` raises, also after some."""
        with self._explained(), waiting_for(self._service):
            piece = self._inline.run(_next(self._pieces))
        if piece is _END:
            raise StopIteration
        return str(piece)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        """The same for `async for`: the cell's event loop goes on meanwhile."""
        refuse_circle(self._service, threading.current_thread())
        with self._explained():
            piece = await asyncio.wrap_future(self._inline.submit(_next(self._pieces)))
        if piece is _END:
            raise StopAsyncIteration
        return str(piece)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the request, if it has not ended. Any thread; does not wait."""
        with contextlib.suppress(ServerGone):
            self._inline.submit(self._pieces.aclose())


async def _pieces(
    service: Service, value: object, parameters: Mapping[str, object]
) -> AsyncGenerator[str, None]:
    """The request. Loop thread."""
    with service.observe() as ticket:
        if service.task != "text-generation":
            raise MalformedRequest(f"{service.task} has no streams: server(...) gives the answer")
        events = service.stream(value, parameters, ticket, service.settings.stream_timeout_s)
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, Chunk):
                    piece: Any = event.value
                    yield piece.text


async def _next(pieces: AsyncGenerator[str, None]) -> object:
    return await anext(pieces, _END)
