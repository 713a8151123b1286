"""The promises of the scheduler, as properties over random histories on a fake clock.

Numbers in brackets refer to the list of invariants that the design asks for.
"""

import itertools
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving_kit.records import BatchReason
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.scheduler import (
    Batch,
    Drop,
    Item,
    Refusal,
    Scheduler,
    State,
    cheapest_cuts,
    fifo_prefix,
    group_by_length,
)
from serving_kit.settings import Settings

pytestmark = pytest.mark.light

A, B = 0.004, 60e-6  # seconds per call and per padded token, as on a CPU


def true_cost(batch: Batch) -> float:
    return A + B * batch.padded_tokens


def taught(a: float = A, b: float = B) -> CostModel:
    cost = CostModel()
    for x in (10, 200, 1000, 50, 600):
        cost.observe(x, a + b * x)
    return cost


def item(arrived: float = 0.0, tokens: int = 10, *, timeout: float = 10.0, group: object = "g") -> Item:
    return Item(arrived, arrived + timeout, tokens, group=group)


class History(RuleBasedStateMachine):
    """Clients, a model that takes exactly its true cost, and somebody at the knobs."""

    exact_cost = False

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.knobs = Settings(timeout_ms=2000, max_queue_size=20, max_batch_size=4)
        self.scheduler = Scheduler(self.knobs, taught() if self.exact_cost else CostModel())
        self.items: list[Item] = []
        self.outcome: dict[int, str] = {}
        self.seen_running: Counter[int] = Counter()
        self.running: Batch | None = None
        self.wake_at: float | None = None
        self.last_start = 0.0
        self.shed = 0

    # -- what can happen ---------------------------------------------------------------------------

    @rule(
        tokens=st.lists(st.integers(1, 300), min_size=1, max_size=6),
        timeout=st.floats(0.001, 3.0),
        group=st.sampled_from(["g", "h"]),
        late=st.floats(0, 0.05),
        prepare=st.booleans(),
    )
    def arrive(self, tokens: list[int], timeout: float, group: str, late: float, prepare: bool) -> None:
        new = [Item(self.now - late, self.now - late + timeout, n) for n in tokens]
        refusal = self.scheduler.offer(new, self.now)
        self.items += new
        if refusal is not None:
            assert refusal.retry_after is None or refusal.retry_after >= 0
            for each in new:
                self.end(each, "shed")
        elif prepare:
            for each, n in zip(new, tokens, strict=True):
                self.scheduler.ready(each, n, group)
        self.poll()

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        alive = [i for i in self.items if id(i) not in self.outcome]
        if alive:
            gone = data.draw(st.sampled_from(alive))
            was = gone.state
            assert self.scheduler.cancel(gone)
            assert gone.state is (State.DONE if was is State.WAITING else State.RUNNING)
            self.end(gone, "cancelled")
        self.poll()

    @rule(seconds=st.floats(0.0001, 1.0))
    def time_passes(self, seconds: float) -> None:
        target = self.now + seconds
        while self.wake_at is not None and self.wake_at < target and self.running is None:
            self.now = max(self.now, self.wake_at)
            self.poll()
        self.now = target
        self.poll()

    @precondition(lambda self: self.running is not None)
    @rule(ok=st.booleans() | st.just(True))
    def batch_ends(self, ok: bool) -> None:
        assert self.running is not None
        self.now = max(self.now, self.last_start + true_cost(self.running))
        for each in self.running.items:
            if id(each) not in self.outcome:
                self.end(each, "ok" if ok else "failed")
        self.scheduler.finished(self.now, ok=ok)
        self.running = None
        self.poll()

    @rule(
        size=st.integers(1, 8),
        wait=st.floats(0, 100),
        budget=st.integers(1, 2000) | st.just("auto"),
        queue=st.integers(1, 30),
        timeout=st.floats(50, 3000),
        group=st.booleans(),
        drop=st.booleans(),
    )
    def tune(
        self, size: int, wait: float, budget: int, queue: int, timeout: float, group: bool, drop: bool
    ) -> None:
        """[16] Everything below holds whatever is changed, whenever."""
        self.scheduler.settings = Settings(
            max_batch_size=size,
            max_wait_ms=wait,
            max_batch_tokens=budget,
            max_queue_size=queue,
            timeout_ms=timeout,
            group_by_length=group,
            drop_hopeless=drop,
        )
        self.poll()

    # -- what must hold ------------------------------------------------------------------------------

    def end(self, each: Item, how: str) -> None:
        assert id(each) not in self.outcome, "two outcomes for one item [1]"
        self.outcome[id(each)] = how

    def prepare_all(self) -> None:
        while fresh := self.scheduler.unprepared():
            for each in fresh:
                self.scheduler.ready(each, each.tokens, "g")

    def poll(self) -> None:
        self.prepare_all()
        queue = list(self.scheduler._queue)
        knobs, budget = self.scheduler.settings, self.scheduler.token_budget()
        decision = self.scheduler.poll(self.now)
        self.wake_at = decision.wake_at
        for each, why in decision.dropped:
            assert why is Drop.HOPELESS or each.deadline <= self.now
            self.end(each, "expired" if why is Drop.EXPIRED else "shed")
        if self.running is not None:
            assert decision.batch is None, "a batch was cut while the model was busy"
            assert not decision.dropped
            return
        alive = [i for i in queue if i.state is not State.DONE]
        if decision.batch is None:
            self.check_wait(alive, knobs)
        else:
            self.check_batch(decision.batch, alive, knobs, budget)
            self.running, self.last_start = decision.batch, self.now

    def check_wait(self, alive: list[Item], knobs: Settings) -> None:
        if not alive:
            assert self.wake_at is None, "[17] nothing waits, so nobody may be woken"
            return
        assert self.wake_at is not None, "[3] work waits and nobody will be woken for it"
        assert self.wake_at > self.now
        oldest, scheduler = min(alive, key=lambda i: i.arrived), self.scheduler
        latest = oldest.arrived + knobs.max_wait_s
        if scheduler._lingers():  # a moment for those who were just answered: nothing restarts it either
            latest = max(latest, (scheduler._last_finished or 0) + scheduler._returning.gap)
        else:
            assert knobs.max_wait_ms > 0, "[3] an idle model must start at once"
        assert self.wake_at <= latest + 1e-9, "[4] one deadline, never restarted"

    def check_batch(self, batch: Batch, alive: list[Item], knobs: Settings, budget: int) -> None:
        items = batch.items
        assert 1 <= len(items) <= knobs.max_batch_size, "[2]"
        assert len(items) == 1 or batch.padded_tokens <= budget, "[2]"
        assert alive[0] in items, "[7] the oldest live item is in every batch"
        assert len({i.group for i in items}) == 1, "[13] other parameters, other batch"
        for each in items:
            self.seen_running[id(each)] += 1
            assert self.seen_running[id(each)] == 1, "[2] no item runs twice"
            assert each.deadline > self.now, "[5] expired items never start"
            assert id(each) not in self.outcome, "[5] neither do items that have ended"
        left = [i for i in alive if i not in items and i.group == items[0].group]
        for young, old in itertools.product(items, left):
            alike = young.tokens == old.tokens
            hasty = old.deadline < self.now + self.scheduler.cost.high(batch.padded_tokens)
            overtaken = alike and old.arrived < young.arrived
            assert not overtaken or hasty, "[8] equals: first come, first served"
        assert isinstance(batch.reason, BatchReason)

    @invariant()
    def every_item_is_somewhere(self) -> None:
        """[1, 12] Offered = ended + inside, and the queue stays in its bounds."""
        ended = len(self.outcome)
        heard = sum(id(i) not in self.outcome for i in self.running.items) if self.running else 0
        assert len(self.items) == ended + self.scheduler.queue_depth + heard
        assert self.scheduler._queued_tokens == sum(i.tokens for i in self.scheduler._queue)

    def teardown(self) -> None:
        """[15] After a drain nothing is left, and nothing new gets in."""
        self.scheduler.draining = True
        self.poll()
        assert isinstance(self.scheduler.offer([item(self.now)], self.now), Refusal)
        for _ in range(100):
            if self.running is None:
                break
            self.batch_ends(ok=True)
        assert self.scheduler.queue_depth == self.scheduler.in_flight == 0
        assert self.scheduler._queued_tokens == 0
        assert len(self.outcome) == len(self.items)


class HistoryOfKnownCost(History):
    """[6] With a cost that is known exactly, no item starts that cannot be answered in time."""

    exact_cost = True

    def check_batch(self, batch: Batch, alive: list[Item], knobs: Settings, budget: int) -> None:
        super().check_batch(batch, alive, knobs, budget)
        probing = self.scheduler._last_finished is None or (
            self.now - self.scheduler._last_finished > knobs.timeout_s
        )
        if knobs.drop_hopeless and not probing:
            for each in batch.items:
                assert each.deadline >= self.now + true_cost(batch) - 1e-9


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHistoryOfKnownCost = HistoryOfKnownCost.TestCase
TestHistoryOfKnownCost.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# -- the door --------------------------------------------------------------------------------------


@given(
    queued=st.lists(st.integers(1, 500), max_size=30),
    more=st.integers(1, 500),
    tokens=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    timeout=st.floats(0.01, 2.0),
    less=st.floats(0.1, 1.0),
    cap=st.integers(1, 40),
)
def test_more_work_or_less_time_never_turns_a_refusal_into_an_admission(
    queued: list[int], more: int, tokens: tuple[int, int], timeout: float, less: float, cap: int
) -> None:
    """[10] And the item's own length does not matter."""

    def admits(queue: list[int], length: int, time: float) -> bool:
        scheduler = Scheduler(Settings(max_queue_size=cap, timeout_ms=2000), taught())
        scheduler._last_finished = 99.9  # the cost is fresh, so it may refuse by it
        for n in queue:
            if scheduler.queue_depth < cap:
                scheduler._queue.append(item(99.0, n, timeout=60))
                scheduler._queued_tokens += n
        return scheduler.offer([item(100.0, length, timeout=time)], 100.0) is None

    if not admits(queued, tokens[0], timeout):
        assert not admits([*queued, more], tokens[0], timeout)
        assert not admits(queued, tokens[0], timeout * less)
    assert admits(queued, tokens[0], timeout) == admits(queued, tokens[1], timeout)


def test_a_request_is_admitted_whole_or_not_at_all() -> None:
    scheduler = Scheduler(Settings(max_queue_size=3))
    assert scheduler.offer([item(), item()], 0.0) is None
    refusal = scheduler.offer([item(), item()], 0.0)
    assert refusal is not None
    assert refusal.reason == "the queue is full"
    assert refusal.retry_after is None, "nothing was measured, so nothing is promised"
    assert scheduler.queue_depth == 2


def test_the_time_to_try_again_is_the_measured_time_to_drain() -> None:
    scheduler = Scheduler(Settings(max_queue_size=2), taught(a=0.0, b=0.01))
    scheduler.offer([item(tokens=100), item(tokens=100)], 0.0)
    refusal = scheduler.offer([item()], 0.0)
    assert refusal is not None
    assert refusal.retry_after == pytest.approx(2.0, rel=0.1)


def test_a_server_that_was_slow_for_a_while_finds_out_that_it_is_fast_again() -> None:
    """A belief that nothing can be in time must not outlive the timeout, or nothing ever runs."""
    scheduler = Scheduler(Settings(timeout_ms=1000), taught(a=5.0, b=0.0))
    scheduler._last_finished = 100.0
    hopeless = item(100.1, timeout=1.0)
    assert scheduler.offer([hopeless], 100.1) is None
    assert scheduler.poll(100.1).dropped == ((hopeless, Drop.HOPELESS),)
    assert scheduler.offer([item(101.5, timeout=1.0)], 101.5) is None
    assert scheduler.poll(101.5).batch is not None


# -- the batch --------------------------------------------------------------------------------------


def run(scheduler: Scheduler, now: float) -> Batch:
    decision = scheduler.poll(now)
    assert decision.batch is not None
    return decision.batch


def test_an_idle_model_starts_at_once() -> None:
    scheduler = Scheduler(Settings())
    scheduler.offer([item(5.0)], 5.0)
    batch = run(scheduler, 5.0)
    assert (len(batch.items), batch.reason) == (1, BatchReason.IDLE)


def test_the_batch_grows_while_the_model_is_busy() -> None:
    scheduler = Scheduler(Settings(max_batch_size=3))
    scheduler.offer([item(0.0)], 0.0)
    run(scheduler, 0.0)
    for t in (0.1, 0.2, 0.3, 0.4):
        scheduler.offer([item(t)], t)
        assert scheduler.poll(t).batch is None
    scheduler.finished(0.5, ok=True)
    batch = run(scheduler, 0.5)
    assert (len(batch.items), batch.reason, batch.left_waiting) == (3, BatchReason.FULL, 1)


def test_an_adversary_with_one_more_item_every_moment_cannot_restart_the_deadline() -> None:
    """[4] The bug of the ancestor: its timer starts again at every item."""
    scheduler = Scheduler(Settings(max_wait_ms=10, max_batch_size=100))
    start, now = 7.0, 7.0
    while True:
        scheduler.offer([item(now)], now)
        decision = scheduler.poll(now)
        if decision.batch:
            break
        assert decision.wake_at == pytest.approx(start + 0.010)
        now += 0.0009
    assert now - start == pytest.approx(0.010, abs=0.001)
    assert decision.batch.reason is BatchReason.DEADLINE


def test_a_full_batch_does_not_wait() -> None:
    scheduler = Scheduler(Settings(max_wait_ms=1000, max_batch_size=2))
    scheduler.offer([item(0.0), item(0.0)], 0.0)
    assert run(scheduler, 0.0).reason is BatchReason.FULL


def test_a_batch_without_room_for_another_token_does_not_wait() -> None:
    scheduler = Scheduler(Settings(max_wait_ms=1000, max_batch_tokens=25))
    scheduler.offer([item(0.0, 10), item(0.0, 10)], 0.0)
    assert run(scheduler, 0.0).reason is BatchReason.BUDGET


def test_waiting_for_company_never_costs_an_item_its_deadline() -> None:
    scheduler = Scheduler(Settings(max_wait_ms=5000))
    scheduler.offer([item(0.0, timeout=1.0)], 0.0)
    wake_at = scheduler.poll(0.0).wake_at
    assert wake_at is not None
    assert 0 < wake_at < 1.0
    assert run(scheduler, wake_at).items[0].deadline > wake_at


def test_an_item_that_is_bigger_than_the_budget_runs_alone() -> None:
    scheduler = Scheduler(Settings(max_batch_tokens=5))
    scheduler.offer([item(0.0, 50), item(0.0, 2)], 0.0)
    assert [i.tokens for i in run(scheduler, 0.0).items] == [50]


def test_a_drain_does_not_wait_for_company() -> None:
    scheduler = Scheduler(Settings(max_wait_ms=5000))
    scheduler.offer([item(0.0)], 0.0)
    scheduler.draining = True
    assert run(scheduler, 0.0).reason is BatchReason.DRAIN


def test_unlike_lengths_wait_for_their_like_but_the_oldest_never_waits() -> None:
    scheduler = Scheduler(Settings(), taught())
    lengths = [8, 400, 9, 380, 10, 7]
    scheduler.offer([item(t / 1000, n) for t, n in enumerate(lengths)], 0.01)
    assert sorted(i.tokens for i in run(scheduler, 0.01).items) == [7, 8, 9, 10]
    scheduler.finished(0.02, ok=True)
    assert sorted(i.tokens for i in run(scheduler, 0.02).items) == [380, 400]


def test_without_grouping_it_is_plain_first_in_first_out() -> None:
    scheduler = Scheduler(Settings(group_by_length=False, max_batch_size=3), taught())
    scheduler.offer([item(t / 1000, n) for t, n in enumerate([8, 400, 9, 380])], 0.01)
    assert [i.tokens for i in run(scheduler, 0.01).items] == [8, 400, 9]


def test_other_parameters_never_share_a_batch() -> None:
    """[13]"""
    scheduler = Scheduler(Settings())
    scheduler.offer([item(t / 10, group=g) for t, g in enumerate("ababb")], 1.0)
    assert {i.group for i in run(scheduler, 1.0).items} == {"a"}
    scheduler.finished(1.1, ok=True)
    assert [i.group for i in run(scheduler, 1.1).items] == ["b", "b", "b"]


def test_a_flood_of_unprepared_items_does_not_keep_the_model_from_running() -> None:
    scheduler = Scheduler(Settings(max_batch_size=4, max_queue_size=10_000))
    scheduler.offer([item(t, group=None, timeout=1e4) for t in range(5000)], 5000.0)
    fresh = scheduler.unprepared()
    assert 4 <= len(fresh) <= 200
    for each in fresh:
        scheduler.ready(each, 5, "g")
    assert not scheduler.unprepared()


def test_eviction_takes_everything_out() -> None:
    scheduler = Scheduler(Settings(max_batch_size=1))
    scheduler.offer([item(0.0), item(0.1)], 0.1)
    run(scheduler, 0.1)
    assert len(scheduler.evict()) == 2
    assert scheduler.in_flight == 0
    scheduler.finished(0.2, ok=True)  # the stuck forward came back after all: no effect
    assert scheduler.in_flight == 0


# -- grouping -----------------------------------------------------------------------------------------


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
def test_the_cuts_are_the_cheapest_of_all(lengths: list[int], most: int, budget: int, ratio: float) -> None:
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
def test_grouping_a_frozen_queue_never_takes_longer_than_fifo(
    lengths: list[int], most: int, budget: int
) -> None:
    """[9]"""

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
def test_equal_lengths_leave_in_order_of_arrival(lengths: list[int], most: int) -> None:
    """[8]"""
    queue = [item(t, n) for t, n in enumerate(lengths)]
    batch = group_by_length(queue, most, 10_000, A, B)
    for young in batch:
        for old in queue:
            assert old in batch or old.tokens != young.tokens or old.arrived > young.arrived


# -- the cost -----------------------------------------------------------------------------------------


@given(a=st.floats(1e-4, 0.1), b=st.floats(1e-7, 1e-3), seed=st.integers(0, 5))
@settings(deadline=None)
def test_the_cost_is_learned_from_noisy_batches(a: float, b: float, seed: int) -> None:
    import random

    dice = random.Random(seed)
    cost = CostModel()
    for _ in range(200):
        x = dice.randint(4, 3000)
        hiccup = 2.0 if dice.random() < 0.005 else 1.0
        cost.observe(x, (a + b * x) * dice.gauss(1, 0.05) * hiccup)
    for x in (50, 500, 2500):
        assert cost.seconds(x) == pytest.approx(a + b * x, rel=0.25)
        assert cost.high(x) >= cost.seconds(x)
    if cost.b > 0:  # else a token costs less than the noise would show, and there is no bound
        limit = cost.high(1000)
        budget = cost.budget(limit)
        assert budget >= 950, "a batch that is known to fit is allowed"
        assert a + b * budget <= 2 * limit, "what is hoped for is at most twice as slow as asked"


def test_nothing_is_refused_by_a_cost_that_nobody_knows() -> None:
    cost = CostModel()
    assert (cost.known, cost.high(1e6), cost.budget(0.001)) == (False, 0.0, 100_000_000)


def test_a_server_that_becomes_twice_as_slow_is_believed_within_a_few_batches() -> None:
    cost = taught()
    for _ in range(8):
        cost.observe(500, 2 * (A + B * 500))
    assert cost.seconds(500) == pytest.approx(2 * (A + B * 500), rel=0.2)


@pytest.mark.parametrize("x", [1, 500])
def test_batches_of_one_size_give_a_usable_estimate(x: int) -> None:
    cost = CostModel()
    for _ in range(5):
        cost.observe(x, 0.03)
    assert cost.seconds(x) == pytest.approx(0.03, rel=0.05)
    assert cost.a > 0
    assert cost.b > 0


def test_impossible_observations_are_ignored() -> None:
    cost = CostModel()
    cost.observe(10, 0.0)
    cost.observe(0, 1.0)
    assert cost.observations == 0
    assert math.isfinite(cost.seconds(100))
