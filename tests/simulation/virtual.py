"""Virtual time, and a worker that performs the engine's actions in it.

Not here: the model, the clients and what disturbs them (`simulator.py`), what is checked (`watch.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import selectors
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serving_kit.actions import Action, Exit, Sleep
from serving_kit.errors import ServingError
from serving_kit.worker import Handover


class Broken(AssertionError):
    """An invariant does not hold."""


# -- virtual time ----------------------------------------------------------------------------------


class _Selector(selectors.SelectSelector):
    """Advances the loop's time instead of sleeping."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Broken("everything waits, and nothing will wake it")
        self.loop.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when all its tasks wait."""

    def __init__(self) -> None:
        selector = _Selector()
        selector.loop = self
        self.now = 1000.0
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def _write_to_self(self) -> None:
        """There is no other thread to wake it from."""


@dataclass
class Clock:
    """The loop's time, and how far a model call that runs now has got beyond it."""

    loop: VirtualLoop
    ahead_s: float = 0.0

    def __call__(self) -> float:
        return self.loop.now + self.ahead_s


class _Wake(contextlib.AbstractContextManager[None]):
    """Stands in for the handover's condition: one thread, so nothing to lock."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self.notify = notify

    def __exit__(self, *exc: object) -> None:
        return None


class SimulatedWorker:
    """Performs actions in virtual time: the result is there once the model call would have ended.

    Sometimes a moment passes between the decision and the call, or between the call and its completion, as
    on a busy machine: clients leave, settings change, the worker dies or the service stops in between.

    Args:
        loop: With virtual time.
        clock: That the model puts forward.
        dice: For the moments.
        handover: What it drives.
        ended: As of `ModelThread`.
        forget: Called with an action whose result is lost because the worker has died.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        clock: Clock,
        dice: random.Random,
        handover: Handover,
        ended: Callable[..., None],
        forget: Callable[[Action, object], None],
    ) -> None:
        self.alive = False
        self.cause: BaseException | None = None
        self.busy = False  # from the decision for an action to its completion
        self._loop, self._clock, self._dice = loop, clock, dice
        self.cause: BaseException | None = None
        self._handover, self._ended, self._forget = handover, ended, forget
        self._timer: asyncio.TimerHandle | None = None
        self._under_way: tuple[Action, object] | None = None
        handover.lock = _Wake(self._notified)  # type: ignore[assignment]

    def start(self) -> None:
        self.alive = True
        self._notified()

    def join(self, timeout_s: float) -> None:
        """It has nothing left to do."""

    def die(self) -> None:
        """As if the kit's own code had raised on it."""
        if self.alive:
            if self._under_way is not None:
                self._forget(*self._under_way)
            self._end(RuntimeError("killed"))

    def _notified(self) -> None:
        if self.alive and not self.busy:
            self._loop.call_soon(self._look)

    def _end(self, cause: BaseException | None) -> None:
        self.alive = False
        if self._timer is not None:
            self._timer.cancel()
        self.cause = cause
        self._ended(self)

    def _look(self) -> None:
        if not self.alive or self.busy:
            return
        if self._timer is not None:
            self._timer.cancel()
        action = self._handover.look()
        if isinstance(action, Exit):
            self._end(None)
        elif isinstance(action, Sleep):
            if action.until is not None:
                self._timer = self._loop.call_at(max(action.until, self._loop.now + 1e-6), self._look)
        else:
            self.busy = True
            self._under_way = (action, None)
            if moment := self._moment():
                self._loop.call_later(moment, self._perform, action)
            else:
                self._perform(action)

    def _perform(self, action: Action) -> None:
        if not self.alive:
            return
        try:
            result = self._handover.perform(action)
        except ServingError as error:  # the model was released
            self.busy = False
            self._end(error)
            return
        took_s, self._clock.ahead_s = self._clock.ahead_s, 0.0
        self._under_way = (action, result)
        self._loop.call_later(took_s + self._moment(), self._complete, action, result)

    def _complete(self, action: Action, result: object) -> None:
        self.busy, self._under_way = False, None
        if self.alive:
            self._handover.complete(action, result)
            self._look()

    def _moment(self) -> float:
        return 0.0 if self._dice.random() < 0.8 else self._dice.choice([0.0, 1e-4, 0.01, 0.1])
