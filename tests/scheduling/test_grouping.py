"""Which waiting items share a step: the cheapest cut by length, and first come, first served."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_kit.scheduling.grouping import cheapest_cuts, fifo_prefix, group_by_length
from tests.support_scheduling import item

pytestmark = pytest.mark.light

A, B = 0.004, 60e-6  # seconds per call and per padded token, as on a CPU


def cost_of(batches: list[list[int]], a: float, b: float) -> float:
    return sum(a + b * len(batch) * max(batch) for batch in batches)


def partitions(lengths: list[int]) -> list[list[list[int]]]:
    """All ways to put a handful of items into batches."""
    if not lengths:
        return [[]]
    first, *rest = lengths
    found = []
    for partition in partitions(rest):
        found.append([[first], *partition])
        found += [[*partition[:i], [first, *batch], *partition[i + 1 :]] for i, batch in enumerate(partition)]
    return found


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=7),
    most=st.integers(1, 7),
    budget=st.integers(1, 400),
    ratio=st.floats(0.1, 300),
)
@settings(deadline=None, max_examples=150)
def test_cheapest_cuts_of_all(lengths: list[int], most: int, budget: int, ratio: float) -> None:
    """[9] Dynamic programming equals brute force over every partition."""
    lengths.sort()
    cuts = cheapest_cuts(lengths, most, budget, ratio, 1.0)
    end, mine = len(lengths), []
    while end:
        mine.append(lengths[end - cuts[end] : end])
        end -= cuts[end]

    def allowed(batch: list[int]) -> bool:
        return len(batch) <= most and (len(batch) == 1 or len(batch) * max(batch) <= budget)

    assert all(map(allowed, mine))
    best = min(cost_of(p, ratio, 1.0) for p in partitions(lengths) if all(map(allowed, p)))
    assert cost_of(mine, ratio, 1.0) == pytest.approx(best)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40),
    most=st.integers(1, 10),
    budget=st.integers(1, 2000),
)
def test_never_slower_than_fifo(lengths: list[int], most: int, budget: int) -> None:
    """[9] On a queue to which nothing is added."""

    def total(grouped: bool) -> float:
        queue = [item(t, n) for t, n in enumerate(lengths)]
        seconds = 0.0
        while queue:
            batch = fifo_prefix(queue, most, budget)
            if grouped:
                batch = group_by_length(queue, most, budget, A, B)
            assert queue[0] in batch
            seconds += A + B * len(batch) * max(i.tokens for i in batch)
            queue = [i for i in queue if i not in batch]
        return seconds

    assert total(grouped=True) <= total(grouped=False) * (1 + 1e-9)


@given(lengths=st.lists(st.sampled_from([5, 5, 5, 80]), min_size=2, max_size=30), most=st.integers(1, 6))
def test_equal_lengths_in_order_of_arrival(lengths: list[int], most: int) -> None:
    """[8]"""
    queue = [item(t, n) for t, n in enumerate(lengths)]
    batch = group_by_length(queue, most, 10_000, A, B)
    for young in batch:
        for old in queue:
            assert old in batch or old.tokens != young.tokens or old.arrived > young.arrived


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), most=st.integers(1, 10))
def test_unknown_cost_is_fifo(lengths: list[int], most: int) -> None:
    queue = [item(t, n) for t, n in enumerate(lengths)]
    assert group_by_length(queue, most, 2000, 0.0, 0.0) == fifo_prefix(queue, most, 2000)


def test_a_single_item_always_fits() -> None:
    queue = [item(0.0, 50), item(0.0, 2)]
    assert [each.tokens for each in fifo_prefix(queue, 10, 5)] == [50]
    assert [each.tokens for each in group_by_length(queue, 10, 5, A, B)] == [50]
