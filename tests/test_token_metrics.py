"""Tokens and the times between them: totals, window, seconds, Prometheus."""

import pytest

from serving_kit.records import TokensRecord
from serving_kit.status import Percentiles, TokenTotals
from serving_kit.token_metrics import TokenMetrics

pytestmark = pytest.mark.light


def record(at: float, *, first: tuple[float, ...] = (), between: tuple[float, ...] = ()) -> TokensRecord:
    return TokensRecord(at, 100, len(first) + len(between), first, between)


def test_nothing_was_generated() -> None:
    metrics = TokenMetrics()
    assert metrics.totals() == TokenTotals(0, 0, 0)
    assert metrics.window(5.0).inter_token == Percentiles(None, None, None)
    assert metrics.second(5) is None


def test_rates_and_percentiles() -> None:
    """Per second of the last 30 s; the totals count from the start."""
    metrics = TokenMetrics()
    for second in range(60):
        metrics.add(record(second + 0.5, first=(0.2,), between=(0.05,) * 9))
    assert metrics.totals() == TokenTotals(6000, 600, 0)
    window = metrics.window(59.9)
    assert window.prompt_per_s == pytest.approx(100)
    assert window.generated_per_s == pytest.approx(10)
    assert window.first_token.p50_s == pytest.approx(0.2, rel=0.03)
    assert window.inter_token.p99_s == pytest.approx(0.05, rel=0.03)


def test_second() -> None:
    metrics = TokenMetrics()
    metrics.add(record(3.2, between=(0.1, 0.1)))
    metrics.add(record(3.4, between=(0.1,)))
    metrics.add(record(5.0, between=(0.3,)))
    third = metrics.second(3)
    assert third is not None
    assert (third.generated_per_s, third.prompt_per_s) == (3, 200)
    assert third.first_token.p50_s is None
    assert metrics.second(4) is None


def test_prometheus() -> None:
    metrics = TokenMetrics()
    metrics.add(record(1.0, first=(0.2,), between=(0.06, 0.4)))
    metrics.add_evicted(2)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in metrics.families()
        for sample in family.samples
    }
    assert samples["serving_kit_tokens_total", "prompt"] == 100
    assert samples["serving_kit_tokens_total", "generated"] == 3
    assert samples["serving_kit_evicted_sequences_total",] == 2
    assert samples["serving_kit_time_to_first_token_seconds_count",] == 1
    assert samples["serving_kit_inter_token_latency_seconds_bucket", "0.075"] == 1
    assert samples["serving_kit_inter_token_latency_seconds_sum",] == pytest.approx(0.46)
