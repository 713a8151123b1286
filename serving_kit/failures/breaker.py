"""When not to ask the model any more: the circuit breaker.

    CLOSED ── 5 failures in a row ──▶ OPEN ── its pause is over ──▶ HALF_OPEN ── an answer ──▶ CLOSED
       │                               ▲                               │
       └── the device is lost ──▶ LATCHED     └──── a failure, pause x 2 ────┘

A failure is a whole batch without one answer while the canary fails as well, or a crash of the model
thread. An overload never is one, and neither is a bad input. HALF_OPEN lets one request in at a time.

A model without a canary (every function) cannot be told from its inputs. There, a batch without one answer
is a doubt, and one client's bad inputs must not keep others out:

- It opens when at least 5 different inputs have failed over at least 10 s in which nothing was answered.
- It refuses new requests for a short pause (1 s, doubling up to 8 s); admitted requests still run.
- HALF_OPEN lets all requests in, for 2 s at least. One answer closes it, and the count begins anew.

Pure: every method takes `now`. Not thread-safe: the owner holds a lock around every change.
"""

from __future__ import annotations

from collections.abc import Set
from enum import Enum

_FAILURES = 5
_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 60.0
# Without a canary:
_DOUBT_S = 10.0  # a client that is answered once within this time keeps it closed for all
_DOUBT_PAUSE_S, _LONGEST_DOUBT_PAUSE_S = 1.0, 8.0
_TRIAL_S = 2.0  # a client that comes back after `Retry-After` is let in


class Gate(Enum):
    """Whether requests may pass."""

    CLOSED = "closed"  # all is well
    OPEN = "open"  # no new requests
    HALF_OPEN = "half_open"  # to see: one at a time, or in doubt all
    LATCHED = "latched"  # no requests until a new process


class Breaker:
    """Watches one model.

    Attributes:
        reason: Why it is not closed, in words that are fit for clients; empty if it is closed.
        failures: Failures in a row.
        in_doubt: Whether what has opened it may have been bad inputs.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.failures = 0
        self.in_doubt = False
        self._doubts = 0  # batches in a row that brought new inputs and no answer
        self._doubted_since = 0.0
        self._inputs: set[int] = set()  # fingerprints of what failed in those
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
        return gate is Gate.CLOSED or (gate is Gate.HALF_OPEN and (self.in_doubt or not in_flight))

    def refuses_admitted(self, now: float) -> bool:
        """Whether requests that were admitted before it opened are refused as well."""
        gate = self.gate(now)
        return gate is Gate.LATCHED or (gate is Gate.OPEN and not self.in_doubt)

    def pause(self, now: float) -> float:
        """Seconds until it admits a request again; 0 if it does, infinite if it never will."""
        if self._latched:
            return float("inf")
        return max(0.0, (self._until or now) - now)

    @property
    def suspects(self) -> bool:
        """Whether something has failed since the last answer."""
        return bool(self.reason or self.failures or self._doubts)

    def succeeded(self) -> bool:
        """The model has answered. Returns whether this closed it."""
        if self._latched:
            return False
        closed = self._until is not None
        self.reason, self.failures, self._pause, self._until = "", 0, 0.0, None
        self.in_doubt, self._doubts, self._inputs = False, 0, set()
        return closed

    def failed(self, now: float, why: str) -> bool:
        """The model has failed, and it is not the input's fault. Returns whether this opened it.

        Args:
            now: The time.
            why: A class name or so.
        """
        gate = self.gate(now)
        if gate is Gate.LATCHED or (gate is Gate.OPEN and not self.in_doubt):
            return False  # from before it opened: nothing new
        self.failures += 1
        if self.failures < _FAILURES:
            return False
        if self.in_doubt:
            self.in_doubt, self._pause = False, 0.0
        self._open(now, _PAUSE_S, _LONGEST_PAUSE_S)
        self.reason = f"the model has failed {self.failures} times in a row, last with {why}"
        return True

    def doubted(self, now: float, why: str, inputs: Set[int]) -> bool:
        """A batch has failed as a whole, which may be its inputs' fault. Returns whether this opened it.

        Args:
            now: The time.
            why: A class name or so.
            inputs: Fingerprints of its inputs.
        """
        gate = self.gate(now)
        if gate in (Gate.OPEN, Gate.LATCHED):
            return False
        if gate is Gate.HALF_OPEN:
            if not self.in_doubt or self._until is None or now < self._until + _TRIAL_S:
                return False
        elif not self._note(now, inputs):
            return False
        self.in_doubt = True
        self._open(now, _DOUBT_PAUSE_S, _LONGEST_DOUBT_PAUSE_S)
        took = now - self._doubted_since
        self.reason = f"no request was answered for {took:.0f} s, and the last failed with {why}"
        return True

    def latch(self, reason: str) -> bool:
        """Nothing will work again in this process. Returns whether that is new."""
        if self._latched:
            return False
        self._latched, self.reason = True, reason
        return True

    def _note(self, now: float, inputs: Set[int]) -> bool:
        """Count a doubt. Returns whether that makes enough of them."""
        if not self._doubts:
            self._doubted_since = now
        if self._doubts < _FAILURES and not inputs <= self._inputs:
            self._doubts += 1
            self._inputs |= inputs
        return self._doubts >= _FAILURES and now - self._doubted_since >= _DOUBT_S

    def _open(self, now: float, shortest_s: float, longest_s: float) -> None:
        self._pause = min(max(2 * self._pause, shortest_s), longest_s)
        self._until = now + self._pause
