"""Statistics from records: totals, windows, series, percentiles."""

import random
import tracemalloc

import pytest

from serving_kit.durations import HISTORY_S
from serving_kit.metrics import Metrics
from serving_kit.model import FailureKind
from serving_kit.records import BatchReason, BatchRecord, Drop, DropRecord, Outcome, RequestRecord
from serving_kit.status import Load, Percentiles

pytestmark = pytest.mark.light


def request(finished: float, latency: float = 0.01, outcome: Outcome = Outcome.OK) -> RequestRecord:
    return RequestRecord(finished - latency, finished, outcome, 1, latency / 2, latency / 4)


def batch(finished: float, size: int, reason: BatchReason = BatchReason.IDLE) -> BatchRecord:
    return BatchRecord(finished - 0.1, finished, size, size * 8, size * 10, reason, 0.0, 3, 1, True)


def test_window_without_samples() -> None:
    window = Metrics().statistics(100.0).window
    assert window.latency == Percentiles(None, None, None)
    assert window.batch_size_mean is None
    assert window.padding is None


def test_packed_steps_have_no_padding() -> None:
    metrics = Metrics()
    metrics.add_batch(BatchRecord(9.9, 10.0, 4, 40, 40, BatchReason.FULL, 0.0, 0, 0, True, packed=True))
    statistics = metrics.statistics(10.0, series=1)
    assert (statistics.window.padding, statistics.series[0].padding) == (None, None)


def test_dropped_items() -> None:
    metrics = Metrics()
    for reason in (Drop.EXPIRED, Drop.HOPELESS, Drop.HOPELESS):
        metrics.add_drop(DropRecord(10.0, 0.5, reason))
    statistics = metrics.statistics(10.0)
    assert statistics.dropped_items == {Drop.EXPIRED: 1, Drop.HOPELESS: 2}
    assert sum(statistics.requests.values()) == 0, "the outcomes of requests are counted apart"
    families = {family.name: family for family in metrics.families(Load(0, 0))}
    samples = families["serving_kit_dropped"].samples
    assert {(each.name, each.labels["reason"]): each.value for each in samples} == {
        ("serving_kit_dropped_total", "expired"): 1,
        ("serving_kit_dropped_total", "hopeless"): 2,
    }


def test_totals_and_window() -> None:
    """The window covers 30 s; the totals count from the start."""
    metrics = Metrics()
    for second in range(100):
        metrics.add_arrival(second, queue_depth=second)
        metrics.add_request(request(second, latency=0.001 * (second + 1)))
        metrics.add_batch(batch(second, 4))
    metrics.add_failure(FailureKind.MEMORY)
    statistics = metrics.statistics(99.5)
    assert metrics.requests() == statistics.requests[Outcome.OK] == 100
    assert statistics.items == 400
    assert statistics.wasted_items == 100
    assert statistics.batches[BatchReason.IDLE] == 100
    assert statistics.faults == {fault: int(fault is FailureKind.MEMORY) for fault in FailureKind}
    window = statistics.window
    assert window.samples == 30
    assert window.latency.p50_s == pytest.approx(0.085, rel=0.05)
    assert window.answers_per_s == window.arrivals_per_s == pytest.approx(1.0)
    assert window.batch_size_mean == 4
    assert window.padding == pytest.approx(0.2)


def test_latency_of_answers_only() -> None:
    """Requests that failed do not lower the latency."""
    metrics = Metrics()
    metrics.add_request(request(5.0, latency=1.0))
    for _ in range(50):
        metrics.add_request(request(5.0, latency=1e-4, outcome=Outcome.SHED))
    assert metrics.statistics(5.5).window.latency.p50_s == pytest.approx(1.0, rel=0.02)


def test_series_has_every_second() -> None:
    metrics = Metrics()
    metrics.add_request(request(10.2, outcome=Outcome.EXPIRED))
    metrics.add_batch(batch(13.9, 2))
    series = metrics.statistics(14.0, 5).series
    assert [each.second for each in series] == [10, 11, 12, 13, 14]
    assert [each.outcomes for each in series] == [{Outcome.EXPIRED: 1}, {}, {}, {}, {}]
    assert series[3].sizes == {2: 1}
    assert series[3].queue_depth == 5


def test_series_keeps_queue_depth() -> None:
    """A second without events has the queue that still waits behind a long model call."""
    metrics = Metrics()
    metrics.add_arrival(10.5, queue_depth=7)
    series = metrics.statistics(13.0, 5).series
    assert [each.queue_depth for each in series] == [0, 7, 7, 7, 7]


def test_last_second_has_current_load() -> None:
    metrics = Metrics()
    metrics.add_arrival(10.5, queue_depth=1, in_flight=2)
    before, last = metrics.statistics(11.0, 2, Load(queue_depth=4, in_flight=6)).series
    assert (before.queue_depth, before.in_flight) == (1, 2)
    assert (last.queue_depth, last.in_flight) == (4, 6)


def test_late_record_counts_in_newest_second() -> None:
    metrics = Metrics()
    metrics.add_request(request(11.0))
    metrics.add_request(request(10.9))
    assert [each.samples for each in metrics.statistics(11.5, 2).series] == [0, 2]


def test_changes_come_with_series() -> None:
    metrics = Metrics()
    metrics.add_change(10.0, {"max_batch_size": 8})
    assert metrics.statistics(12.0).changes == ()
    [change] = metrics.statistics(12.0, 1).changes
    assert (change.ago_s, change.settings) == (2.0, {"max_batch_size": 8})


def test_memory_is_bounded() -> None:
    """Memory depends neither on time nor on load."""
    metrics, dice = Metrics(), random.Random(1)

    def run(seconds: range) -> int:
        for second in seconds:
            for _ in range(5):
                metrics.add_request(request(second, latency=0.001 + dice.random()))
            metrics.add_change(second, {})
        assert len(metrics.statistics(seconds[-1], 10 * HISTORY_S).series) == HISTORY_S
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        once = run(range(HISTORY_S))
        assert run(range(HISTORY_S, 4 * HISTORY_S)) < 1.3 * once
    finally:
        tracemalloc.stop()
