"""How much fits into memory: learned from failures, and tried again slowly.

A batch that did not fit sets a limit on computed tokens for all batches with items at least as long: half
of that size, rising to the whole of it within a period, after which larger ones may be tried. Each
time that one of these does not fit, the period doubles, so that a day holds a handful of such failures.
A limit of one length holds for longer ones too, because a padded token costs more the longer its row;
it does not hold for shorter ones. Where the model packs there are no rows of one length, and one limit.

Pure: every method takes `now`. Not here: halving what did not fit (`bisection.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_PERIOD_S, _LONGEST_PERIOD_S = 300.0, 12 * 3600.0


@dataclass(frozen=True, slots=True)
class _Exceeded:
    """What did not fit, and when."""

    computed_tokens: int
    at: float
    period_s: float  # seconds until it may be tried again

    def limit(self, now: float) -> float:
        past = (now - self.at) / self.period_s
        return self.computed_tokens / 2 * (1 + past) if past < 1 else math.inf


class MemoryLimit:
    """Most tokens that a step may compute, for each class of lengths (powers of two).

    Args:
        packed: Whether the model needs no padding: then all lengths are one class.
    """

    def __init__(self, *, packed: bool = False) -> None:
        self._packed = packed
        self._exceeded: dict[int, _Exceeded] = {}

    def limit(self, longest: int, now: float) -> float:
        """Most computed tokens for a batch whose longest item has `longest`; infinite if nothing is known."""
        if not self._exceeded:
            return math.inf
        own = self._class(longest)
        return min((each.limit(now) for c, each in self._exceeded.items() if c <= own), default=math.inf)

    def lowest(self, now: float) -> int | None:
        """The limit for the longest inputs, for people; None: there is none."""
        limit = min((each.limit(now) for each in self._exceeded.values()), default=math.inf)
        return None if limit == math.inf else int(limit)

    def exceeded(self, longest: int, computed_tokens: int, now: float) -> None:
        """Several items together did not fit, though each of them does."""
        own = self._class(longest)
        before = self._exceeded.get(own)
        period_s = _PERIOD_S
        if before is not None and now < before.at + 2 * before.period_s:
            period_s = min(2 * before.period_s, _LONGEST_PERIOD_S)
        self._exceeded[own] = _Exceeded(computed_tokens, now, period_s)

    def _class(self, longest: int) -> int:
        return 0 if self._packed else longest.bit_length()
