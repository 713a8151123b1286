"""What a batch will cost, learned online from finished batches.

    seconds(x) = (a + b * x) * level        x = tokens that the model computes for the batch

`a` is what a call costs whatever it holds, `b` what a computed token costs. A model that pads computes
items x longest, one that packs the sum. On a CPU a/b is tens of
tokens, on a GPU thousands; that ratio is all the scheduler needs to find small batches on one and big
ones on the other. `level` follows everything that slows down or speeds up as a whole: a throttled
laptop, a noisy neighbour, a model that waits for something.

- Shape (a, b): least squares with exponential forgetting over all batches, each divided by the level
  at its time. Weights are 1/t^2, so that the error is relative and long batches do not hide short ones.
- Level: exponential smoothing of log(actual / predicted), without bounds, with the adaptive gain of
  Trigg and Leach (1967): |mean error| / mean |error|. Errors in one direction raise the gain, so that a
  lasting change is adopted after two or three batches; errors in both directions, as a model with two
  speeds makes them, lower it. The gain is one batch old (Shone's variant) and a single surprise counts
  as three times at most, so that one outlier moves little.
- Tail: the 95th percentile of actual / predicted, by stochastic gradient descent on the pinball loss in
  log space.

The scheduler refuses requests by these numbers, and nothing is learned from what is refused. So where the
data are uncertain, the uncertainty counts in favour of admitting and of larger batches: `drain` and
`budget` use the smallest slope that the data allow (two standard errors below `b`, zero while only one
size has been seen). A budget that only this slope allows is at most twice the largest batch seen lately:
with costs a + b * x >= 0 the next batch then takes at most twice as long as that one. As batches of
other sizes are forgotten the uncertainty grows again, so that no budget is final.

Where the model packs, a step of which the call takes `_CALL_SHARE` is large enough: beyond that a token gets
hardly any cheaper, and what arrives waits longer. The uncertainty may double that size, never more.

`wait` is for a model that packs: nothing passes an item there, so that the steps ahead of it can be counted.

Not here: what to do with the numbers (`scheduler.py`), when to stop trusting them (`watchdog.py`).
"""

from __future__ import annotations

import math

_FORGET = 0.995  # per batch: half of the memory is 138 batches old
_SIGNAL_RATE = 0.1
_FIRST_SPREAD = 0.5  # mean |log(actual / predicted)| before anything is known about it
_LEAST_SPREAD = 0.05
_GAIN_RANGE = (0.1, 0.9)
_GAIN_DOWNWARDS = 0.5  # for a surprise of being faster: refusing by an outdated cost is the worse mistake
_LEVEL_RANGE = (0.25, 4.0)  # then the shape takes it over
_SURPRISE = math.log(2)  # plus two mean errors
_OUTLIER = math.log(3)
_QUANTILE = 0.95
_QUANTILE_RATE = 0.02
_TAIL_RANGE = (0.0, math.log(100))
_OVERHEAD_FORGET = 0.9  # per batch
_LARGEST_FORGET = 0.99  # per batch
_GROWTH = 2.0
_KNOWN_AFTER = 3  # batches; the first ones carry lazy initialisation
_TRUSTED_AFTER = 8
_MOST_TOKENS = 100_000_000
_CALL_SHARE, _LEAST_PACK = 0.03, 256  # of a pack: the share of its time that the call takes; tokens


class CostModel:
    """Learns the cost of a batch. Not thread-safe: the scheduler owns it.

    Args:
        packed: Whether the model needs no padding.
    """

    def __init__(self, *, packed: bool = False) -> None:
        self.packed = packed
        self.level = 1.0
        self.observations = 0
        self.overhead = 1.0  # actual / `drain`'s seconds, of batches that left items waiting
        self.largest = 0.0  # computed tokens of the largest batch seen lately
        self._a = self._b = 0.0  # at level 1
        self._tail = math.log(1.05)
        self._signal = 0.0  # smoothed log(actual / predicted)
        self._spread = _FIRST_SPREAD  # smoothed |log(actual / predicted)|
        # Seconds per call and per token at level 1, with the least and the greatest slope that the data
        # allow. Computed once for each batch, because admission reads them for each request.
        self._least = self._greatest = (0.0, 0.0)
        # Normal equations of the weighted fit: sums of w, w*x, w*x*x, w*t, w*x*t.
        self._w = self._wx = self._wxx = self._wt = self._wxt = 0.0
        self._actual = self._ideal = 0.0  # what `overhead` is the ratio of

    def __repr__(self) -> str:
        return f"CostModel({self.a * 1e3:.3g} ms + {self.b * 1e6:.3g} µs/token, n={self.observations})"

    @property
    def a(self) -> float:
        """Seconds per call, now."""
        return self._a * self.level

    @property
    def b(self) -> float:
        """Seconds per computed token, now."""
        return self._b * self.level

    @property
    def tail(self) -> float:
        """95th percentile of actual / predicted."""
        return math.exp(self._tail)

    @property
    def known(self) -> bool:
        """Whether enough batches were seen to plan by the numbers."""
        return self.observations >= _KNOWN_AFTER

    @property
    def trusted(self) -> bool:
        """Whether enough batches were seen to refuse requests by the numbers."""
        return self.observations >= _TRUSTED_AFTER

    def seconds(self, computed_tokens: float) -> float:
        """Expected duration of a batch."""
        return self.a + self.b * computed_tokens

    def high(self, computed_tokens: float) -> float:
        """Duration that 95 of 100 such batches stay below; 0 while nothing is known."""
        return self.seconds(computed_tokens) * self.tail if self.known else 0.0

    def budget(self, limit_s: float) -> int:
        """Most computed tokens for a batch that is to stay within about `limit_s` seconds; at least 1."""
        if not self.largest:
            return _MOST_TOKENS
        optimistic = min(self._optimistic(limit_s), _GROWTH * self.largest)
        proved = self._room(limit_s / self.tail, self._greatest) if self.observations else 1.0
        return int(min(max(proved, optimistic, 1.0), _MOST_TOKENS))

    def grows(self, limit_s: float) -> bool:
        """Whether `budget` is held back because no larger batch has been seen."""
        return self.budget(limit_s) < min(self._optimistic(limit_s), _MOST_TOKENS)

    def drain(
        self,
        items: float,
        tokens: float,
        most: int,
        limit_s: float,
        *,
        budget: float = math.inf,
        at_least: bool = False,
    ) -> float:
        """Seconds to finish `items` waiting items of `tokens` tokens in all; 0 while unknown.

        In the largest batches that `most` items, `limit_s` seconds and `budget` tokens allow, times
        `overhead`.
        `at_least`: with the smallest slope that the data allow, not the likeliest.
        """
        a, b = self._least if at_least else (self._a, self._b)
        a, b = a * self.level, b * self.level
        room = min(self._room_now(limit_s, a, b), budget)
        shared = _shared(items, tokens, most, room, a, b) * self.overhead
        return max(shared, a + b * tokens / items) if items else 0.0  # one call at least

    def wait(self, items: int, tokens: float, most: int, limit_s: float, budget: float = math.inf) -> float:
        """Seconds until the last of `items` items of `tokens` tokens in all is answered, at least.

        For a model that packs. In whole steps, the last of which holds nothing that is younger; with the
        smallest slope that the data allow. Smaller steps than these, as `overhead` knows them, cost more, but
        no more than a step for each item.
        """
        a, b = self._least[0] * self.level, self._least[1] * self.level
        room = min(self._room_now(limit_s, a, b), budget)
        steps = max(math.ceil(items / most), min(items, math.ceil(tokens / room)))
        small_steps = _shared(items, tokens, most, room, a, b) * self.overhead
        return max(a * steps + b * tokens, min(small_steps, a * items + b * tokens))

    def observe(self, computed_tokens: float, seconds: float) -> None:
        """Learn from one finished batch that did not raise."""
        if seconds <= 0 or computed_tokens <= 0:
            return
        x, seconds = float(computed_tokens), float(seconds)
        if self.known:
            self._follow(self._error(x, seconds))
            error = self._error(x, seconds)  # what the level does not explain
            seconds *= math.exp(_clipped(error) - error)
        self._fit(x, seconds / self.level)
        self._bound()
        if not _LEVEL_RANGE[0] < self.level < _LEVEL_RANGE[1]:
            self._rebase()
        self.largest = max(x, self.largest * _LARGEST_FORGET)
        self.observations += 1

    def observe_drain(
        self,
        items: int,
        tokens: int,
        computed_tokens: int,
        seconds: float,
        most: int,
        limit_s: float,
        budget: float = math.inf,
    ) -> None:
        """Learn how much longer a batch took than `drain` says; for batches that left items waiting."""
        room = min(self._room_now(limit_s, self.a, self.b), budget)
        ideal = _shared(items, tokens, most, room, self.a, self.b)
        if not self.known or ideal <= 0 or seconds <= 0:
            return
        # Not simply seconds / ideal: what is new about the model's speed is for the level to learn.
        actual = self.seconds(computed_tokens) * math.exp(_clipped(self._error(computed_tokens, seconds)))
        # A ratio of sums, because the mean of ratios would count small batches as much as large ones.
        self._actual = self._actual * _OVERHEAD_FORGET + actual / self.level
        self._ideal = self._ideal * _OVERHEAD_FORGET + ideal / self.level
        self.overhead = self._actual / self._ideal

    def relearn(self) -> None:
        """Forget everything, except that half of the largest batch counts as seen: budgets start there."""
        largest = max(1.0, self.largest / 2)
        self.__init__(packed=self.packed)  # type: ignore[misc]
        self.largest = largest

    # -- inside ----------------------------------------------------------------------------------

    def _error(self, computed_tokens: float, seconds: float) -> float:
        """log(actual / predicted) of a batch."""
        return math.log(seconds / self.seconds(computed_tokens))

    def _follow(self, error: float) -> None:
        """Move level and tail by one log(actual / predicted)."""
        low, high = _GAIN_RANGE
        gain = min(max(abs(self._signal) / self._spread, low), high)
        surprise = _SURPRISE + 2 * self._spread
        # A single large error counts as an outlier at most; after others in its direction it counts whole.
        step = error if gain > 0.5 and self._signal * error > 0 else min(error, _OUTLIER + 2 * self._spread)
        if error < -surprise:
            gain = max(gain, _GAIN_DOWNWARDS)
        self.level *= math.exp(gain * step)
        self._signal += _SIGNAL_RATE * (error - self._signal)
        self._spread = max(_LEAST_SPREAD, self._spread + _SIGNAL_RATE * (abs(error) - self._spread))
        self._tail += _QUANTILE_RATE * (_QUANTILE if error > self._tail else _QUANTILE - 1)
        self._tail = min(max(self._tail, _TAIL_RANGE[0]), _TAIL_RANGE[1])

    def _rebase(self) -> None:
        """Make the present level 1: only its product with the shape is determined, and both could drift."""
        scale, self.level = self.level, 1.0
        self._a, self._b = self._a * scale, self._b * scale
        self._least = self._least[0] * scale, self._least[1] * scale
        self._greatest = self._greatest[0] * scale, self._greatest[1] * scale
        self._w, self._wx, self._wxx = self._w / scale**2, self._wx / scale**2, self._wxx / scale**2
        self._wt, self._wxt = self._wt / scale, self._wxt / scale
        self._actual, self._ideal = self._actual * scale, self._ideal * scale

    def _bound(self) -> None:
        """Find the lines through the mean of the data with the least and the greatest possible slope."""
        most = self._wt / self._wx  # all of the time is the tokens'
        scatter = self._wxx - self._wx * self._wx / self._w
        low, high = 0.0, most
        if scatter > 1e-9 * self._wxx:
            error = 2 * 1.25 * self._spread / math.sqrt(scatter)  # 1.25: mean |error| to standard deviation
            low, high = max(0.0, self._b - error), min(max(self._b, most), self._b + error)
        self._least, self._greatest = self._line(low), self._line(high)

    def _line(self, slope: float) -> tuple[float, float]:
        return max(0.0, (self._wt - slope * self._wx) / self._w), slope

    def _room(self, limit_s: float, line: tuple[float, float]) -> float:
        return self._room_now(limit_s, line[0] * self.level, line[1] * self.level)

    def _room_now(self, limit_s: float, a: float, b: float) -> float:
        """Computed tokens of a batch that is to take `limit_s` seconds, and is no larger than need be."""
        room = _room(limit_s, a, b)
        return min(room, _large_enough(a, b)) if self.packed else room

    def _optimistic(self, limit_s: float) -> float:
        """The same with the smallest slope that the data allow.

        What that says of a pack is bounded by what is likely: with packs of one size, it would say anything.
        """
        room = self._room(limit_s, self._least)
        return min(room, _GROWTH * _large_enough(self._a, self._b)) if self.packed else room

    def _fit(self, x: float, t: float) -> None:
        weight = 1 / (t * t)
        self._w = self._w * _FORGET + weight
        self._wx = self._wx * _FORGET + weight * x
        self._wxx = self._wxx * _FORGET + weight * x * x
        self._wt = self._wt * _FORGET + weight * t
        self._wxt = self._wxt * _FORGET + weight * x * t
        determinant = self._w * self._wxx - self._wx * self._wx
        if determinant > 1e-9 * self._w * self._wxx:
            a = (self._wt * self._wxx - self._wxt * self._wx) / determinant
            b = (self._wxt * self._w - self._wt * self._wx) / determinant
        else:  # one size only so far: give half of the time to each part
            a, b = self._wt / self._w / 2, self._wxt / self._wxx / 2
        if b < 0:  # neither part can be negative: refit the other alone
            a, b = self._wt / self._w, 0.0
        elif a < 0:
            a, b = 0.0, self._wxt / self._wxx
        self._a, self._b = a, b


def _large_enough(a: float, b: float) -> float:
    """Tokens of a pack beyond which a token gets hardly any cheaper."""
    return max(_LEAST_PACK, (1 / _CALL_SHARE - 1) * a / b) if b > 0 else math.inf


def _room(limit_s: float, a: float, b: float) -> float:
    """Computed tokens of a batch that takes `limit_s` seconds; at least 1.

    Where the call itself takes most of that, smaller batches would lose throughput and save no time. So
    the limit is raised to 2 a, by half at most, and is never below 1.25 a.
    """
    limit_s = max(limit_s, min(2 * a, 1.5 * limit_s), 1.25 * a)
    return max(1.0, (limit_s - a) / b) if b > 0 else math.inf


def _clipped(error: float) -> float:
    return min(max(error, -_OUTLIER), _OUTLIER)


def _shared(items: float, tokens: float, most: int, room: float, a: float, b: float) -> float:
    """Seconds for so many items in the largest batches that are allowed, in parts of a batch if need be.

    An item is never split: one that is larger than a batch may be runs alone.
    """
    return a * max(items / most, min(items, tokens / room)) + b * tokens
