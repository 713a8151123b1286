"""Which requests are admitted, and which admitted items are dropped."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_kit.items import Item
from serving_kit.model import PADDED, Layout
from serving_kit.records import Drop
from serving_kit.scheduling import grouping
from serving_kit.scheduling import scheduler as scheduler_module
from serving_kit.scheduling.admission import Rejected
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.scheduler import Decision, Scheduler
from serving_kit.settings import Settings
from tests.support_scheduling import item, run_one

pytestmark = pytest.mark.light

A, B = 0.004, 60e-6  # seconds per call and per padded token, as on a CPU


PACKED = Layout(packed=True)


def taught(a: float = A, b: float = B, layout: Layout = PADDED) -> CostModel:
    cost = CostModel(packed=layout.packed)
    for x in (10, 200, 1000, 50, 600) * 2:
        cost.observe(x, a + b * x)
    return cost


def fixed(call_s: float) -> CostModel:
    cost = CostModel()
    for _ in range(10):
        cost.observe(1, call_s)
    return cost


def fresh(call_s: float) -> Scheduler:
    """A scheduler whose cost was confirmed at 99.9."""
    scheduler = Scheduler(Settings(timeout_ms=1000), fixed(call_s))
    run_one(scheduler, 99.9)
    return scheduler


def ask(scheduler: Scheduler, *, now: float, timeout_s: float) -> Decision | Rejected:
    """What comes of an item on an idle server."""
    one = Item(now, now + timeout_s, 1)
    rejected = scheduler.offer([one], now)
    if rejected is not None:
        return rejected
    scheduler.ready(one, 1, "g")
    return scheduler.poll(now)


@pytest.mark.parametrize("layout", [PADDED, PACKED])
@given(
    queued=st.lists(st.integers(1, 500), max_size=30),
    more=st.integers(1, 500),
    tokens=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    timeout=st.floats(0.01, 2.0),
    less=st.floats(0.1, 1.0),
    most=st.integers(1, 40),
)
@settings(deadline=None)
def test_monotonic(
    queued: list[int],
    more: int,
    tokens: tuple[int, int],
    timeout: float,
    less: float,
    most: int,
    layout: Layout,
) -> None:
    """[10] More work or less time admits nothing more, and the item's own length does not count."""

    def admits(queue: list[int], length: int, time: float) -> bool:
        real = Settings(max_queue_size=most, timeout_ms=2000)
        scheduler = Scheduler(real, taught(layout=layout), layout)
        run_one(scheduler, 99.9)
        scheduler.settings = real.replace(drop_hopeless=False)
        for n in queue[:most]:
            assert scheduler.offer([item(99.95, n, timeout=60)], 99.95) is None
        scheduler.settings = real
        return scheduler.offer([item(100.0, length, timeout=time)], 100.0) is None

    if not admits(queued, tokens[0], timeout):
        assert not admits([*queued, more], tokens[0], timeout)
        assert not admits(queued, tokens[0], timeout * less)
    assert admits(queued, tokens[0], timeout) == admits(queued, tokens[1], timeout)


def test_steps_ahead_of_a_packed_item() -> None:
    """The rest of the running step, two of the budget, and its own with a text of the usual length."""
    knobs = Settings(max_batch_tokens=100, max_batch_size=100, timeout_ms=10_000)
    scheduler = Scheduler(knobs, taught(a=0.1, b=0.001, layout=PACKED), PACKED)
    run_one(scheduler, 100.0)
    for _ in range(30):
        one = item(101.0, 10)
        assert scheduler.offer([one], 101.0) is None
        scheduler.ready(one, 10, "g")
    assert scheduler.poll(101.0).batch is not None, "100 tokens: 0.2 s"
    needed_s = (0.2 + 2 * 0.2 + 0.11) / (1 - 0.25)  # a quarter is kept in reserve at first
    assert scheduler.offer([item(101.0, 10, timeout=needed_s * 0.95)], 101.0) is not None
    assert scheduler.offer([item(101.0, 10, timeout=needed_s * 1.05)], 101.0) is None


def test_a_pack_that_is_cut_keeps_its_oldest_in_time() -> None:
    """Instead of dropping it for the sake of the younger ones."""
    knobs = Settings(max_batch_tokens=10_000, timeout_ms=10_000)
    scheduler = Scheduler(knobs, taught(a=0.1, b=0.001, layout=PACKED), PACKED)
    run_one(scheduler, 100.0)
    items = [item(100.5, 100, timeout=t) for t in (0.5, 9.0, 9.0, 9.0, 9.0)]
    for one in items:
        scheduler.settings = knobs.replace(drop_hopeless=False)
        assert scheduler.offer([one], 100.5) is None
    scheduler.settings = knobs
    decision = scheduler.poll(100.5)
    assert decision.batch is not None
    assert not decision.dropped
    assert list(decision.batch.items) == items[:3]


def test_whole_requests_only() -> None:
    scheduler = Scheduler(Settings(max_queue_size=3))
    assert scheduler.offer([item(), item()], 0.0) is None
    rejected = scheduler.offer([item(), item()], 0.0)
    assert rejected == Rejected("the queue is full", None)
    assert scheduler.queue_depth == 2


def test_retry_after_is_the_time_to_drain() -> None:
    scheduler = Scheduler(Settings(max_queue_size=2), taught(a=0.0, b=0.01))
    scheduler.offer([item(tokens=100), item(tokens=100)], 0.0)
    rejected = scheduler.offer([item()], 0.0)
    assert rejected is not None
    assert rejected.retry_after_s == pytest.approx(2.0, rel=0.1)


def test_draining() -> None:
    scheduler = Scheduler(Settings())
    scheduler.draining = True
    rejected = scheduler.offer([item()], 0.0)
    assert rejected is not None
    assert rejected.stopping


def test_true_lengths_correct_estimates() -> None:
    scheduler = Scheduler(Settings(max_queue_size=10_000), taught())
    for _ in range(200):
        one = Item(0.0, 10.0, 70)
        scheduler.offer([one], 0.0)
        scheduler.ready(one, 40, "g")
    newest = Item(0.0, 10.0, 70)
    scheduler.offer([newest], 0.0)
    assert newest.tokens == 40
    queued_s = scheduler.cost.drain(201, 201 * 40, 32, 10 / 3)
    assert scheduler.drain_s(0.0) == pytest.approx(queued_s)


def test_slow_server_that_is_fast_again() -> None:
    """The cost rejects nothing once it is older than the timeout, or nothing would ever run."""
    scheduler = Scheduler(Settings(timeout_ms=1000), fixed(5.0))
    run_one(scheduler, 100.0)
    hopeless = item(100.1, timeout=1.0)
    assert scheduler.offer([hopeless], 100.1) is not None
    assert scheduler.offer([item(101.5, timeout=1.0)], 101.5) is None
    assert scheduler.poll(101.5).batch is not None


@pytest.mark.parametrize("timeout_s", [0.0, 1e-6, 0.05])
def test_less_time_than_any_step_takes(timeout_s: float) -> None:
    rejected = ask(fresh(call_s=0.1), now=100.0, timeout_s=timeout_s)
    assert isinstance(rejected, Rejected)
    assert rejected.expired


@pytest.mark.parametrize("asked_s", [0.6, 1.0])
@pytest.mark.parametrize("start", [0.0, 1e5 + 1 / 3])
def test_outdated_cost_is_tried(asked_s: float, start: float) -> None:
    """Calls took 3 s for a while, and are instant again: one try for each timeout finds that out."""
    scheduler = Scheduler(Settings(timeout_ms=1000), fixed(3.0))
    answered, now = 0, start
    for _ in range(100):
        now += 0.25
        decision = ask(scheduler, now=now, timeout_s=asked_s)
        if isinstance(decision, Decision) and decision.batch is not None:
            scheduler.finished(now + 0.001, ok=True)
            answered += 1
    assert answered >= 80


@pytest.mark.parametrize("start", [0.0, 1e5 + 1 / 3, 123456.789])
def test_timeout_of_the_server(start: float) -> None:
    """It is no mistake of the client. The deadline is a sum of floats, a rounding error short of it."""
    scheduler = Scheduler(Settings(timeout_ms=700), fixed(3.0))
    decision = ask(scheduler, now=start, timeout_s=0.7)
    assert isinstance(decision, Decision), "nothing has run yet: a try"
    rejected = ask(scheduler, now=start + 0.01, timeout_s=0.7)
    assert isinstance(rejected, Rejected)
    assert not rejected.expired


def test_one_cut_for_many_hopeless_items(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    group = grouping.group_by_length
    monkeypatch.setattr(scheduler_module, "group_by_length", lambda *args: calls.append(1) or group(*args))
    scheduler = Scheduler(Settings(timeout_ms=1000, max_queue_size=1000))
    items = [Item(0.0, 1.0, 1 + n % 50) for n in range(200)]
    assert scheduler.offer(items, 0.0) is None
    for each in items:
        scheduler.ready(each, each.tokens, "g")
    for tokens in (1, 10, 50, 1, 10, 50, 1, 10):
        scheduler.cost.observe(tokens, 0.2 + 0.001 * tokens)
    assert scheduler.poll(0.1).batch is not None
    scheduler.finished(0.9, ok=True)
    calls.clear()
    assert len(scheduler.poll(0.9).dropped) > 100
    assert len(calls) <= 1


def test_step_that_took_no_time() -> None:
    scheduler = fresh(call_s=0.1)
    scheduler.settings = Settings(timeout_ms=1000, max_batch_size=1)
    for _ in range(2):
        assert scheduler.offer([item(100.0, 1, timeout=1.0)], 100.0) is None
    assert scheduler.poll(100.0).batch is not None
    scheduler.finished(100.0, ok=True)


def test_hopeless_items_have_a_retry_after() -> None:
    scheduler = fresh(call_s=0.3)
    first, second = item(100.0, 1, timeout=1.0), item(100.0, 1, timeout=0.45)
    for one in (first, second):
        assert scheduler.offer([one], 100.0) is None
    scheduler.settings = Settings(timeout_ms=1000, max_batch_size=1)
    assert scheduler.poll(100.0).batch is not None
    scheduler.finished(100.3, ok=True)
    scheduler.offer([item(100.3, 1, timeout=1.0)], 100.3)
    decision = scheduler.poll(100.3)
    assert decision.dropped == ((second, Drop.HOPELESS),)
    assert decision.retry_after_s == pytest.approx(0.3, rel=0.2)


@pytest.mark.parametrize(
    ("a", "timeout_s", "limit", "tokens"),
    [(0.05, 1.0, "auto", 20), (0.3, 10.0, "auto", 20), (0.06, 0.5, 64, 512), (0.3, 1.0, 64, 512)],
)
def test_lone_client_of_a_packing_model_is_answered(
    a: float, timeout_s: float, limit: int | str, tokens: int
) -> None:
    """Also after a small step that left an item waiting, and with a limit below the item's own length."""
    b, knobs = 2e-5, {"timeout_ms": timeout_s * 1000, "max_batch_tokens": limit}
    scheduler = Scheduler(Settings(**knobs), taught(a, b, PACKED), PACKED)  # type: ignore[arg-type]
    first, left = item(0.0, tokens, timeout=timeout_s, key="x"), item(0.0, tokens, timeout=timeout_s, key="y")
    now = 0.0
    assert scheduler.offer([first, left], now) is None
    for each in (first, left):
        scheduler.ready(each, tokens, each.key)
    refused = 0
    for _ in range(40):
        while (decision := scheduler.poll(now)).batch is not None:
            now += a + b * decision.batch.computed_tokens
            scheduler.finished(now, ok=True)
        now += 0.01
        one = item(now, tokens, timeout=timeout_s)
        if scheduler.offer([one], now) is None:
            scheduler.ready(one, tokens, "x")
        else:
            refused += 1
    assert refused == 0
