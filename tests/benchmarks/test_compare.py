"""The statistics of `make bench BENCH_ARGS='--against COMMIT'`."""

from __future__ import annotations

import math
import random

import pytest

from tests.programs import load_program

pytestmark = pytest.mark.light
compare = load_program("benchmarks/compare.py")
OLD = [100.0, 110.0, 90.0, 105.0, 95.0]


def throughput(*ratios: float) -> object:
    new = [old * ratio for old, ratio in zip(OLD, ratios, strict=True)]
    return compare.Compared("no-op", compare.THROUGHPUT, new, OLD)


def test_interval_by_hand() -> None:
    # Logarithms -0.2, -0.1, 0, 0.1, 0.2: mean 0, s = sqrt(0.1/4) = 0.158114, 2.776 * s / sqrt(5) = 0.196293.
    each = compare.interval([math.exp(x) for x in (-0.2, -0.1, 0.0, 0.1, 0.2)])
    assert each.mean == pytest.approx(1)
    assert each.low == pytest.approx(math.exp(-0.196293), abs=1e-6)
    assert each.high == pytest.approx(math.exp(0.196293), abs=1e-6)


def test_interval_of_equal_ratios_is_a_point() -> None:
    each = compare.interval([0.5] * 5)
    assert each.low == pytest.approx(each.mean) == pytest.approx(each.high) == pytest.approx(0.5)


def test_interval_of_inverse_ratios() -> None:
    """Swapping the commits inverts the interval."""
    ratios = [0.9, 1.2, 1.0, 0.8, 1.1]
    there, back = compare.interval(ratios), compare.interval([1 / ratio for ratio in ratios])
    assert (back.low, back.high) == (pytest.approx(1 / there.high), pytest.approx(1 / there.low))


def test_interval_covers_the_mean_in_95_percent() -> None:
    rng = random.Random(1)
    covered = 0
    for _ in range(4000):
        each = compare.interval([math.exp(rng.gauss(0.0, 0.05)) for _ in range(5)])
        covered += each.low <= 1.0 <= each.high
    assert 0.94 < covered / 4000 < 0.96


@pytest.mark.parametrize("number", [0, 1, 4, 6])
def test_interval_needs_five_rounds(number: int) -> None:
    with pytest.raises(ValueError, match="needs 5 ratios"):
        compare.interval([1.0] * number)


def test_ratios_are_paired_by_round() -> None:
    assert throughput(0.9, 1.0, 1.1, 1.2, 1.3).ratios == pytest.approx([0.9, 1.0, 1.1, 1.2, 1.3])


def test_order_alternates() -> None:
    assert [compare.order(n)[0] for n in range(5)] == ["new", "old", "new", "old", "new"]
    assert all(sorted(compare.order(n)) == ["new", "old"] for n in range(5))


@pytest.mark.parametrize(
    ("ratios", "slower"),
    [
        ((0.95, 0.951, 0.949, 0.95, 0.95), True),
        ((0.98, 0.981, 0.979, 0.98, 0.98), False),
        ((0.5, 1.4, 0.6, 1.3, 0.7), False),  # a lower mean, but too uncertain
        ((1.2, 1.2, 1.2, 1.2, 1.2), False),
    ],
)
def test_verdict(ratios: tuple[float, ...], slower: bool) -> None:
    compared = throughput(*ratios)
    assert compared.slower is slower
    assert ("no-op" in compare.verdict([compared])) is slower


def test_latency_gives_no_verdict() -> None:
    """A p99 that falls to a half is no loss of speed."""
    assert not compare.Compared("no-op", compare.P99, [50.0] * 5, [100.0] * 5).slower


def test_report() -> None:
    text = compare.report([throughput(1.0, 1.1, 0.9, 1.0, 1.0)])
    row = next(line for line in text.splitlines() if line.startswith("| no-op"))
    assert row.split(" | ")[1:9] == ["answers/s", "100", "100", "1.000", "1.100", "0.900", "1.000", "1.000"]
    assert "0.998" in row, "the geometric mean"
    assert text.endswith("wholly below 0.97.")
