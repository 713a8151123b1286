"""When not to ask the model any more: the circuit breaker.

    CLOSED ── 5 failures in a row ──▶ OPEN ── its pause is over ──▶ HALF_OPEN ── an answer ──▶ CLOSED
       │                               ▲                               │
       └── the device is lost ──▶ LATCHED     └──── a failure, pause x 2 ────┘

A failure is a whole batch without one answer that the inputs cannot explain, or a crash of the model
thread. An overload never is one, and neither is a bad input. HALF_OPEN lets one request in at a time.

Pure: every method takes `now`. Not thread-safe: the owner holds a lock around every change.
"""

from __future__ import annotations

from enum import Enum

_FAILURES = 5
_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 60.0


class Gate(Enum):
    """Whether requests may pass."""

    CLOSED = "closed"  # all is well
    OPEN = "open"  # nobody
    HALF_OPEN = "half_open"  # one at a time, to see
    LATCHED = "latched"  # nobody, ever again


class Breaker:
    """Watches one model. `reason` says why it is not closed, in words that are fit for strangers."""

    def __init__(self) -> None:
        self.reason = ""
        self.failures = 0  # in a row
        self._pause = 0.0
        self._until: float | None = None  # end of the pause; None: closed
        self._latched = False

    def gate(self, now: float) -> Gate:
        """The state at `now`."""
        if self._latched:
            return Gate.LATCHED
        if self._until is None:
            return Gate.CLOSED
        return Gate.OPEN if now < self._until else Gate.HALF_OPEN

    def admits(self, now: float, in_flight: int) -> bool:
        """Whether a request may enter while `in_flight` items are being dealt with."""
        gate = self.gate(now)
        return gate is Gate.CLOSED or (gate is Gate.HALF_OPEN and not in_flight)

    def pause(self, now: float) -> float:
        """Seconds until it lets somebody try again; 0 if it does, infinite if it never will."""
        if self._latched:
            return float("inf")
        return max(0.0, (self._until or now) - now)

    def succeeded(self) -> bool:
        """The model has answered. Returns whether this closed it."""
        if self._latched:
            return False
        closed = self._until is not None
        self.reason, self.failures, self._pause, self._until = "", 0, 0.0, None
        return closed

    def failed(self, now: float, why: str) -> bool:
        """The model has failed, and it is not the input's fault. Returns whether this opened it.

        Args:
            now: When.
            why: A class name or so.
        """
        gate = self.gate(now)
        if gate in (Gate.OPEN, Gate.LATCHED):
            return False  # from before it opened: nothing new
        self.failures += 1
        if gate is Gate.CLOSED and self.failures < _FAILURES:
            return False
        self._pause = min(max(2 * self._pause, _PAUSE_S), _LONGEST_PAUSE_S)
        self._until = now + self._pause
        self.reason = f"the model has failed {self.failures} times in a row, last with {why}"
        return True

    def latch(self, reason: str) -> bool:
        """Nothing will work again in this process. Returns whether that is new."""
        if self._latched:
            return False
        self._latched, self.reason = True, reason
        return True
