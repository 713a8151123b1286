"""Durations as counts: logarithmic buckets for percentiles of a window, cumulative ones for Prometheus.

The logarithmic buckets are those of DDSketch: any quantile within 2 %. They are merged by adding, never
averaged, and their memory does not depend on the load.

Not here: what is counted (`metrics.py`, `token_metrics.py`).
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from math import ceil, log

from prometheus_client.core import HistogramMetricFamily, Metric

from serving_kit.status import Percentiles

HISTORY_S = 300  # seconds that are kept
WINDOW_S = 30  # percentiles and rates are over this many seconds
_GAMMA = 1.04  # bucket i holds (g^(i-1), g^i] microseconds: 2 % relative error
_LOG_GAMMA = math.log(_GAMMA)


def bucket(seconds: float) -> int:
    """The logarithmic bucket of a duration."""
    microseconds = seconds * 1e6
    return ceil(log(microseconds) / _LOG_GAMMA) if microseconds > 1 else 0


def percentiles(counts: Counter[int]) -> Percentiles:
    """The percentiles of durations that were counted by their bucket."""
    if not counts:
        return Percentiles(None, None, None)
    buckets = sorted(counts)
    cumulative = list(accumulate(counts[each] for each in buckets))
    return Percentiles(*[_quantile(q, buckets, cumulative) for q in (0.5, 0.95, 0.99)])


def merged(counters: Iterable[Counter[int]]) -> Counter[int]:
    """The sum of counts."""
    total: Counter[int] = Counter()
    for counter in counters:
        total.update(counter)
    return total


@dataclass(slots=True)
class Histogram:
    """Cumulative counts for Prometheus."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def family(self, name: str, text: str) -> Metric:
        """As a metric family."""
        cumulative, buckets = 0, []
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            cumulative += count
            buckets.append(("+Inf" if bound == math.inf else repr(float(bound)), float(cumulative)))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self.total)


def _quantile(q: float, buckets: list[int], cumulative: list[int]) -> float:
    rank = q * (cumulative[-1] - 1)
    return 2 * _GAMMA ** buckets[bisect.bisect_right(cumulative, rank)] / (_GAMMA + 1) / 1e6
