"""What is refused teaches nothing, so no learned cost may keep itself wrong. Simulated; nothing sleeps.

Each run is compared with an oracle: the same scheduler with a cost that is the truth at every moment.
"""

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_kit.scheduling import scheduler as scheduler_module
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.scheduler import Decision, Drop, Item, Scheduler
from serving_kit.settings import Settings
from tests.simulate import Outcome, TrueCost, lognormal, simulate

pytestmark = pytest.mark.light

CPU = (0.003, 150e-6)  # seconds per call and per token; 86 texts a second one by one


def from_then_on(start: float, factor: float, end: float = 1e9) -> Callable[[float], float]:
    return lambda now: factor if start <= now < end else 1.0


def run(seconds: float, a: float, b: float, **more: Any) -> tuple[Outcome, Outcome]:
    """The scheduler that has to learn, and the oracle."""
    length = more.pop("length", None)

    def once(cost: CostModel) -> Outcome:
        lengths = length and length(random.Random(5))
        return simulate(seconds, a, b, cost=cost, length=lengths or (lambda: 1), noise=0.05, **more)

    return once(more.pop("cost", CostModel())), once(TrueCost(a, b))


# -- batches of one must not be the end of it ------------------------------------------------------


@pytest.mark.parametrize(("call_s", "rate"), [(2.5, 2.0), (4.0, 1.5)])
def test_slow_function_gets_larger_batches(call_s: float, rate: float) -> None:
    """One size has been seen, and nothing says yet what a second item would cost."""
    mine, oracle = run(120, call_s, 0.0, rate=rate, timeout=10)
    assert mine.count("ok") >= 0.9 * oracle.count("ok")
    assert sum(mine.sizes) / len(mine.sizes) >= 3


def test_function_that_takes_its_time_per_item_is_found_out_by_one_larger_batch() -> None:
    mine, oracle = run(120, 0.0, 2.5, rate=2, timeout=10)
    assert mine.count("ok") >= 0.75 * oracle.count("ok")
    assert mine.count("late") <= 6


def test_token_budget_comes_back_after_a_slow_time() -> None:
    """Only small batches were run for long, and then a call costs nearly all of the time."""
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
    assert not mine.doubts, "it was learned, not given up"


@pytest.mark.parametrize("factor", [2, 10, 50])
def test_slow_down_of_texts_passes(factor: float) -> None:
    mine, oracle = run(90, *CPU, rate=344, timeout=1, length=lognormal, slowness=from_then_on(30, factor, 60))
    assert mine.count("ok", 30) >= 0.9 * oracle.count("ok", 30)
    assert mine.count("ok", 61) >= 0.9 * oracle.count("ok", 61)


@pytest.mark.parametrize("factor", [1 / 2, 1 / 10, 1 / 50])
def test_speed_up_is_learned(factor: float) -> None:
    a, b = CPU
    mine, oracle = run(
        60, 10 * a, 10 * b, rate=86, timeout=1, length=lognormal, slowness=from_then_on(30, factor)
    )
    assert mine.count("ok", 30) >= 0.9 * oracle.count("ok", 30)


@pytest.mark.parametrize(
    ("seldom", "rate", "timeout"), [((0.2, 40), 30, 2), ((0.5, 40), 30, 2), ((0.2, 200), 10, 1)]
)
def test_model_with_two_speeds(seldom: tuple[float, float], rate: float, timeout: float) -> None:
    """In the last case the slow speed is beyond the timeout, and must not have everything refused."""
    mine, oracle = run(100, 0.01, 0.0, rate=rate, timeout=timeout, seldom=seldom)
    assert mine.count("ok") >= 0.85 * oracle.count("ok")


def test_one_hiccup_moves_little() -> None:
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
def test_cost_follows_any_changes_and_stays_finite(
    start: float, factors: list[float], noise: float, seed: int
) -> None:
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


def test_burst_after_quiet_is_not_priced_at_batches_of_one() -> None:
    """Three calls from a cell, then 32 clients at once: the shape of a demonstration."""
    mine, _ = run(40, 1.0, 0.0, bursts=[(1, 1), (4, 1), (7, 1), (12, 32)], timeout=10)
    assert mine.count("ok") == 35


@pytest.mark.parametrize("quiet_calls", [0, 1, 3, 20])
def test_burst_of_two_hundred(quiet_calls: int) -> None:
    """Sizes double from one batch to the next, so 62 are answered in five calls, and 32 in each more."""
    calls = [(3.0 * n, 1) for n in range(quiet_calls)]
    mine, oracle = run(90, 1.0, 0.0, bursts=[*calls, (70, 200)], timeout=10)
    assert mine.count("ok") >= 0.9 * oracle.count("ok")


@pytest.mark.parametrize("hiccup", [False, True])
@pytest.mark.parametrize("timeout", [2.0, 10.0])
def test_cold_start_refuses_nothing_that_there_is_time_for(timeout: float, hiccup: bool) -> None:
    """Warming up has shown a few tiny batches, some of them while another process had the core."""
    a, b = 0.005, 200e-6
    warm = CostModel()
    for tokens, slow in ((4, 1), (37, 50), (16, 1), (148, 11), (64, 1)):
        warm.observe(tokens, (a + b * tokens) * (slow if hiccup else 1))
    mine, _ = run(20, a, b, bursts=[(0.01, 32)], rate=40, timeout=timeout, length=lognormal, cost=warm)
    assert mine.count("refused") == mine.count("shed") == mine.count("late") == 0


# -- what the owner is told, and clients ---------------------------------------------------------------


class Stubborn(CostModel):
    """Believes that the queue takes sixty times as long, until it is told to forget that."""

    convinced = True

    def drain(self, *args: Any, **more: Any) -> float:
        """What it believes."""
        return super().drain(*args, **more) * (60 if self.convinced else 1)

    def relearn(self) -> None:
        super().relearn()
        self.convinced = False


def test_watchdog_gives_up_a_cost_whose_refusals_were_wrong() -> None:
    mine, oracle = run(60, 0.01, 0.0, rate=60, timeout=2, max_batch_size=1, cost=Stubborn())
    assert len(mine.doubts) == 1
    assert "refused requests could have been answered" in mine.doubts.pop()
    assert mine.count("ok", 30) >= 0.95 * oracle.count("ok", 30)
    assert mine.count("refused") > 0


class Credulous(CostModel):
    """Believes that every call takes no time, until it is told to forget that."""

    convinced = True

    def seconds(self, padded_tokens: float) -> float:
        """What it believes."""
        return 1e-6 if self.convinced else super().seconds(padded_tokens)

    def relearn(self) -> None:
        super().relearn()
        self.convinced = False


def test_watchdog_gives_up_a_cost_that_makes_batches_late() -> None:
    mine, oracle = run(60, 0.4, 0.0, rate=10, timeout=1, max_batch_size=1, cost=Credulous())
    assert any("ended after the deadlines" in doubt for doubt in mine.doubts)
    assert mine.count("ok", 30) >= 0.8 * oracle.count("ok", 30)


def known(call_s: float) -> Scheduler:
    scheduler = Scheduler(Settings(timeout_ms=1000))
    for _ in range(10):
        scheduler.cost.observe(1, call_s)
    ask(scheduler, now=99.9 - call_s, timeout_s=1.0)
    scheduler.finished(99.9, ok=True)  # what it knows is fresh
    return scheduler


def ask(scheduler: Scheduler, *, now: float, timeout_s: float) -> Decision | bool:
    """What comes of an item on an idle server: refused as too short, or a decision."""
    item = Item(now, now + timeout_s, 1)
    refusal = scheduler.offer([item], now)
    if refusal is not None:
        return refusal.expired
    scheduler.ready(item, 1, "g")
    return scheduler.poll(now)


@pytest.mark.parametrize("timeout_s", [0.0, 1e-6, 0.05])
def test_client_that_gives_less_time_than_a_call_takes_is_told_so(timeout_s: float) -> None:
    assert ask(known(call_s=0.1), now=100.0, timeout_s=timeout_s) is True


@pytest.mark.parametrize("asked_s", [0.6, 1.0])
@pytest.mark.parametrize("start", [0.0, 1e5 + 1 / 3])
def test_short_timeouts_do_not_keep_an_outdated_cost(asked_s: float, start: float) -> None:
    """Calls took 3 s for a while, and are instant again: one try per timeout finds that out."""
    scheduler = Scheduler(Settings(timeout_ms=1000))
    for _ in range(10):
        scheduler.cost.observe(1, 3.0)
    answered, now = 0, start
    for _ in range(100):
        now += 0.25
        item = Item(now, now + asked_s, 1)
        if scheduler.offer([item], now) is None:
            scheduler.ready(item, 1, "g")
            if scheduler.poll(now).batch is not None:
                scheduler.finished(now + 0.001, ok=True)
                answered += 1
    assert answered >= 80


def test_servers_own_timeout_is_not_the_clients_mistake() -> None:
    """The deadline is a sum of floats: it may be a rounding error short of the server's timeout."""
    for start in (0.0, 1e5 + 1 / 3, 123456.789):
        scheduler = Scheduler(Settings(timeout_ms=700))
        for _ in range(10):
            scheduler.cost.observe(1, 3.0)
        first, second = Item(start, start + 0.7, 1), Item(start + 0.01, start + 0.71, 1)
        assert scheduler.offer([first], start) is None, "nothing has run yet: a try"
        scheduler.ready(first, 1, "g")
        assert scheduler.poll(start).batch is not None
        refusal = scheduler.offer([second], start + 0.01)
        assert refusal is not None
        assert not refusal.expired


def test_many_hopeless_items_are_dropped_in_one_look_at_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = []
    cut = scheduler_module.cheapest_cuts
    monkeypatch.setattr(scheduler_module, "cheapest_cuts", lambda *args: cuts.append(1) or cut(*args))
    scheduler = Scheduler(Settings(timeout_ms=1000, max_queue_size=1000))
    items = [Item(0.0, 1.0, 1 + n % 50) for n in range(200)]
    assert scheduler.offer(items, 0.0) is None
    for item in items:
        scheduler.ready(item, item.tokens, "g")
    for tokens in (1, 10, 50, 1, 10, 50, 1, 10):
        scheduler.cost.observe(tokens, 0.2 + 0.001 * tokens)
    assert scheduler.poll(0.1).batch is not None
    scheduler.finished(0.9, ok=True)
    cuts.clear()
    assert len(scheduler.poll(0.9).dropped) > 100
    assert len(cuts) <= 1


def test_batch_that_took_no_time_by_the_clock_is_no_error() -> None:
    scheduler = known(call_s=0.1)
    scheduler.settings = Settings(timeout_ms=1000, max_batch_size=1)
    for _ in range(2):
        item = Item(100.0, 101.0, 1)
        assert scheduler.offer([item], 100.0) is None
        scheduler.ready(item, 1, "g")
    assert scheduler.poll(100.0).batch is not None
    scheduler.finished(100.0, ok=True)


def test_hopeless_items_are_dropped_with_the_time_to_try_again() -> None:
    scheduler = known(call_s=0.3)
    first, second = Item(100.0, 101.0, 1), Item(100.0, 100.45, 1)
    for item in (first, second):
        scheduler.offer([item], 100.0)
        scheduler.ready(item, 1, "g")
    scheduler.settings = Settings(timeout_ms=1000, max_batch_size=1)
    assert scheduler.poll(100.0).batch is not None
    scheduler.finished(100.3, ok=True)
    more = Item(100.3, 101.3, 1)
    scheduler.offer([more], 100.3)
    decision = scheduler.poll(100.3)
    assert decision.dropped == ((second, Drop.HOPELESS),)
    assert decision.retry_after == pytest.approx(0.3, rel=0.2)
