"""The learned cost follows what happens, and never keeps itself wrong. Simulated; nothing sleeps.

Each run is compared with an oracle: the same scheduler with a cost that is the truth at every moment.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_kit.model import PADDED, Layout
from serving_kit.scheduling.cost import CostModel
from tests.support_scheduling import Outcome, TrueCost, lognormal, simulate

pytestmark = pytest.mark.light

CPU = (0.003, 150e-6)  # seconds per call and per token; 86 texts a second one by one
A, B = 0.004, 60e-6
PACKED = Layout(packed=True)


def from_then_on(start: float, factor: float, end: float = 1e9) -> Callable[[float], float]:
    return lambda now: factor if start <= now < end else 1.0


def run(seconds: float, a: float, b: float, **more: Any) -> tuple[Outcome, Outcome]:
    """The scheduler that has to learn, and the oracle."""
    length = more.pop("length", None)
    packed = more.get("layout", PADDED).packed

    def once(cost: CostModel) -> Outcome:
        lengths = length and length(random.Random(5))
        return simulate(seconds, a, b, cost=cost, length=lengths or (lambda: 1), noise=0.05, **more)

    return once(more.pop("cost", CostModel(packed=packed))), once(TrueCost(a, b, packed=packed))


# -- batches of one  ------------------------------------------------------


@pytest.mark.parametrize(("call_s", "rate"), [(2.5, 2.0), (4.0, 1.5)])
def test_slow_function_gets_larger_batches(call_s: float, rate: float) -> None:
    """One size has been seen, and nothing says yet what a second item would cost."""
    mine, oracle = run(120, call_s, 0.0, rate=rate, timeout=10)
    assert mine.count("ok") >= 0.9 * oracle.count("ok")
    assert sum(mine.sizes) / len(mine.sizes) >= 3


def test_function_with_a_cost_per_item() -> None:
    mine, oracle = run(120, 0.0, 2.5, rate=2, timeout=10)
    assert mine.count("ok") >= 0.75 * oracle.count("ok")
    assert mine.count("late") <= 6


def test_budget_after_a_slow_time() -> None:
    """Only small batches were run for long, and a call costs nearly all of the time."""
    cost = CostModel()
    for _ in range(2000):
        cost.observe(1, 2.5)
    assert cost.budget(10 / 3) == 2
    sizes = []
    for _ in range(6):
        sizes.append(cost.budget(10 / 3))
        cost.observe(sizes[-1], 2.5)
    assert sizes[-1] >= 64
    assert all(2 <= after / before <= 2.5 for before, after in itertools.pairwise(sizes))


# -- slower, faster, now and then --------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 5, 10, 20, 40, 50])
def test_lasting_slow_down_is_learned(factor: float) -> None:
    """At four times the load that the model could carry before."""
    mine, oracle = run(
        150, 0.01, 0.0, rate=400, timeout=1, max_batch_size=1, slowness=from_then_on(30, factor)
    )
    assert mine.count("ok", 30) >= 0.85 * oracle.count("ok", 30) > 0
    assert mine.count("late", 30) <= 12
    assert not mine.released, "it was learned, not released"


@pytest.mark.parametrize("layout", [PADDED, PACKED])
@pytest.mark.parametrize("factor", [2, 10, 50])
def test_slow_down_of_texts_passes(factor: float, layout: Layout) -> None:
    slowness = from_then_on(30, factor, 60)
    mine, oracle = run(90, *CPU, rate=344, timeout=1, length=lognormal, slowness=slowness, layout=layout)
    assert mine.count("ok", 30) >= 0.9 * oracle.count("ok", 30)
    assert mine.count("ok", 61) >= 0.9 * oracle.count("ok", 61)


@pytest.mark.parametrize("layout", [PADDED, PACKED])
@pytest.mark.parametrize("factor", [1 / 2, 1 / 10, 1 / 50])
def test_speed_up_is_learned(factor: float, layout: Layout) -> None:
    a, b = 10 * CPU[0], 10 * CPU[1]
    slowness = from_then_on(30, factor)
    mine, oracle = run(60, a, b, rate=86, timeout=1, length=lognormal, slowness=slowness, layout=layout)
    assert mine.count("ok", 30) >= 0.9 * oracle.count("ok", 30)


@pytest.mark.parametrize(
    ("seldom", "rate", "timeout"), [((0.2, 40), 30, 2), ((0.5, 40), 30, 2), ((0.2, 200), 10, 1)]
)
def test_model_with_two_speeds(seldom: tuple[float, float], rate: float, timeout: float) -> None:
    """In the last case the slow speed is beyond the timeout, and must not have everything rejected."""
    mine, oracle = run(100, 0.01, 0.0, rate=rate, timeout=timeout, seldom=seldom)
    assert mine.count("ok") >= 0.85 * oracle.count("ok")


def test_one_outlier_moves_little() -> None:
    cost = CostModel()
    for x in (10, 100, 500, 1000) * 10:
        cost.observe(x, 0.004 + 60e-6 * x)
    before = cost.seconds(500)
    cost.observe(500, 100 * before)
    assert cost.seconds(500) < 1.5 * before
    for _ in range(3):
        cost.observe(500, before)
    assert cost.seconds(500) == pytest.approx(before, rel=0.1)


@given(
    start=st.floats(1e-6, 100),
    factors=st.lists(st.sampled_from([1e-3, 0.02, 0.5, 1.0, 1.5, 40.0, 1e3]), min_size=1, max_size=8),
    noise=st.floats(0, 0.5),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=60)
def test_any_changes_of_speed(start: float, factors: list[float], noise: float, seed: int) -> None:
    """Level and shape determine each other's product only, so neither may run away."""
    dice, cost, speed = random.Random(seed), CostModel(), start
    for factor in factors:
        speed = min(max(speed * factor, 1e-7), 1e4)
        for _ in range(400):
            x = dice.randint(1, 2000)
            cost.observe(x, speed * (1 + x / 100) * math.exp(dice.gauss(0, noise)))
    assert cost.seconds(1000) == pytest.approx(11 * speed, rel=0.2 + 2 * noise)
    for x in (1, 1000, 1_000_000):
        assert math.inf > cost.high(x) >= cost.seconds(x) > 0
    assert 0.2 < cost.level < 5
    assert 1 <= cost.budget(1.0) <= 100_000_000
    assert math.isfinite(cost.drain(50, 5000, 32, 1.0))


# -- at the start, and after a quiet time ------------------------------------------------------------


def test_burst_after_a_quiet_time() -> None:
    """Three calls from a cell, then 32 clients at once: the shape of a demonstration."""
    mine, _ = run(40, 1.0, 0.0, bursts=[(1, 1), (4, 1), (7, 1), (12, 32)], timeout=10)
    assert mine.count("ok") == 35


@pytest.mark.parametrize("quiet_calls", [0, 1, 3, 20])
def test_burst_of_two_hundred(quiet_calls: int) -> None:
    """Sizes double from one batch to the next, so 62 are answered in five calls, and 32 in each more."""
    calls = [(3.0 * n, 1) for n in range(quiet_calls)]
    mine, oracle = run(90, 1.0, 0.0, bursts=[*calls, (70, 200)], timeout=10)
    assert mine.count("ok") >= 0.9 * oracle.count("ok")


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("timeout", [2.0, 10.0])
def test_cold_start_rejects_nothing(timeout: float, outlier: bool) -> None:
    """Warming up has shown a few tiny batches, some of them while another process had the core."""
    a, b = 0.005, 200e-6
    warm = CostModel()
    for tokens, slow in ((4, 1), (37, 50), (16, 1), (148, 11), (64, 1)):
        warm.observe(tokens, (a + b * tokens) * (slow if outlier else 1))
    mine, _ = run(20, a, b, bursts=[(0.01, 32)], rate=40, timeout=timeout, length=lognormal, cost=warm)
    assert mine.count("rejected") == mine.count("dropped") == mine.count("late") == 0


# -- the model itself ---------------------------------------------------------------------------------


@given(a=st.floats(1e-4, 0.1), b=st.floats(1e-7, 1e-3), seed=st.integers(0, 5))
@settings(deadline=None)
def test_noisy_batches(a: float, b: float, seed: int) -> None:
    dice = random.Random(seed)
    cost = CostModel()
    for _ in range(200):
        x = dice.randint(4, 3000)
        outlier = 2.0 if dice.random() < 0.005 else 1.0
        cost.observe(x, (a + b * x) * dice.gauss(1, 0.05) * outlier)
    for x in (50, 500, 2500):
        assert cost.seconds(x) == pytest.approx(a + b * x, rel=0.25)
        assert cost.high(x) >= cost.seconds(x)
    if cost.b > 0:  # else a token costs less than the noise would show, and there is no bound
        limit = cost.high(1000)
        budget = cost.budget(limit)
        assert budget >= 950, "a batch that is known to fit is allowed"
        assert a + b * budget <= 2 * limit, "at most twice as slow as asked"


# -- models that pack -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "tokens"),
    [(0.003, 150e-6, 647), (0.02, 50e-6, 12_933), (1e-5, 150e-6, 256), (1.0, 1e-3, 4_000)],
)
def test_size_of_a_pack(a: float, b: float, tokens: int) -> None:
    """The call is 3 % of it; at least 256 tokens; the time for a step bounds it, here at 5 s."""
    cost = CostModel(packed=True)
    for x in (10, 100, 1_000, 10_000, 20_000) * 40:
        cost.observe(x, a + b * x)
    assert tokens * 0.95 <= cost.budget(5.0) <= 2 * tokens


@pytest.mark.parametrize("size", [64, 256, 5000])
def test_packs_of_one_size_lock_nothing_in(size: int) -> None:
    """What they cost says nothing of the call: larger ones are tried, up to twice as large."""
    cost = CostModel(packed=True)
    for _ in range(300):
        cost.observe(size, 0.01 + 1e-4 * size)
    assert size < cost.budget(10.0) <= max(256, 2 * size)


@given(
    items=st.integers(1, 500),
    tokens=st.integers(1, 100_000),
    most=st.integers(1, 64),
    budget=st.integers(1, 5000),
)
def test_wait_in_whole_steps(items: int, tokens: int, most: int, budget: int) -> None:
    """Never less than the ideal drain, and less than one more call above it."""
    cost = TrueCost(*CPU, packed=True)
    wait_s, call_s = cost.wait(items, tokens, most, 10.0, budget), cost.wait(1, 0, 1, 10.0)
    ideal_s = cost.drain(items, tokens, most, 10.0, budget=budget, at_least=True)
    assert call_s == pytest.approx(CPU[0], rel=0.01)
    assert ideal_s * (1 - 1e-9) <= wait_s <= (ideal_s + call_s) * (1 + 1e-9)


def test_unknown_cost() -> None:
    cost = CostModel()
    assert (cost.known, cost.high(1e6), cost.budget(0.001)) == (False, 0.0, 100_000_000)


def test_twice_as_slow_after_eight_batches() -> None:
    cost = CostModel()
    for x in (10, 200, 1000, 50, 600):
        cost.observe(x, A + B * x)
    for _ in range(8):
        cost.observe(500, 2 * (A + B * 500))
    assert cost.seconds(500) == pytest.approx(2 * (A + B * 500), rel=0.2)


@pytest.mark.parametrize("x", [1, 500])
def test_batches_of_one_size(x: int) -> None:
    cost = CostModel()
    for _ in range(5):
        cost.observe(x, 0.03)
    assert cost.seconds(x) == pytest.approx(0.03, rel=0.05)
    assert cost.a > 0
    assert cost.b > 0


def test_impossible_observations() -> None:
    cost = CostModel()
    cost.observe(10, 0.0)
    cost.observe(0, 1.0)
    assert cost.observations == 0
    assert math.isfinite(cost.seconds(100))
