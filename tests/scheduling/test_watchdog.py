"""A learned cost that is wrong is released."""

from __future__ import annotations

from typing import Any

import pytest

from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.scheduler import Scheduler
from serving_kit.scheduling.watchdog import Watchdog
from serving_kit.settings import Settings
from tests.support_scheduling import Outcome, TrueCost, item, simulate

pytestmark = pytest.mark.light


def run(seconds: float, call_s: float, cost: CostModel, **more: Any) -> tuple[Outcome, Outcome]:
    """The scheduler with this cost, and with one that is the truth at every moment."""
    load = {"max_batch_size": 1, "length": lambda: 1, "noise": 0.05, **more}
    return (
        simulate(seconds, call_s, 0.0, cost=cost, **load),
        simulate(seconds, call_s, 0.0, cost=TrueCost(call_s, 0.0), **load),
    )


class TooHighCost(CostModel):
    """Predicts sixty times the time for the queue, until it is released."""

    factor = 60

    def drain(self, *args: Any, **more: Any) -> float:
        return super().drain(*args, **more) * self.factor

    def relearn(self) -> None:
        super().relearn()
        self.factor = 1


def test_wrong_rejections() -> None:
    mine, oracle = run(60, 0.01, TooHighCost(), rate=60, timeout=2)
    assert len(mine.released) == 1
    assert "refused requests could have been answered" in mine.released.pop()
    assert mine.count("ok", 30) >= 0.95 * oracle.count("ok", 30)
    assert mine.count("rejected") > 0


class TooLowCost(CostModel):
    """Predicts that a step takes no time, until it is released."""

    wrong = True

    def seconds(self, computed_tokens: float) -> float:
        return 1e-6 if self.wrong else super().seconds(computed_tokens)

    def relearn(self) -> None:
        super().relearn()
        self.wrong = False


def test_late_batches() -> None:
    mine, oracle = run(60, 0.4, TooLowCost(), rate=10, timeout=1)
    assert any("ended after the deadlines" in why for why in mine.released)
    assert mine.count("ok", 30) >= 0.8 * oracle.count("ok", 30)


# -- the watchdog alone --------------------------------------------------------------------------------


def test_most_of_sixteen_batches_late() -> None:
    watchdog = Watchdog()
    for number in range(16):
        assert watchdog.assess(0.0) == ""
        watchdog.batch_done(late=number % 16 < 9)
    assert "ended after the deadlines" in watchdog.assess(5.0)
    assert watchdog.assess(5.0) == "", "it counts anew"
    assert "is learned again" in watchdog.reason(35.0)
    assert watchdog.reason(35.1) == ""


def test_half_of_sixteen_batches_late() -> None:
    watchdog = Watchdog()
    for number in range(64):
        watchdog.batch_done(late=number % 2 == 0)
        assert watchdog.assess(0.0) == ""


def refuse_and_answer(watchdog: Watchdog, answered_after_s: float) -> None:
    """A refusal that predicted 10 s for one item ahead, and 1 s more for its own."""
    ahead = object()
    watchdog.refused([ahead], 10.0, 1.0, 0.0)
    watchdog.item_done(ahead, answered_after_s)


@pytest.mark.parametrize(("answered_after_s", "wrong"), [(4.0, True), (5.0, False)])
def test_refusals_wrong_by_two(answered_after_s: float, wrong: bool) -> None:
    watchdog = Watchdog()
    for _ in range(8):
        refuse_and_answer(watchdog, answered_after_s)
    assert bool(watchdog.assess(0.0)) is wrong


def test_item_that_left_says_nothing() -> None:
    watchdog, ahead = Watchdog(), object()
    for _ in range(8):
        watchdog.refused([ahead], 10.0, 1.0, 0.0)
        watchdog.item_gone(ahead)
        watchdog.item_done(ahead, 0.1)
    assert watchdog.assess(0.0) == ""


def test_refusals_are_judged_after_items_that_generate() -> None:
    """Steps of items that go on teach no cost, so what ended in them judges no refusal, and holds up none."""
    scheduler = Scheduler(Settings(timeout_ms=10_000))
    first, waiting = item(0.0, 1), item(0.0, 1)
    for each in (first, waiting):
        assert scheduler.offer([each], 0.0) is None
        scheduler.ready(each, 1, "g")
    watchdog = scheduler._watchdog
    watchdog.refused([first, waiting], 1.0, 1.0, 0.0)
    assert scheduler.poll(0.0).batch is not None
    scheduler.finished(0.1, ok=True, continuing=[first])
    assert watchdog._ahead == set()
