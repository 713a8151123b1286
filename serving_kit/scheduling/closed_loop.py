"""Whether clients send their next request as soon as they are answered, and how soon.

Closed-loop clients fall into step with the model: half of them wait while the other half is being
answered, and every batch is half as large as it could be. Waiting a moment after a batch lets the
answered ones rejoin. That pays if enough of them come back, sooner than a call costs:

    share * call_s > gap        share: of the answered, how many come back within the gap
                                gap: 19 of 20 that come back do so within it, seconds

What chance would have brought into the gap at the present rate does not count as coming back, so with
independent arrivals the share is about zero and the model never waits.

Pure, like the scheduler that asks it: every method takes `now`.
"""

from __future__ import annotations

import math

_HORIZON_S = 0.02  # later arrivals do not follow from the answer
_GAP_AT_FIRST_S = 0.002
_GAP_RANGE_S = (1e-4, _HORIZON_S)
_GAP_QUANTILE, _GAP_RATE = 0.95, 0.05
_SHARE_RATE = 0.1  # per batch
_ENOUGH = 0.3
_RATE_MEMORY_S = 1.0


class ClosedLoop:
    """Learns from when batches end and when items arrive."""

    def __init__(self) -> None:
        self.share = 0.0
        self.gap = _GAP_AT_FIRST_S
        self._ended: float | None = None
        self._answered = 0
        self._back = 0
        self._rate = 0.0  # items per second
        self._rate_at = 0.0

    def batch_ended(self, now: float, answered: int) -> None:
        """A batch of `answered` items has ended; the next arrivals may be theirs."""
        if self._ended is not None:
            by_chance = self._rate * self.gap
            back = min((self._back - by_chance) / self._answered, 1.0)
            self.share += _SHARE_RATE * (back - self.share)
        self._ended, self._answered, self._back = now, answered, 0

    def arrived(self, now: float, items: int) -> None:
        """So many items have arrived."""
        past = math.exp(-(now - self._rate_at) / _RATE_MEMORY_S)
        self._rate, self._rate_at = self._rate * past + items / _RATE_MEMORY_S, now
        if self._ended is None or now - self._ended > _HORIZON_S:
            return
        since = now - self._ended
        if since <= self.gap:
            self._back += items
        # Stochastic gradient descent on the pinball loss, in steps relative to the gap itself.
        step = _GAP_QUANTILE if since > self.gap else _GAP_QUANTILE - 1
        low, high = _GAP_RANGE_S
        self.gap = min(max(self.gap * (1 + _GAP_RATE * step), low), high)

    def worth_waiting(self, call_s: float) -> bool:
        """Whether to wait out the gap after a batch; a call costs `call_s` seconds besides its tokens."""
        return self.share >= _ENOUGH and self.share * call_s > self.gap
