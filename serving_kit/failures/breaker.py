"""When requests are refused because the model fails: the circuit breaker.

    CLOSED ── 5 failures in a row ──▶ OPEN ── its pause is over ──▶ HALF_OPEN ── an answer ──▶ CLOSED
       │                               ▲                               │
       └── the device is lost ──▶ LATCHED     └──── a failure, pause x 2 ────┘

A failure is a whole batch without one answer while the canary fails as well, or a crash of the model
thread. An overload never is one, and neither is a bad input. HALF_OPEN lets one request in at a time.

Without a canary (every function has none) a failing model looks like failing inputs. There, a batch without
one answer is inconclusive, and one client's bad inputs must not keep others out:

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
_INCONCLUSIVE_S = 10.0  # a client that is answered once within this time keeps it closed for all
_INCONCLUSIVE_PAUSE_S, _LONGEST_INCONCLUSIVE_PAUSE_S = 1.0, 8.0
_TRIAL_S = 2.0  # a client that comes back after `Retry-After` is let in


class Gate(Enum):
    """Whether requests may pass."""

    CLOSED = "closed"  # all requests
    OPEN = "open"  # no new requests
    HALF_OPEN = "half_open"  # on trial: one at a time; after inconclusive failures all
    LATCHED = "latched"  # no requests until a new process


class Breaker:
    """Watches one model.

    Attributes:
        reason: Why it is not closed, in words that are fit for clients; empty if it is closed.
        failures: Failures in a row.
        inconclusive: Whether what has opened it may have been bad inputs.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.failures = 0
        self.inconclusive = False
        self._unanswered = 0  # batches in a row that brought new inputs and no answer
        self._since = 0.0
        self._inputs: set[int] = set()  # fingerprints of what failed in those
        self._pause_s = 0.0
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
        return gate is Gate.CLOSED or (gate is Gate.HALF_OPEN and (self.inconclusive or not in_flight))

    def refuses_admitted(self, now: float) -> bool:
        """Whether requests that were admitted before it opened are refused as well."""
        gate = self.gate(now)
        return gate is Gate.LATCHED or (gate is Gate.OPEN and not self.inconclusive)

    def pause_s(self, now: float) -> float:
        """Seconds until it admits a request again; 0 if it does, infinite if it never will."""
        if self._latched:
            return float("inf")
        return max(0.0, (self._until or now) - now)

    @property
    def degraded_reason(self) -> str:
        """Why it is not certain that requests can be answered; empty if it is."""
        if not self.reason:
            return ""
        who = "requests are" if self.inconclusive else "one request at a time is"
        return f"{self.reason}; {who} let in to try again"

    @property
    def has_failures(self) -> bool:
        """Whether something has failed since the last answer."""
        return bool(self.reason or self.failures or self._unanswered)

    def succeeded(self) -> bool:
        """The model has answered. Returns whether this closed it."""
        if self._latched:
            return False
        closed = self._until is not None
        self.reason, self.failures, self._pause_s, self._until = "", 0, 0.0, None
        self.inconclusive, self._unanswered, self._inputs = False, 0, set()
        return closed

    def failed(self, now: float, why: str) -> bool:
        """The model has failed, whatever the input. Returns whether this opened it.

        Args:
            now: The time.
            why: A class name or so.
        """
        gate = self.gate(now)
        if gate is Gate.LATCHED or (gate is Gate.OPEN and not self.inconclusive):
            return False  # from before it opened: nothing new
        self.failures += 1
        if self.failures < _FAILURES:
            return False
        if self.inconclusive:
            self.inconclusive, self._pause_s = False, 0.0
        self._open(now, _PAUSE_S, _LONGEST_PAUSE_S)
        self.reason = f"the model has failed {self.failures} times in a row, last with {why}"
        return True

    def failed_inconclusively(self, now: float, why: str, inputs: Set[int]) -> bool:
        """A batch has failed as a whole, which may be because of its inputs. Returns whether this opened it.

        Args:
            now: The time.
            why: A class name or so.
            inputs: Fingerprints of its inputs.
        """
        gate = self.gate(now)
        if gate in (Gate.OPEN, Gate.LATCHED):
            return False
        if gate is Gate.HALF_OPEN:
            if not self.inconclusive or self._until is None or now < self._until + _TRIAL_S:
                return False
        elif not self._note(now, inputs):
            return False
        self.inconclusive = True
        self._open(now, _INCONCLUSIVE_PAUSE_S, _LONGEST_INCONCLUSIVE_PAUSE_S)
        took = now - self._since
        self.reason = f"no request was answered for {took:.0f} s, and the last failed with {why}"
        return True

    def latch(self, reason: str) -> bool:
        """Nothing will work again in this process. Returns whether that is new."""
        if self._latched:
            return False
        self._latched, self.reason = True, reason
        return True

    def _note(self, now: float, inputs: Set[int]) -> bool:
        """Count an inconclusive failure. Returns whether that makes enough of them."""
        if not self._unanswered:
            self._since = now
        if self._unanswered < _FAILURES and not inputs <= self._inputs:
            self._unanswered += 1
            self._inputs |= inputs
        return self._unanswered >= _FAILURES and now - self._since >= _INCONCLUSIVE_S

    def _open(self, now: float, shortest_s: float, longest_s: float) -> None:
        self._pause_s = min(max(2 * self._pause_s, shortest_s), longest_s)
        self._until = now + self._pause_s
