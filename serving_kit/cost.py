"""What a batch will cost, learned online from finished batches.

    seconds(x) = (a + b * x) * s        x = padded tokens of the batch (items x longest)

`a` is what a call costs whatever it holds, `b` what a padded token costs, `s` follows slow-downs
within a few batches (a throttled laptop, a noisy neighbour). On a CPU a/b is tens of tokens, on a
GPU thousands; that ratio is all the scheduler needs to find small batches on one and big ones on
the other.

Fit: weighted least squares over all batches with exponential forgetting. Weights are 1/t^2, so that
the error is relative and long batches do not drown short ones. The 95th percentile of
(actual / predicted) is tracked by stochastic gradient descent on the pinball loss. A batch that took
more than three times its prediction (a hiccup, a lazy initialisation) counts as three times.

Not here: what to do with the numbers (`scheduler.py`).
"""

from __future__ import annotations

_FORGET = 0.995  # per batch: half of the memory is 138 batches old
_DRIFT_RATE = 0.2
_DRIFT_RANGE = (0.25, 4.0)
_HICCUP = 3.0
_QUANTILE = 0.95
_QUANTILE_RATE = 0.01
_DRAIN_RATE = 0.1
_KNOWN_AFTER = 3  # batches; the first ones carry lazy initialisation
_MOST_TOKENS = 100_000_000


class CostModel:
    """Learns the cost of a batch. Not thread-safe: the scheduler owns it."""

    def __init__(self) -> None:
        self.a = 0.0  # seconds per call
        self.b = 0.0  # seconds per padded token
        self.drift = 1.0
        self.tail = 1.05  # p95 of actual / predicted
        self.observations = 0
        self.seconds_per_token: float | None = None  # per useful token: absorbs padding and `a`
        # Normal equations of the weighted fit: sums of w, w*x, w*x*x, w*t, w*x*t.
        self._w = self._wx = self._wxx = self._wt = self._wxt = 0.0

    def __repr__(self) -> str:
        return f"CostModel({self.a * 1e3:.3g} ms + {self.b * 1e6:.3g} µs/token, n={self.observations})"

    @property
    def known(self) -> bool:
        """Whether enough batches were seen to act on the numbers."""
        return self.observations >= _KNOWN_AFTER

    def seconds(self, padded_tokens: float) -> float:
        """Expected duration of a batch."""
        return (self.a + self.b * padded_tokens) * self.drift

    def high(self, padded_tokens: float) -> float:
        """Duration that 95 of 100 such batches stay below; 0 while nothing is known."""
        return self.seconds(padded_tokens) * self.tail if self.known else 0.0

    def budget(self, limit_s: float) -> int:
        """Most padded tokens whose `high` duration stays within `limit_s`; at least 1."""
        if not self.known or self.b <= 0:
            return _MOST_TOKENS
        tokens = (limit_s / (self.tail * self.drift) - self.a) / self.b
        return int(min(max(tokens, 1), _MOST_TOKENS))

    def observe(self, padded_tokens: int, tokens: int, seconds: float) -> None:
        """Learn from one finished batch that did not raise."""
        if seconds <= 0 or padded_tokens <= 0:
            return
        if self.known:
            ratio = min(seconds / self.seconds(padded_tokens), _HICCUP)
            seconds = ratio * self.seconds(padded_tokens)
            low, high = _DRIFT_RANGE
            self.drift = min(max(self.drift * (1 + _DRIFT_RATE * (ratio - 1)), low), high)
            self.tail += _QUANTILE_RATE * (_QUANTILE if ratio > self.tail else _QUANTILE - 1)
            self.tail = min(max(self.tail, 1.0), 2.0)
        self._fit(float(padded_tokens), seconds)
        rate = seconds / max(tokens, 1)
        known = self.seconds_per_token
        self.seconds_per_token = rate if known is None else known + _DRAIN_RATE * (rate - known)
        self.observations += 1

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
        self.a, self.b = a, b
