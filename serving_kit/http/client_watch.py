"""Whether the client is still connected: ends a request whose body does not come, or whose client has left.

Not here: the request (`predict.py`), reading its body (`bodies.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from starlette.types import Receive

from serving_kit.errors import ClientGone, ServingError, SlowRequest, Stopping

_FIRST_LOOK_S = 0.02  # a client that leaves sooner may go unnoticed, and its request runs


class ClientWatch:
    """Cancels the task that enters it when the body is late or the client disconnects. Loop thread only.

    A watcher costs as much as an instant model, and most requests end within a few milliseconds. So each
    request starts with one timer; only those that are still there when it fires get a deadline for their
    body, or a task that waits for the disconnect.

    Args:
        receive: Of the request. Nothing else may receive after `body_arrived()`.
        timeout_s: Seconds that the body may take.
        limit_text: Names that limit, for the error's text.

    Raises:
        SlowRequest: the body did not arrive in time.
        ClientGone: the client disconnected.
        Stopping: the server stops, which has cancelled the task.
    """

    __slots__ = (
        "_body_arrived",
        "_deadline",
        "_error",
        "_is_slow",
        "_limit_text",
        "_loop",
        "_receive",
        "_task",
        "_timer",
    )

    def __init__(self, receive: Receive, timeout_s: float, limit_text: Callable[[], str]) -> None:
        self._receive = receive
        self._limit_text = limit_text
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout_s
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | asyncio.Task[None] = self._loop.call_later(
            min(_FIRST_LOOK_S, timeout_s), self._look
        )
        self._is_slow = self._body_arrived = False
        self._error: ServingError | None = None

    def __enter__(self) -> Self:
        return self

    def body_arrived(self) -> None:
        """The whole body has been read: the next message is the disconnect."""
        self._body_arrived = True
        if self._is_slow:
            self._timer.cancel()
            self._look()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._error is None or self._task is None:
            if isinstance(error, asyncio.CancelledError):  # a server that stops cancels what is unfinished
                raise Stopping from None
            return
        cancelled_again = self._task.uncancel()  # by the server, which stops
        if not cancelled_again and isinstance(error, asyncio.CancelledError):
            raise self._error from None

    def _look(self) -> None:
        self._is_slow = True
        if self._body_arrived:
            self._timer = self._loop.create_task(self._wait_for_disconnect())
        else:
            error = SlowRequest(f"the body did not arrive within {self._limit_text()}")
            self._timer = self._loop.call_at(self._deadline, self._end, error)

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._end(ClientGone("the client left before its answer was ready"))

    def _end(self, error: ServingError) -> None:
        assert self._task is not None
        self._error = error
        self._task.cancel()
