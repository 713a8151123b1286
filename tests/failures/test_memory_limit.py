"""The memory limit: it is found a handful of times a day, and most of the memory is used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_kit.failures.memory_limit import MemoryLimit
from serving_kit.items import Item
from serving_kit.model import Layout
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.scheduler import Scheduler
from serving_kit.settings import Settings

pytestmark = pytest.mark.light


def fill(scheduler: Scheduler, lengths: Sequence[int], now: float) -> list[Item]:
    items = [Item(now, now + 1e6, length) for length in lengths]
    for item in items:
        assert scheduler.offer([item], now) is None
        scheduler.ready(item, item.tokens, "g")
    return items


def day_at_full_load(capacity: int, length: int, seconds: float = 86_400) -> tuple[int, float]:
    """Steps that did not fit, and the mean share of the possible size of those that did."""
    scheduler = Scheduler(Settings(max_batch_size=64, group_by_length=False, drop_hopeless=False))
    exceeded, shares, now = 0, [], 0.0
    while now < seconds:
        fill(scheduler, [length] * (64 - scheduler.queue_depth), now)
        batch = scheduler.poll(now).batch
        assert batch is not None
        scheduler.finished(now, ok=True)
        if batch.computed_tokens > capacity:
            exceeded += 1
            least = batch.computed_tokens
            while least / 2 > capacity:
                least //= 2
            scheduler.memory_limit.exceeded(length, least, now)
        else:
            shares.append(batch.computed_tokens / capacity)
        now += 30.0
    return exceeded, sum(shares) / len(shares)


@pytest.mark.parametrize("capacity", [64 * 10 - 1, 33 * 10, 20 * 10, 7 * 10])
def test_a_day_at_full_load(capacity: int) -> None:
    exceeded, share = day_at_full_load(capacity, 10)
    assert 1 <= exceeded <= 14
    assert share > 0.6


def test_tried_again_after_a_period_that_doubles() -> None:
    limit = MemoryLimit()
    assert limit.limit(8, 0.0) == math.inf
    limit.exceeded(8, 1000, 0.0)
    assert [limit.limit(8, t) for t in (0.0, 150.0, 299.9)] == pytest.approx([500, 750, 1000], abs=1)
    assert limit.limit(8, 300.0) == math.inf
    assert (limit.lowest(0.0), limit.lowest(300.0)) == (500, None)
    limit.exceeded(8, 1000, 310.0)
    assert limit.limit(8, 310.0 + 599) < 1000
    assert limit.limit(8, 310.0 + 600) == math.inf


def test_one_limit_where_the_model_packs() -> None:
    """There are no rows of one length: what counts is the sum."""
    limit = MemoryLimit(packed=True)
    limit.exceeded(500, 8000, 0.0)
    assert [limit.limit(length, 0.0) for length in (1, 500, 5000)] == [4000] * 3


def test_shorter_items_may_have_more() -> None:
    limit = MemoryLimit()
    limit.exceeded(500, 8000, 0.0)
    assert limit.limit(500, 0.0) == limit.limit(5000, 0.0) == 4000
    assert limit.limit(100, 0.0) == math.inf
    limit.exceeded(10, 2000, 0.0)
    assert limit.limit(500, 0.0) == limit.limit(10, 0.0) == 1000


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=60),
    exceeded=st.lists(st.tuples(st.integers(1, 600), st.integers(2, 20_000)), max_size=4),
    by_length=st.booleans(),
    packed=st.booleans(),
)
def test_no_batch_exceeds_it(
    lengths: list[int], exceeded: list[tuple[int, int]], by_length: bool, packed: bool
) -> None:
    """And the oldest item is in the batch all the same."""
    cost = CostModel(packed=packed)
    for timing in [(100, 0.01), (200, 0.02), (400, 0.04)]:
        cost.observe(*timing)
    scheduler = Scheduler(Settings(group_by_length=by_length), cost, Layout(packed))
    for longest, padded in exceeded:
        scheduler.memory_limit.exceeded(longest, padded, 0.0)
    oldest, *_ = fill(scheduler, lengths, 0.0)
    batch = scheduler.poll(0.0).batch
    assert batch is not None
    assert oldest in batch.items
    longest = max(item.tokens for item in batch.items)
    assert len(batch.items) == 1 or batch.computed_tokens <= scheduler.memory_limit.limit(longest, 0.0)


def test_items_that_go_on_keep_the_others_out() -> None:
    """An item does not join a step that would not fit."""
    scheduler = Scheduler(Settings())
    (first,) = fill(scheduler, [10], 0.0)
    assert scheduler.poll(0.0).batch is not None
    scheduler.finished(0.1, ok=True, continuing=[first])
    scheduler.memory_limit.exceeded(10, 30, 0.1)
    fill(scheduler, [10], 0.1)
    batch = scheduler.poll(0.1).batch
    assert batch is not None
    assert batch.items == (first,)
