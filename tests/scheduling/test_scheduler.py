"""The invariants of the scheduler, as properties over random histories on a fake clock.

Numbers in brackets refer to the list of invariants that the design asks for.
"""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving_kit.items import Item, ItemState, computed
from serving_kit.model import PADDED, Layout, Limit
from serving_kit.records import BatchReason, Drop
from serving_kit.scheduling.admission import Rejected, step_limit_s, token_limit
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.scheduler import Batch, Scheduler
from serving_kit.settings import Settings
from tests.support_scheduling import item

pytestmark = pytest.mark.light

A, B = 0.004, 60e-6  # seconds per call and per padded token, as on a CPU
PACKED = Layout(packed=True)
LONGEST_GAP_S = 0.02  # that closed-loop clients are waited for after a step


def true_cost(batch: Batch) -> float:
    return A + B * batch.computed_tokens


def taught(a: float = A, b: float = B, *, packed: bool = False) -> CostModel:
    cost = CostModel(packed=packed)
    for x in (10, 200, 1000, 50, 600):
        cost.observe(x, a + b * x)
    return cost


class History(RuleBasedStateMachine):
    """Clients, a model that takes exactly its true cost, items of several steps, settings that change."""

    exact_cost = False
    layout = PADDED

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.knobs = Settings(timeout_ms=2000, max_queue_size=20, max_batch_size=4)
        packed = self.layout.packed
        cost = taught(packed=packed) if self.exact_cost else CostModel(packed=packed)
        self.scheduler = Scheduler(self.knobs, cost, self.layout)
        self.items: list[Item] = []
        self.steps_left: dict[int, int] = {}
        self.outcome: dict[int, str] = {}
        self.steps_seen: Counter[int] = Counter()
        self.going_on: list[Item] = []  # have run, and have not ended
        self.running: Batch | None = None
        self.wake_at: float | None = None
        self.last_start = 0.0
        self.last_finished: float | None = None

    # -- what can happen ---------------------------------------------------------------------------

    @rule(
        tokens=st.lists(st.integers(1, 300), min_size=1, max_size=6),
        timeout=st.floats(0.001, 3.0),
        key=st.sampled_from(["g", "h"]),
        late=st.floats(0, 0.05),
        prepare=st.booleans(),
        steps=st.sampled_from([1, 1, 1, 2, 3, 6]),
    )
    def arrive(
        self, tokens: list[int], timeout: float, key: str, late: float, prepare: bool, steps: int
    ) -> None:
        new = [Item(self.now - late, self.now - late + timeout, n) for n in tokens]
        rejected = self.scheduler.offer(new, self.now)
        self.items += new
        self.steps_left |= {id(each): steps for each in new}
        if rejected is not None:
            assert rejected.retry_after_s is None or rejected.retry_after_s >= 0
            for each in new:
                self.end(each, "rejected")
        elif prepare:
            for each, n in zip(new, tokens, strict=True):
                self.scheduler.ready(each, n, key)
        self.poll()

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        alive = [i for i in self.items if id(i) not in self.outcome]
        if alive:
            gone = data.draw(st.sampled_from(alive))
            in_step = self.running is not None and gone in self.running.items
            assert self.scheduler.cancel(gone)
            assert gone.state is (ItemState.RUNNING if in_step else ItemState.DONE)
            assert self.scheduler.cancel(gone) is in_step, "it may be said twice"
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
    @rule(ok=st.booleans() | st.just(True), tokens=st.sampled_from([1, 1, 8]), stream=st.booleans())
    def step_ends(self, ok: bool, tokens: int, stream: bool) -> None:
        assert self.running is not None
        self.now = max(self.now, self.last_start + true_cost(self.running))
        continuing = []
        for each in self.running.items:
            self.steps_left[id(each)] -= 1
            if ok and self.steps_left[id(each)] > 0:
                continuing.append(each)
                each.tokens = tokens
                each.deadline += 3.0 * stream
            elif id(each) not in self.outcome:
                self.end(each, "ok" if ok else "failed")
        self.scheduler.finished(self.now, ok=ok, continuing=continuing)
        self.going_on = [
            *(each for each in self.going_on if each not in self.running.items),
            *(each for each in continuing if id(each) not in self.outcome),
        ]
        self.running, self.last_finished = None, self.now
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
        self.going_on = [other for other in self.going_on if other is not each]

    def prepare_all(self) -> None:
        while fresh := self.scheduler.unprepared():
            for each in fresh:
                self.scheduler.ready(each, each.tokens, "g")

    def waiting(self) -> list[Item]:
        """Items that wait, in order of arrival."""
        waiting = [each for each in self.items if each.state is ItemState.WAITING]
        return sorted((i for i in waiting if id(i) not in self.outcome), key=lambda i: i.arrived)

    def poll(self) -> None:
        self.prepare_all()
        queue = self.waiting()
        knobs, budget = self.scheduler.settings, self.scheduler.token_budget()
        decision = self.scheduler.poll(self.now)
        self.wake_at = decision.wake_at
        for each, why in decision.dropped:
            assert why is Drop.HOPELESS or each.deadline <= self.now
            self.end(each, "expired" if why is Drop.EXPIRED else "dropped")
        if self.running is not None:
            assert decision.batch is None, "a batch was chosen while the model was busy"
            assert not decision.dropped
            return
        alive = [i for i in queue if i.state is not ItemState.DONE]
        if decision.batch is None:
            assert not self.going_on, "items that go on wait for nothing"
            self.check_wait(alive, knobs)
            return
        self.check_items(decision.batch)
        if self.going_on:
            self.check_continued(decision.batch, alive, knobs, budget)
        else:
            self.check_first(decision.batch, alive, knobs, budget)
        self.running, self.last_start = decision.batch, self.now

    def check_wait(self, alive: list[Item], knobs: Settings) -> None:
        if not alive:
            assert self.wake_at is None, "[17] nothing waits, so nothing may wake the thread"
            return
        assert self.wake_at is not None, "[3] items wait and nothing will wake the thread"
        assert self.wake_at > self.now
        oldest = min(alive, key=lambda i: i.arrived)
        latest = oldest.arrived + knobs.max_wait_s
        if self.last_finished is not None:  # closed-loop clients: nothing restarts that wait either
            latest = max(latest, self.last_finished + LONGEST_GAP_S)
        else:
            assert knobs.max_wait_ms > 0, "[3] an idle model must start at once"
        assert self.wake_at <= latest + 1e-9, "[4] one deadline, never restarted"

    def check_items(self, batch: Batch) -> None:
        """What holds for every step."""
        assert len({i.key for i in batch.items}) == 1, "[13] other parameters, other step"
        assert len(set(batch.items)) == len(batch.items), "[2] an item is in a step once"
        for each in batch.items:
            self.steps_seen[id(each)] += 1
            assert each in self.going_on or self.steps_seen[id(each)] == 1, "[2] no item starts twice"
            assert each.state is ItemState.RUNNING
            assert each.deadline > self.now, "[5] expired items are in no step"
            assert id(each) not in self.outcome, "[5] neither are items that have ended"
            assert (each.started == self.now) or each in self.going_on
        assert isinstance(batch.reason, BatchReason)
        assert batch.left_waiting == self.scheduler.queue_depth

    def check_first(self, batch: Batch, alive: list[Item], knobs: Settings, budget: int) -> None:
        """A step of an idle model."""
        items = batch.items
        assert 1 <= len(items) <= knobs.max_batch_size, "[2]"
        assert len(items) == 1 or batch.computed_tokens <= budget, "[2]"
        assert alive[0] in items, "[7] the oldest live item is in it"
        left = [i for i in alive if i not in items and i.key == items[0].key]
        for young, old in itertools.product(items, left):
            alike = young.tokens == old.tokens
            urgent = old.deadline < self.now + self.scheduler.cost.high(batch.computed_tokens)
            overtaken = alike and old.arrived < young.arrived
            assert not overtaken or urgent, "[8] equals: first come, first served"

    def check_continued(self, batch: Batch, alive: list[Item], knobs: Settings, budget: int) -> None:
        """A step of items that go on, and of those that join them."""
        oldest_first = sorted(self.going_on, key=lambda i: i.arrived)
        kept = [i for i in oldest_first if i in batch.items]
        assert kept == oldest_first[: len(kept)] != [], "they are in every step, the oldest first"
        if len(kept) < min(len(oldest_first), knobs.max_batch_size):
            more = computed(oldest_first[: len(kept) + 1], packed=self.layout.packed)
            assert more > budget, "they are in every step that has room"
        assert batch.reason is BatchReason.CONTINUED
        assert len(batch.items) <= knobs.max_batch_size, "[2]"
        joined = [i for i in batch.items if i not in self.going_on]
        if not joined:
            return
        assert batch.computed_tokens <= budget, "[2]"
        assert alive[0].key == batch.items[0].key, "[7] the oldest has another key: it is its turn next"
        left = [i for i in alive if i not in joined]
        for young, old in itertools.product(joined, left):
            # An older one is passed over if it, or one that has joined before, would be too late with it.
            end = self.now + self.scheduler.cost.high(batch.computed_tokens + 8 * 300)
            urgent = any(each.deadline < end for each in (old, *joined))
            assert old.arrived >= young.arrived or urgent, "[7] they join in order of arrival"

    @invariant()
    def check_counts(self) -> None:
        """[1, 12] Offered = ended + inside, and the queue stays in its bounds."""
        running = self.running.items if self.running else ()
        first = [i for i in running if i not in self.going_on and id(i) not in self.outcome]
        assert len(self.items) == len(self.outcome) + self.scheduler.queue_depth + len(self.going_on) + len(
            first
        )
        inside = {*running, *self.going_on, *self.waiting()}
        assert self.scheduler.in_flight == len(inside)
        if self.running is None and self.scheduler.cost.observations:
            waiting, knobs = self.waiting(), self.scheduler.settings
            tokens = sum(i.tokens for i in waiting)
            expected_s = self.scheduler.cost.drain(
                len(waiting),
                tokens,
                knobs.max_batch_size,
                step_limit_s(knobs),
                budget=token_limit(knobs, self.scheduler.cost),
            )
            assert self.scheduler.drain_s(self.now) == pytest.approx(expected_s)

    def teardown(self) -> None:
        """[15] After a drain nothing is left, and nothing new gets in."""
        self.scheduler.draining = True
        self.poll()
        assert isinstance(self.scheduler.offer([item(self.now)], self.now), Rejected)
        for _ in range(1000):
            if self.running is None:
                break
            self.step_ends(ok=True, tokens=1, stream=True)
        assert self.scheduler.queue_depth == self.scheduler.in_flight == 0
        assert len(self.outcome) == len(self.items)


class HistoryOfKnownCost(History):
    """[6] With a cost that is known exactly, no item starts that cannot be answered in time."""

    exact_cost = True

    def check_items(self, batch: Batch) -> None:
        super().check_items(batch)
        knobs = self.scheduler.settings
        stale = self.last_finished is None or self.now - self.last_finished > knobs.timeout_s
        if knobs.drop_hopeless and not stale:
            for each in batch.items:
                in_time = each.deadline >= self.now + true_cost(batch) - 1e-9
                assert in_time or each in self.going_on


class PackedHistory(History):
    """The same for a model that packs."""

    layout = PACKED

    def check_first(self, batch: Batch, alive: list[Item], knobs: Settings, budget: int) -> None:
        """A step is a prefix of what waits, without what cannot be answered in time by it."""
        super().check_first(batch, alive, knobs, budget)
        assert batch.computed_tokens == sum(each.tokens for each in batch.items)
        peers = [each for each in alive if each.key == batch.items[0].key]
        last = peers.index(batch.items[-1])
        passed_over = [each for each in peers[:last] if each not in batch.items]
        for each in passed_over:
            before = [i for i in peers[: peers.index(each)] if i in batch.items]
            end = self.now + self.scheduler.cost.high(computed([*before, each], packed=True))
            assert each.deadline < end, "nothing is passed that could be in time behind those before it"
        assert knobs.drop_hopeless or not passed_over
        if last + 1 == len(peers) or len(batch.items) == knobs.max_batch_size:
            return
        more = batch.computed_tokens + peers[last + 1].tokens
        end = self.now + self.scheduler.cost.high(more)
        room = more <= budget and all(each.deadline >= end for each in (*batch.items, peers[last + 1]))
        assert not room, "the next oldest has a place as long as there is one"


class PackedHistoryOfKnownCost(PackedHistory, HistoryOfKnownCost):
    """[6] for a model that packs."""


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHistoryOfKnownCost = HistoryOfKnownCost.TestCase
TestHistoryOfKnownCost.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPackedHistory = PackedHistory.TestCase
TestPackedHistory.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPackedHistoryOfKnownCost = PackedHistoryOfKnownCost.TestCase
TestPackedHistoryOfKnownCost.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


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


def test_arrivals_do_not_restart_the_wait() -> None:
    """[4]"""
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


@pytest.mark.parametrize("layout", [PADDED, PACKED])
def test_no_tokens_left_does_not_wait(layout: Layout) -> None:
    scheduler = Scheduler(Settings(max_wait_ms=1000, max_batch_tokens=25), layout=layout)
    scheduler.offer([item(0.0, 10), item(0.0, 10)], 0.0)
    assert run(scheduler, 0.0).reason is BatchReason.BUDGET


def test_wait_ends_before_the_deadline() -> None:
    scheduler = Scheduler(Settings(max_wait_ms=5000))
    scheduler.offer([item(0.0, timeout=1.0)], 0.0)
    wake_at = scheduler.poll(0.0).wake_at
    assert wake_at is not None
    assert 0 < wake_at < 1.0
    assert run(scheduler, wake_at).items[0].deadline > wake_at


def test_item_above_the_budget_runs_alone() -> None:
    scheduler = Scheduler(Settings(max_batch_tokens=5))
    scheduler.offer([item(0.0, 50), item(0.0, 2)], 0.0)
    assert [i.tokens for i in run(scheduler, 0.0).items] == [50]


def test_drain_does_not_wait() -> None:
    scheduler = Scheduler(Settings(max_wait_ms=5000))
    scheduler.offer([item(0.0)], 0.0)
    scheduler.draining = True
    assert run(scheduler, 0.0).reason is BatchReason.DRAIN


def test_like_lengths_with_the_oldest() -> None:
    scheduler = Scheduler(Settings(), taught())
    lengths = [8, 400, 9, 380, 10, 7]
    scheduler.offer([item(t / 1000, n) for t, n in enumerate(lengths)], 0.01)
    assert sorted(i.tokens for i in run(scheduler, 0.01).items) == [7, 8, 9, 10]
    scheduler.finished(0.02, ok=True)
    assert sorted(i.tokens for i in run(scheduler, 0.02).items) == [380, 400]


def test_without_grouping_it_is_fifo() -> None:
    scheduler = Scheduler(Settings(group_by_length=False, max_batch_size=3), taught())
    scheduler.offer([item(t / 1000, n) for t, n in enumerate([8, 400, 9, 380])], 0.01)
    assert [i.tokens for i in run(scheduler, 0.01).items] == [8, 400, 9]


def test_a_pack_is_in_order_of_arrival() -> None:
    """Whatever `group_by_length` says, and up to the sum of the lengths."""
    scheduler = Scheduler(Settings(group_by_length=True, max_batch_tokens=800), layout=PACKED)
    scheduler.offer([item(t / 1000, n) for t, n in enumerate([8, 400, 9, 380, 4, 1])], 0.01)
    batch = run(scheduler, 0.01)
    assert [i.tokens for i in batch.items] == [8, 400, 9, 380]
    assert (batch.computed_tokens, batch.reason) == (797, BatchReason.BUDGET)


def test_other_parameters_other_batch() -> None:
    """[13]"""
    scheduler = Scheduler(Settings())
    scheduler.offer([item(t / 10, key=g) for t, g in enumerate("ababb")], 1.0)
    assert {i.key for i in run(scheduler, 1.0).items} == {"a"}
    scheduler.finished(1.1, ok=True)
    assert [i.key for i in run(scheduler, 1.1).items] == ["b", "b", "b"]


def test_flood_of_unprepared_items() -> None:
    scheduler = Scheduler(Settings(max_batch_size=4, max_queue_size=10_000))
    scheduler.offer([item(t, key=None, timeout=1e4) for t in range(5000)], 5000.0)
    fresh = scheduler.unprepared()
    assert 4 <= len(fresh) <= 200
    for each in fresh:
        scheduler.ready(each, 5, "g")
    assert not scheduler.unprepared()


def test_eviction() -> None:
    scheduler = Scheduler(Settings(max_batch_size=1))
    scheduler.offer([item(0.0), item(0.1)], 0.1)
    run(scheduler, 0.1)
    assert len(scheduler.evict()) == 2
    assert scheduler.in_flight == 0
    scheduler.finished(0.2, ok=True)  # the stuck step has returned after all: no effect
    assert scheduler.in_flight == 0


# -- items that go on ----------------------------------------------------------------------------------


def continued(scheduler: Scheduler, batch: Batch, now: float, tokens: int = 1) -> None:
    """Every item of the batch goes on."""
    for each in batch.items:
        each.tokens = tokens
    scheduler.finished(now, ok=True, continuing=batch.items)


def test_joining_in_order_of_arrival() -> None:
    scheduler = Scheduler(Settings(max_batch_size=3))
    scheduler.offer([item(0.0)], 0.0)
    continued(scheduler, run(scheduler, 0.0), 0.1)
    scheduler.offer([item(0.1, 300), item(0.1, 2), item(0.1, 3)], 0.1)
    batch = run(scheduler, 0.1)
    assert [i.tokens for i in batch.items] == [1, 300, 2]
    assert (batch.reason, batch.left_waiting) == (BatchReason.CONTINUED, 1)


def test_joining_within_the_budget() -> None:
    """The first that does not fit keeps its place."""
    scheduler = Scheduler(Settings(max_batch_tokens=30))
    scheduler.offer([item(0.0)], 0.0)
    continued(scheduler, run(scheduler, 0.0), 0.1)
    scheduler.offer([item(0.1, 20), item(0.2, 2)], 0.2)
    assert len(run(scheduler, 0.2).items) == 1
    scheduler.finished(0.3, ok=True)
    assert run(scheduler, 0.3).items[0].tokens == 20


def test_no_wait_while_items_go_on() -> None:
    scheduler = Scheduler(Settings(max_wait_ms=5000, max_batch_size=2))
    scheduler.offer([item(0.0), item(0.0)], 0.0)
    continued(scheduler, run(scheduler, 0.0), 0.1)
    assert len(run(scheduler, 0.1).items) == 2


def test_fewer_sequences_than_go_on() -> None:
    """After `max_batch_size` was lowered the oldest go on, and the others resume after them."""
    scheduler = Scheduler(Settings(max_batch_size=4))
    scheduler.offer([item(t / 10) for t in range(4)], 0.4)
    continued(scheduler, run(scheduler, 0.4), 0.5)
    scheduler.settings = Settings(max_batch_size=1)
    first = run(scheduler, 0.5)
    assert [i.arrived for i in first.items] == [0.0]
    assert scheduler.in_flight == 4
    scheduler.offer([item(0.55)], 0.55)
    scheduler.finished(0.6, ok=True)
    scheduler.settings = Settings(max_batch_size=3)
    assert [i.arrived for i in run(scheduler, 0.6).items] == [0.1, 0.2, 0.3]


def test_oldest_of_another_key_gets_its_turn() -> None:
    """[7] However many of the running key arrive after it, it starts once those that run have ended."""
    scheduler = Scheduler(Settings(max_batch_size=2, max_queue_size=1000))
    scheduler.offer([item(0.0, timeout=1e6)], 0.0)
    batch, steps_left = run(scheduler, 0.0), Counter[int]()
    other = item(0.05, key="h", timeout=1e6)
    scheduler.offer([other], 0.05)
    now = 0.1
    for _ in range(100):
        if other in batch.items:
            break
        for each in batch.items:
            steps_left[id(each)] -= 1
        scheduler.offer([item(now, timeout=1e6)], now)
        scheduler.finished(now, ok=True, continuing=[i for i in batch.items if steps_left[id(i)] > -5])
        batch = run(scheduler, now)
        now += 0.1
    assert other in batch.items
    assert now < 1.0


def test_joining_costs_no_deadline() -> None:
    """A long item does not join a step that another new item needs to be short."""
    scheduler = Scheduler(Settings(timeout_ms=1000, max_batch_tokens=10_000), taught(a=0.01, b=0.001))
    scheduler.offer([item(0.0)], 0.0)
    continued(scheduler, run(scheduler, 0.0), 0.02)
    urgent, long = item(0.02, 10, timeout=0.1), item(0.03, 300)
    scheduler.offer([urgent], 0.02)
    scheduler.offer([long], 0.03)
    assert long not in run(scheduler, 0.03).items


def test_expired_between_steps() -> None:
    scheduler = Scheduler(Settings())
    (one,) = items = [item(0.0, timeout=1.0)]
    scheduler.offer(items, 0.0)
    continued(scheduler, run(scheduler, 0.0), 0.1)
    decision = scheduler.poll(1.0)
    assert decision.dropped == ((one, Drop.EXPIRED),)
    assert decision.batch is None
    assert scheduler.in_flight == 0


def test_failed_step_keeps_who_goes_on() -> None:
    """A part of it was run again and goes on; the rest has failed."""
    scheduler = Scheduler(Settings())
    scheduler.offer([item(0.0), item(0.1)], 0.1)
    batch = run(scheduler, 0.1)
    scheduler.finished(0.2, ok=False, continuing=batch.items[:1])
    assert batch.items[1].state is ItemState.DONE
    assert run(scheduler, 0.2).items == batch.items[:1]


def test_eviction_of_items_that_go_on() -> None:
    scheduler = Scheduler(Settings(max_batch_size=1))
    scheduler.offer([item(0.0), item(0.1)], 0.1)
    continued(scheduler, run(scheduler, 0.1), 0.2)
    assert len(scheduler.evict()) == 2
    assert scheduler.in_flight == 0


@given(st.lists(st.integers(1, 400), min_size=1, max_size=20), st.integers(1, 2000))
@settings(deadline=None)
def test_cost_of_continued_steps(lengths: list[int], budget: int) -> None:
    """They teach nothing: their duration depends on what is in the caches."""
    scheduler = Scheduler(Settings(max_batch_tokens=budget))
    scheduler.offer([item(0.0, n) for n in lengths], 0.0)
    batch = run(scheduler, 0.0)
    continued(scheduler, batch, 1.0)
    batch = run(scheduler, 1.0)
    scheduler.finished(2.0, ok=True)
    assert scheduler.cost.observations == 0


# -- sequences: items of which a step may compute a part -------------------------------------------------


def sequences(*tokens: int, timeout: float = 10.0, **knobs: object) -> tuple[Scheduler, list[Item]]:
    """A scheduler with prepared prompts of so many tokens."""
    settings = Settings(**knobs)  # type: ignore[arg-type]
    scheduler = Scheduler(settings, layout=PACKED, cache=Limit(10_000, "given"))
    items = [item(n / 1000, length, timeout=timeout, key=None) for n, length in enumerate(tokens)]
    assert scheduler.offer(items, 0.01) is None
    for each, length in zip(items, tokens, strict=True):
        scheduler.ready(each, length, "g", divisible=True)
    return scheduler, items


def computed_step(scheduler: Scheduler, batch: Batch, now: float) -> None:
    """The model has computed the shares; prompts go on, and every text does."""
    whole = {id(each): each.context_tokens for each in batch.items}
    for each in batch.items:
        each.context_tokens = whole[id(each)] + each.tokens
        each.tokens = max(1, each.payload - each.context_tokens)
    scheduler.finished(now, ok=True, started=now - 0.01, continuing=batch.items)


def test_long_prompt_takes_several_steps() -> None:
    scheduler, (long,) = sequences(600)
    long.payload = 600
    first = run(scheduler, 0.01)
    assert (first.computed_tokens, long.tokens) == (256, 256)
    computed_step(scheduler, first, 0.1)
    assert long.tokens == 344
    assert run(scheduler, 0.1).computed_tokens <= 344


def test_what_did_not_fit_bounds_prompts_and_caches() -> None:
    """Every text still gets its next token in every step, and a prompt goes on."""
    scheduler, items = sequences(40, 40, 40, 200)
    for each in items:
        each.payload = each.tokens
    computed_step(scheduler, run(scheduler, 0.01), 0.1)
    scheduler.memory_limit.exceeded(1, 4, 0.1)
    assert [each.tokens for each in run(scheduler, 0.1).items] == [1, 1, 1, 16]
    computed_step(scheduler, Batch(tuple(items), BatchReason.CONTINUED, 0, 19, 19), 0.2)
    held = scheduler.cached_tokens()
    scheduler.caches_exceeded(0.2)
    decision = scheduler.poll(0.2)
    assert decision.evicted == (items[-1],)
    assert scheduler.cached_tokens() <= 0.75 * held
    assert scheduler.poll(0.2).batch is not None


def test_prompts_start_at_once_where_they_are_as_many_as_may_run() -> None:
    """Also one whose client gives it less time than `max_wait_ms`."""
    scheduler, _ = sequences(5, 5, max_wait_ms=5000, max_batch_size=2)
    assert run(scheduler, 0.01).reason is BatchReason.FULL
    scheduler, _ = sequences(5, max_wait_ms=5000, timeout=1.0)
    wake_at = scheduler.poll(0.01).wake_at
    assert wake_at is not None
    assert wake_at < 0.6


def test_few_are_prepared_between_two_tokens() -> None:
    scheduler, _ = sequences(5, max_batch_size=4)
    batch = run(scheduler, 0.01)
    batch.items[0].payload = 5
    scheduler.offer([item(0.1, key=None) for _ in range(50)], 0.1)
    computed_step(scheduler, batch, 0.2)
    assert len(scheduler.unprepared()) == 3
