"""Counters and windows of one server, kept by observing its records; read as `Statistics` and by Prometheus.

Every second has a slot with what ended in it: outcomes, batches, and durations as counts of logarithmic
buckets (`durations.py`). A window is a sum of slots.

Records may come from any thread. One lock guards everything and is held for microseconds.

Not here: tokens (`token_metrics.py`), the values that are read (`status.py`), their JSON (`stats_json.py`),
where they are served (`http/routes.py`).
"""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
)

from serving_kit.durations import HISTORY_S, WINDOW_S, Histogram, bucket, merged, percentiles
from serving_kit.model import FailureKind
from serving_kit.records import (
    BatchReason,
    BatchRecord,
    Drop,
    DropRecord,
    Outcome,
    RequestRecord,
    TokensRecord,
)
from serving_kit.status import Load, Second, SettingsChange, Statistics, Tokens, Window
from serving_kit.token_metrics import TokenMetrics

E = TypeVar("E", Outcome, BatchReason, Drop, FailureKind)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_KEPT_CHANGES = 200
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(slots=True)
class Slot:
    """What happened in one second."""

    second: int  # of the service's clock
    arrivals: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    latency: Counter[int] = field(default_factory=Counter)  # buckets, answered requests only
    queue_time: Counter[int] = field(default_factory=Counter)
    model_time: Counter[int] = field(default_factory=Counter)  # per batch
    sizes: Counter[int] = field(default_factory=Counter)  # batch size: batches
    reasons: Counter[BatchReason] = field(default_factory=Counter)  # why they were sent: batches
    tokens: int = 0  # of models that pad
    padded_tokens: int = 0
    busy_s: float = 0.0  # in which the model ran
    depth: int = 0  # highest queue depth seen
    in_flight: int = 0  # most items admitted and not answered
    last_depth: int = 0  # queue depth seen last: what a second without events after this one still has
    summary: Second | None = None  # once the second is over


def gauge(name: str, text: str, *samples: tuple[Mapping[str, str], float]) -> Metric:
    """A gauge with one value for each set of labels; all sets have the same names."""
    names = list(samples[0][0])
    family = GaugeMetricFamily(name, text, labels=names)
    for labels, value in samples:
        family.add_metric([labels[each] for each in names], float(value))
    return family


def _counter(name: str, text: str, label: str, members: type[E], counts: Counter[E]) -> Metric:
    """A counter with one value for each member of an enum."""
    family = CounterMetricFamily(name, text, labels=[label])
    for member in members:
        family.add_metric([member.value], counts[member])
    return family


class Metrics:
    """The numbers of one server. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: deque[Slot] = deque(maxlen=HISTORY_S)
        self._newest = Slot(0)  # the last of the slots, once there is one
        self._newest_ends = -math.inf
        self._changes: deque[tuple[float, Mapping[str, object]]] = deque(maxlen=_KEPT_CHANGES)
        self._outcomes: Counter[Outcome] = Counter()
        self._reasons: Counter[BatchReason] = Counter()
        self._faults: Counter[FailureKind] = Counter()
        self._items = 0
        self._wasted_items = 0
        self._dropped: Counter[Drop] = Counter()
        self._shared_items = 0
        self._tokens = TokenMetrics()
        self._latency_s = Histogram(_SECONDS)
        self._queue_time_s = Histogram(_SECONDS)
        self._model_time_s = Histogram(_SECONDS)
        self._sizes = Histogram(_SIZES)

    # -- observing -------------------------------------------------------------------------------

    def add_arrival(self, now: float, queue_depth: int, in_flight: int = 0) -> None:
        """A request has arrived while `in_flight` items were admitted, of which `queue_depth` waited."""
        with self._lock:
            slot = self._slot(now)
            slot.arrivals += 1
            slot.last_depth = queue_depth
            slot.depth = max(slot.depth, queue_depth)
            slot.in_flight = max(slot.in_flight, in_flight)

    def add_request(self, record: RequestRecord) -> None:
        """A request has ended."""
        outcome, queue_time_s = record.outcome, record.queue_wait_s
        with self._lock:
            self._outcomes[outcome] += 1
            slot = self._slot(record.finished)
            slot.outcomes[outcome] += 1
            if outcome is Outcome.OK:
                latency_s = record.latency
                slot.latency[bucket(latency_s)] += 1
                self._latency_s.add(latency_s)
            if queue_time_s is not None:
                slot.queue_time[bucket(queue_time_s)] += 1
                self._queue_time_s.add(queue_time_s)

    def add_batch(self, record: BatchRecord) -> None:
        """A batch has ended."""
        model_time_s, size = record.model_time_s, record.size
        with self._lock:
            self._reasons[record.reason] += 1
            self._items += size
            self._wasted_items += record.wasted
            slot = self._slot(record.finished)
            slot.sizes[size] += 1
            slot.reasons[record.reason] += 1
            slot.model_time[bucket(model_time_s)] += 1
            if not record.packed:
                slot.tokens += record.tokens
                slot.padded_tokens += record.computed_tokens
            slot.busy_s += model_time_s
            slot.last_depth = record.left_waiting
            slot.depth = max(slot.depth, record.left_waiting + size)
            slot.in_flight = max(slot.in_flight, record.left_waiting + size)
            self._model_time_s.add(model_time_s)
            self._sizes.add(size)

    def add_drop(self, record: DropRecord) -> None:
        """An admitted item has ended without an answer, for lack of time."""
        with self._lock:
            self._dropped[record.reason] += 1

    def add_tokens(self, record: TokensRecord) -> None:
        """A step of continuous batching has ended."""
        with self._lock:
            self._tokens.add(record)

    def add_evicted(self, sequences: int) -> None:
        """Sequences have given their caches back to others."""
        with self._lock:
            self._tokens.add_evicted(sequences)

    def add_failure(self, fault: FailureKind) -> None:
        """Something went wrong on the model thread."""
        with self._lock:
            self._faults[fault] += 1

    def add_shared(self, items: int) -> None:
        """So many inputs have joined the computation of an equal one."""
        with self._lock:
            self._shared_items += items

    def add_change(self, now: float, settings: Mapping[str, object]) -> None:
        """Settings were changed to these values."""
        with self._lock:
            self._changes.append((now, settings))

    # -- reading ---------------------------------------------------------------------------------

    def requests(self) -> int:
        """How many requests have ended."""
        with self._lock:
            return self._outcomes.total()

    def statistics(self, now: float, series: int = 0, load: Load | None = None) -> Statistics:
        """The totals and the last `WINDOW_S` seconds.

        Args:
            now: On the clock of the records.
            series: Add an entry for each of the last so many seconds, at most `HISTORY_S`, and the changes
                of settings.
            load: What is waiting and in flight at `now`, for the last of these entries.
        """
        with self._lock:
            return Statistics(
                requests=_by_member(Outcome, self._outcomes),
                batches=_by_member(BatchReason, self._reasons),
                faults=_by_member(FailureKind, self._faults),
                items=self._items,
                wasted_items=self._wasted_items,
                dropped_items=_by_member(Drop, self._dropped),
                shared_items=self._shared_items,
                tokens=self._tokens.totals(),
                window=self._window(now),
                series=self._series(now, min(series, HISTORY_S), load or Load(0, 0)),
                changes=tuple(SettingsChange(now - at, settings) for at, settings in self._changes)
                if series > 0
                else (),
            )

    def families(self, load: Load) -> Iterator[Metric]:
        """Everything since the start, as Prometheus metric families."""
        with self._lock:
            families = [
                _counter(
                    "serving_kit_requests", "Requests by how they ended.", "outcome", Outcome, self._outcomes
                ),
                _counter(
                    "serving_kit_batches",
                    "Batches by why they were sent.",
                    "reason",
                    BatchReason,
                    self._reasons,
                ),
                _counter(
                    "serving_kit_faults",
                    "What went wrong in the model or around it.",
                    "kind",
                    FailureKind,
                    self._faults,
                ),
                _counter(
                    "serving_kit_dropped",
                    "Items that were admitted, and ended without an answer for lack of time.",
                    "reason",
                    Drop,
                    self._dropped,
                ),
                CounterMetricFamily(
                    "serving_kit_wasted_items",
                    "Items run for no answer: the client had left, or the deadline had passed.",
                    value=self._wasted_items,
                ),
                CounterMetricFamily(
                    "serving_kit_shared_items",
                    "Inputs that joined the computation of an equal one, and were not queued.",
                    value=self._shared_items,
                ),
                gauge("serving_kit_queue_depth", "Items that wait.", ({}, load.queue_depth)),
                gauge("serving_kit_in_flight", "Items admitted and not yet answered.", ({}, load.in_flight)),
                self._sizes.family("serving_kit_batch_size", "Items per step."),
                self._queue_time_s.family("serving_kit_queue_wait_seconds", "Arrival to start of the batch."),
                self._model_time_s.family("serving_kit_forward_seconds", "Duration of a batch."),
                self._latency_s.family(
                    "serving_kit_request_seconds", "Arrival to answer, answered requests."
                ),
                *self._tokens.families(),
            ]
        yield from families

    def _window(self, now: float) -> Window:
        slots = [slot for slot in self._slots if slot.second > now - WINDOW_S]
        first = self._slots[0].second if self._slots else now
        duration_s = max(1.0, min(WINDOW_S, now - first))
        latency = merged(slot.latency for slot in slots)
        sizes = merged(slot.sizes for slot in slots)
        batches = sizes.total()
        return Window(
            duration_s=duration_s,
            arrivals_per_s=sum(slot.arrivals for slot in slots) / duration_s,
            answers_per_s=sum(slot.outcomes[Outcome.OK] for slot in slots) / duration_s,
            batches_per_s=batches / duration_s,
            batch_size_mean=sum(size * count for size, count in sizes.items()) / batches if batches else None,
            batch_size_max=max(sizes, default=None),
            padding=_padding(sum(slot.tokens for slot in slots), sum(slot.padded_tokens for slot in slots)),
            busy=min(1.0, sum(slot.busy_s for slot in slots) / duration_s),
            samples=latency.total(),
            latency=percentiles(latency),
            queue_time=percentiles(merged(slot.queue_time for slot in slots)),
            model_time=percentiles(merged(slot.model_time for slot in slots)),
            tokens=self._tokens.window(now),
        )

    def _series(self, now: float, seconds: int, load: Load) -> tuple[Second, ...]:
        """One entry for each of the last seconds, also for those without events."""
        slots = {slot.second: slot for slot in self._slots}
        last = math.floor(now)
        series, depth = [], 0
        for second in range(last - seconds + 1, last + 1):
            slot = slots.get(second) or Slot(second, depth=depth, last_depth=depth)
            depth = slot.last_depth
            # A second that is over does not change; a late record may still reach the one before.
            summary = slot.summary or _summary(
                slot, load if second == last else Load(0, 0), self._tokens.second(second)
            )
            if second < last - 1:
                slot.summary = summary
            series.append(summary)
        return tuple(series)

    def _slot(self, now: float) -> Slot:
        """The slot of `now`. Threads disagree by microseconds: a late record goes into the newest."""
        if now >= self._newest_ends:
            self._newest = Slot(math.floor(now))
            self._newest_ends = self._newest.second + 1
            self._slots.append(self._newest)
        return self._newest


def _summary(slot: Slot, load: Load, tokens: Tokens | None) -> Second:
    depth = max(slot.depth, load.queue_depth)
    return Second(
        second=slot.second,
        arrivals=slot.arrivals,
        outcomes=dict(slot.outcomes),
        queue_depth=depth,
        in_flight=max(slot.in_flight, slot.depth, load.in_flight),
        sizes=dict(sorted(slot.sizes.items())),
        reasons=dict(slot.reasons),
        padding=_padding(slot.tokens, slot.padded_tokens),
        busy=min(1.0, slot.busy_s),
        samples=slot.latency.total(),
        latency=percentiles(slot.latency),
        queue_time=percentiles(slot.queue_time),
        model_time=percentiles(slot.model_time),
        tokens=tokens,
    )


def _by_member(members: type[E], counts: Counter[E]) -> dict[E, int]:
    """The counts with every member of the enum, in its order."""
    return {member: counts[member] for member in members}


def _padding(tokens: int, padded_tokens: int) -> float | None:
    return 1 - tokens / padded_tokens if padded_tokens else None
