"""Counters and windows fed by records; `snapshot()` for people, `families()` for Prometheus.

Every second has a slot with what ended in it: outcomes, batches, and latencies as counts of
logarithmic buckets (DDSketch: any quantile within 2 %). A window is a sum of slots, so percentiles
are merged, never averaged, and memory does not depend on the load.

Records may come from any thread; one lock guards everything and is held for microseconds.

Not here: how it looks (`panel.py`), where it is served (`app.py`).
"""

from __future__ import annotations

import bisect
import math
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from serving_kit.model import FailureKind
from serving_kit.records import BatchReason, BatchRecord, Outcome, RequestRecord

HISTORY_S = 300
WINDOW_S = 30  # percentiles and rates are over this many seconds
_GAMMA = 1.04  # bucket i holds (g^(i-1), g^i] microseconds: 2 % relative error
_LOG_GAMMA = math.log(_GAMMA)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def bucket(seconds: float) -> int:
    """The logarithmic bucket of a duration."""
    return math.ceil(math.log(max(seconds * 1e6, 1.0)) / _LOG_GAMMA)


def quantile(counts: Counter[int], q: float) -> float | None:
    """The q-quantile in seconds, within 2 %; None without samples."""
    total = counts.total()
    if not total:
        return None
    rank, seen = q * (total - 1), 0
    for index in sorted(counts):
        seen += counts[index]
        if seen > rank:
            return 2 * _GAMMA**index / (_GAMMA + 1) / 1e6
    raise AssertionError("unreachable: ranks stay below the total")


@dataclass(slots=True)
class Slot:
    """What happened in one second."""

    second: int  # of the service's clock
    arrivals: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    latency: Counter[int] = field(default_factory=Counter)  # buckets, answered requests only
    queue_wait: Counter[int] = field(default_factory=Counter)
    forward: Counter[int] = field(default_factory=Counter)  # per batch
    sizes: Counter[int] = field(default_factory=Counter)  # batch size: batches
    reasons: Counter[BatchReason] = field(default_factory=Counter)  # why they were sent: batches
    tokens: int = 0
    padded_tokens: int = 0
    busy: float = 0.0  # seconds that the model was busy
    depth: int = 0  # deepest queue seen
    in_flight: int = 0  # most items inside, waiting and running
    last_depth: int = 0  # queue seen last: what a silent second after this one still has
    point: dict[str, Any] | None = None  # as `series` tells it, once the second is over


@dataclass(slots=True)
class _Histogram:
    """Cumulative counts for Prometheus."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def family(self, name: str, text: str) -> Metric:
        cumulative, buckets = 0, []
        for bound, count in zip((*self.bounds, math.inf), self.counts, strict=True):
            cumulative += count
            buckets.append(("+Inf" if bound == math.inf else repr(float(bound)), float(cumulative)))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self.total)


def gauge(name: str, text: str, *samples: tuple[Mapping[str, str], float]) -> Metric:
    """A gauge with one value for each set of labels; all sets have the same names."""
    names = list(samples[0][0])
    family = GaugeMetricFamily(name, text, labels=names)
    for labels, value in samples:
        family.add_metric([labels[each] for each in names], float(value))
    return family


class Metrics:
    """The numbers of one server. `add_*` and the readers may be called from any thread."""

    def __init__(self) -> None:
        self.outcomes: Counter[Outcome] = Counter()
        self.reasons: Counter[BatchReason] = Counter()
        self.faults: Counter[FailureKind] = Counter()
        self.items = 0
        self.wasted = 0
        self._lock = threading.Lock()
        self._slots: deque[Slot] = deque(maxlen=HISTORY_S)
        self._request = _Histogram(_SECONDS)
        self._queue_wait = _Histogram(_SECONDS)
        self._forward = _Histogram(_SECONDS)
        self._sizes = _Histogram(_SIZES)

    def add_arrival(self, now: float, queue_depth: int, in_flight: int = 0) -> None:
        """A request has arrived and sees `queue_depth` items waiting, of `in_flight` inside."""
        with self._lock:
            slot = self._slot(now)
            slot.arrivals += 1
            slot.last_depth = queue_depth
            slot.depth = max(slot.depth, queue_depth)
            slot.in_flight = max(slot.in_flight, in_flight)

    def add_request(self, record: RequestRecord) -> None:
        """A request has ended."""
        with self._lock:
            self.outcomes[record.outcome] += 1
            slot = self._slot(record.finished)
            slot.outcomes[record.outcome] += 1
            if record.outcome is Outcome.OK:
                slot.latency[bucket(record.latency)] += 1
                self._request.add(record.latency)
            if record.queue_wait is not None:
                slot.queue_wait[bucket(record.queue_wait)] += 1
                self._queue_wait.add(record.queue_wait)

    def add_batch(self, record: BatchRecord) -> None:
        """A batch has ended."""
        with self._lock:
            self.reasons[record.reason] += 1
            self.items += record.size
            self.wasted += record.wasted
            slot = self._slot(record.finished)
            slot.sizes[record.size] += 1
            slot.reasons[record.reason] += 1
            slot.forward[bucket(record.forward)] += 1
            slot.tokens += record.tokens
            slot.padded_tokens += record.padded_tokens
            slot.busy += record.forward
            slot.last_depth = record.left_waiting
            slot.depth = max(slot.depth, record.left_waiting + record.size)
            slot.in_flight = max(slot.in_flight, record.left_waiting + record.size)
            self._forward.add(record.forward)
            self._sizes.add(record.size)

    def add_fault(self, fault: FailureKind) -> None:
        """Something went wrong on the model thread."""
        with self._lock:
            self.faults[fault] += 1

    def requests(self) -> int:
        """How many have ended."""
        with self._lock:
            return self.outcomes.total()

    def snapshot(self, now: float) -> dict[str, Any]:
        """The totals, and the last `WINDOW_S` seconds. Durations are in milliseconds."""
        with self._lock:
            window = [slot for slot in self._slots if slot.second > now - WINDOW_S]
            latency = _merge(slot.latency for slot in window)
            waits = _merge(slot.queue_wait for slot in window)
            forwards = _merge(slot.forward for slot in window)
            sizes = _merge(slot.sizes for slot in window)
            outcomes = _merge(slot.outcomes for slot in window)
            tokens = sum(slot.tokens for slot in window)
            padded = sum(slot.padded_tokens for slot in window)
            first = self._slots[0].second if self._slots else now
            seconds = max(1.0, min(WINDOW_S, now - first))
            batches = sizes.total()
            return {
                "requests": {outcome.value: self.outcomes[outcome] for outcome in Outcome},
                "batches": {reason.value: self.reasons[reason] for reason in BatchReason},
                "faults": {fault.value: self.faults[fault] for fault in FailureKind},
                "items": self.items,
                "wasted_items": self.wasted,
                "window": {
                    "seconds": seconds,
                    "arrivals_per_s": sum(slot.arrivals for slot in window) / seconds,
                    "answers_per_s": outcomes[Outcome.OK] / seconds,
                    "batches_per_s": batches / seconds,
                    "batch_size_mean": sum(n * c for n, c in sizes.items()) / batches if batches else None,
                    "batch_size_max": max(sizes, default=None),
                    "padding": 1 - tokens / padded if padded else None,
                    "busy": min(1.0, sum(slot.busy for slot in window) / seconds),
                    "samples": latency.total(),
                    "latency_ms": _percentiles(latency),
                    "queue_wait_ms": _percentiles(waits),
                    "forward_ms": _percentiles(forwards),
                },
            }

    def series(self, now: float, seconds: int = 120) -> list[dict[str, Any]]:
        """One entry for each of the last `seconds` seconds, oldest first, silent ones included.

        What is older than `HISTORY_S` is not known: ask for no more.
        """
        with self._lock:
            slots = {slot.second: slot for slot in self._slots}
            last = math.floor(now)
            points, depth = [], 0
            for second in range(last - seconds + 1, last + 1):
                slot = slots.get(second) or Slot(second, depth=depth, last_depth=depth)
                depth = slot.last_depth
                # A second that is over does not change; a late record may still reach the one before.
                point = slot.point or _point(slot)
                if second < last - 1:
                    slot.point = point
                points.append(dict(point))
            return points

    def families(self, queue_depth: int, in_flight: int) -> Iterator[Metric]:
        """Everything since the start, as Prometheus metric families."""
        with self._lock:
            requests = CounterMetricFamily(
                "serving_kit_requests", "Requests by how they ended.", labels=["outcome"]
            )
            for outcome in Outcome:
                requests.add_metric([outcome.value], self.outcomes[outcome])
            batches = CounterMetricFamily(
                "serving_kit_batches", "Batches by why they were sent.", labels=["reason"]
            )
            for reason in BatchReason:
                batches.add_metric([reason.value], self.reasons[reason])
            faults = CounterMetricFamily(
                "serving_kit_faults", "What went wrong in the model or around it.", labels=["kind"]
            )
            for fault in FailureKind:
                faults.add_metric([fault.value], self.faults[fault])
            families = [
                requests,
                batches,
                faults,
                CounterMetricFamily(
                    "serving_kit_wasted_items", "Items run for nobody: gone or late.", value=self.wasted
                ),
                GaugeMetricFamily("serving_kit_queue_depth", "Items that wait.", value=queue_depth),
                GaugeMetricFamily(
                    "serving_kit_in_flight", "Items admitted and not yet answered.", value=in_flight
                ),
                self._sizes.family("serving_kit_batch_size", "Items per forward."),
                self._queue_wait.family("serving_kit_queue_wait_seconds", "Arrival to start of the batch."),
                self._forward.family("serving_kit_forward_seconds", "Duration of a batch."),
                self._request.family("serving_kit_request_seconds", "Arrival to answer, answered requests."),
            ]
        yield from families

    def _slot(self, now: float) -> Slot:
        """The slot of `now`. Threads disagree by microseconds: a late record goes into the newest."""
        second = math.floor(now)
        if not self._slots or self._slots[-1].second < second:
            self._slots.append(Slot(second))
        return self._slots[-1]


def _merge(counters: Iterator[Counter[Any]]) -> Counter[Any]:
    total: Counter[Any] = Counter()
    for counter in counters:
        total.update(counter)
    return total


def _percentiles(counts: Counter[int]) -> dict[str, float | None]:
    values = {"p50": quantile(counts, 0.5), "p95": quantile(counts, 0.95), "p99": quantile(counts, 0.99)}
    return {name: None if value is None else round(value * 1e3, 3) for name, value in values.items()}


def _point(slot: Slot) -> dict[str, Any]:
    shed = slot.outcomes[Outcome.SHED]
    return {
        "second": slot.second,
        "arrivals": slot.arrivals,
        "ok": slot.outcomes[Outcome.OK],
        "shed": shed,
        "expired": slot.outcomes[Outcome.EXPIRED],
        "failed": slot.outcomes[Outcome.FAILED],
        "unavailable": slot.outcomes[Outcome.UNAVAILABLE],
        "other": slot.outcomes.total()
        - shed
        - slot.outcomes[Outcome.UNAVAILABLE]
        - slot.outcomes[Outcome.OK]
        - slot.outcomes[Outcome.EXPIRED]
        - slot.outcomes[Outcome.FAILED],
        "queue_depth": slot.depth,
        "in_flight": max(slot.in_flight, slot.depth),
        "sizes": {str(size): count for size, count in sorted(slot.sizes.items())},
        "reasons": {reason.value: count for reason, count in slot.reasons.items()},
        "padding": round(1 - slot.tokens / slot.padded_tokens, 4) if slot.padded_tokens else None,
        "busy": min(1.0, slot.busy),
        "samples": slot.latency.total(),
        "latency_ms": _percentiles(slot.latency),
        "queue_wait_ms": _percentiles(slot.queue_wait),
        "forward_ms": _percentiles(slot.forward),
    }
