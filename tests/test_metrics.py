"""Numbers from records: windows, percentiles, counters."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.metrics import HISTORY_S, Metrics, bucket, quantile
from serving_kit.records import BatchReason, BatchRecord, Outcome, RequestRecord

pytestmark = pytest.mark.light


def request(finished: float, latency: float = 0.01, outcome: Outcome = Outcome.OK) -> RequestRecord:
    return RequestRecord(finished - latency, finished, outcome, 1, latency / 2, latency / 4)


def batch(finished: float, size: int, reason: BatchReason = BatchReason.IDLE) -> BatchRecord:
    return BatchRecord(finished - 0.1, finished, size, size * 8, size * 10, reason, 0.0, 3, 1, True)


@given(
    values=st.lists(st.floats(1e-6, 1000), min_size=1, max_size=200),
    q=st.sampled_from([0.0, 0.5, 0.95, 0.99]),
)
def test_a_quantile_is_within_two_percent_of_the_true_one(values: list[float], q: float) -> None:
    from collections import Counter

    counts = Counter(map(bucket, values))
    true = sorted(values)[int(q * (len(values) - 1))]
    assert quantile(counts, q) == pytest.approx(true, rel=0.021, abs=1e-6)


def test_without_samples_there_is_no_quantile() -> None:
    metrics = Metrics()
    window = metrics.snapshot(100.0)["window"]
    assert window["latency_ms"] == {"p50": None, "p95": None, "p99": None}
    assert window["batch_size_mean"] is None
    assert window["padding"] is None


def test_the_window_forgets_and_the_totals_do_not() -> None:
    metrics = Metrics()
    for second in range(100):
        metrics.add_arrival(second, queue_depth=second)
        metrics.add_request(request(second, latency=0.001 * (second + 1)))
        metrics.add_batch(batch(second, 4))
    snapshot = metrics.snapshot(99.5)
    assert snapshot["requests"]["ok"] == 100
    assert snapshot["items"] == 400
    assert snapshot["wasted_items"] == 100
    window = snapshot["window"]
    assert window["samples"] == 30
    assert window["latency_ms"]["p50"] == pytest.approx(85, rel=0.05)
    assert window["answers_per_s"] == pytest.approx(1.0)
    assert window["batch_size_mean"] == 4
    assert window["padding"] == pytest.approx(0.2)


def test_failures_do_not_pretty_the_latency() -> None:
    metrics = Metrics()
    metrics.add_request(request(5.0, latency=1.0))
    for _ in range(50):
        metrics.add_request(request(5.0, latency=1e-4, outcome=Outcome.SHED))
    assert metrics.snapshot(5.5)["window"]["latency_ms"]["p50"] == pytest.approx(1000, rel=0.02)


def test_the_series_has_every_second_also_the_silent_ones() -> None:
    metrics = Metrics()
    metrics.add_request(request(10.2, outcome=Outcome.EXPIRED))
    metrics.add_batch(batch(13.9, 2))
    series = metrics.series(14.0, 5)
    assert [point["second"] for point in series] == [10, 11, 12, 13, 14]
    assert [point["expired"] for point in series] == [1, 0, 0, 0, 0]
    assert series[3]["sizes"] == {"2": 1}
    assert series[3]["queue_depth"] == 5


def test_a_silent_second_still_has_the_queue_that_waits_behind_a_long_forward() -> None:
    metrics = Metrics()
    metrics.add_arrival(10.5, queue_depth=7)
    assert [point["queue_depth"] for point in metrics.series(13.0, 5)] == [0, 7, 7, 7, 7]


def test_memory_does_not_grow_with_time_or_load() -> None:
    metrics = Metrics()
    dice = random.Random(1)
    for second in range(3 * HISTORY_S):
        for _ in range(5):
            metrics.add_request(request(second, latency=dice.expovariate(10)))
    assert len(metrics._slots) == HISTORY_S
    assert len(metrics.series(3 * HISTORY_S, HISTORY_S)) == HISTORY_S
