"""The loop thread's end of one item: its events, for a request that waits for the end or for a stream.

Not here: what the events are (`events.py`), when they come (`engine.py`, `batching.py`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from serving_kit.events import Chunk, End, Event


class Job:
    """One input on its way to an answer. Loop thread only.

    Attributes:
        ended: Resolves to the last event. Errors are values: a future that is not read logs nothing.
    """

    __slots__ = ("_chunks", "_news", "ended")

    def __init__(self, ended: asyncio.Future[End]) -> None:
        self.ended = ended
        self._chunks: deque[object] | None = None  # none yet
        self._news: asyncio.Event | None = None

    def emit(self, event: Event) -> None:
        """Pass one event on. What comes after the end is ignored."""
        if self.ended.done():
            return
        # Set first: a reader that wakes too early waits on, one that is never woken hangs.
        if self._news is not None:
            self._news.set()
        if isinstance(event, Chunk):
            if self._chunks is None:
                self._chunks = deque()
            self._chunks.append(event.value)
        else:
            self.ended.set_result(event)

    async def events(self) -> AsyncIterator[Event]:
        """Every event, in order; for one reader. Nothing comes after the end."""
        self._news = asyncio.Event()
        while True:
            self._news.clear()
            while self._chunks:
                yield Chunk(self._chunks.popleft())
            if self.ended.done():
                yield self.ended.result()
                return
            await self._news.wait()
