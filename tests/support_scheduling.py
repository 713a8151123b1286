"""The scheduler in simulated time, with clients and a model of known cost; and items for its tests.

No threads, no engine: what the scheduler alone decides.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from serving_kit.items import Item
from serving_kit.model import PADDED, Layout
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.scheduler import Batch, Scheduler
from serving_kit.settings import Settings


@dataclass(frozen=True)
class End:
    """How one item ended: ok, late, rejected (not admitted) or dropped (after having waited)."""

    tokens: int
    how: str
    after: float  # seconds from its arrival
    arrived: float = 0.0


@dataclass
class Outcome:
    """What came of a simulated run."""

    seconds: float
    ends: list[End] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    released: set[str] = field(default_factory=set)  # why the learned cost was released

    def count(self, how: str, since: float = 0.0) -> int:
        """Items that arrived at or after `since` and ended so."""
        return sum(end.how == how and end.arrived >= since for end in self.ends)

    @property
    def latencies(self) -> list[float]:
        return [end.after for end in self.ends if end.how in ("ok", "late")]

    @property
    def rate(self) -> float:
        """Answers in time, per second."""
        return sum(end.how == "ok" for end in self.ends) / self.seconds

    def quantile(self, q: float) -> float:
        return sorted(self.latencies)[int(q * (len(self.latencies) - 1))]

    def share(self, how: str, of: tuple[str, ...] = ("ok", "late", "rejected", "dropped")) -> float:
        """Share of the items that ended so among those that ended in one of the ways `of`."""
        return sum(end.how == how for end in self.ends) / max(1, sum(end.how in of for end in self.ends))

    def longest_in_time(self, share: float = 0.1) -> float:
        """How often the longest items were answered in time, over how often all were."""
        longest = sorted(self.ends, key=lambda end: end.tokens)[-int(share * len(self.ends)) :]
        return sum(end.how == "ok" for end in longest) / len(longest) / self.share("ok")


def item(arrived: float = 0.0, tokens: int = 10, *, timeout: float = 10.0, key: Hashable = "g") -> Item:
    """A prepared item."""
    return Item(arrived, arrived + timeout, tokens, key=key)


def run_one(scheduler: Scheduler, now: float) -> float:
    """Run a step of one item, so that the learned cost is not stale. Returns when it ended."""
    assert scheduler.offer([item(now, 1)], now) is None
    before, scheduler.settings = scheduler.settings, scheduler.settings.replace(max_wait_ms=0)
    while (decision := scheduler.poll(now)).batch is None:
        assert decision.wake_at is not None  # closed-loop clients are waited for
        now = decision.wake_at
    scheduler.finished(now, ok=True)
    scheduler.settings = before
    return now


def lognormal(dice: random.Random) -> Callable[[], int]:
    """Lengths as texts have them: median 40 tokens, from 4 to 256."""
    return lambda: int(min(max(dice.lognormvariate(math.log(40), 0.8), 4), 256))


class TrueCost(CostModel):
    """A cost model that knows the truth at every moment and learns nothing: the oracle."""

    def __init__(self, a: float, b: float, *, packed: bool = False) -> None:
        super().__init__(packed=packed)
        for tokens in (1, 1024) * 500:
            super().observe(tokens, a + b * tokens)
        self.largest = math.inf

    def observe(self, computed_tokens: float, seconds: float) -> None:
        """Nothing new."""

    def relearn(self) -> None:
        """Nothing to forget."""


def known_cost(a: float, b: float, *, packed: bool = False) -> CostModel:
    """What warming up teaches."""
    cost = CostModel(packed=packed)
    for tokens in (8, 64, 256, 1024) * 20:
        cost.observe(tokens, a + b * tokens)
    return cost


def simulate(
    seconds: float,
    a: float,
    b: float,
    *,
    clients: int = 0,
    turnaround: Callable[[], float] = lambda: 0.001,
    rate: float = 0.0,
    bursts: Sequence[tuple[float, int]] = (),
    length: Callable[[], int] = lambda: 20,
    timeout: float = 60.0,
    estimate: Callable[[int], int] = lambda tokens: tokens,
    noise: float = 0.0,
    slowness: Callable[[float], float] = lambda now: 1.0,
    seldom: tuple[float, float] = (0.0, 1.0),
    cost: CostModel | None = None,
    seed: int = 1,
    layout: Layout = PADDED,
    **knobs: object,
) -> Outcome:
    """Run `clients` in a closed loop, or Poisson arrivals at `rate` a second.

    The model takes (a + b * computed tokens) * slowness(now) * exp(normal(0, noise)) seconds, and a share
    `seldom[0]` of its calls takes `seldom[1]` times as long. Admission is told `estimate(tokens)`; the
    truth comes out when the item is prepared.

    Args:
        bursts: Times, and how many items arrive at once then.
        cost: What was learned at first; None: with a timeout below 60 s the truth, else nothing.
    """
    dice, order = random.Random(seed), itertools.count()
    knobs = {"max_queue_size": 100_000, "timeout_ms": timeout * 1000, **knobs}
    fresh = cost is None and timeout < 60
    if fresh:
        cost = known_cost(a, b, packed=layout.packed)
    scheduler = Scheduler(Settings(**knobs), cost, layout)  # type: ignore[arg-type]
    if fresh:  # what it has learned counts from the first item on
        run_one(scheduler, 0.0)
    running: Batch | None = None
    outcome = Outcome(seconds)
    events: list[tuple[float, int, str]] = []

    def later(now: float, what: str) -> None:
        heapq.heappush(events, (now, next(order), what))

    for _ in range(clients):
        later(dice.random() * 0.01, "arrival")
    if rate:
        later(dice.expovariate(rate), "arrival")
    for when, items in bursts:
        for _ in range(items):
            later(when, "one of a burst")
    while events:
        now, _, what = heapq.heappop(events)
        if now > seconds:
            break
        if isinstance(scheduler.cost, TrueCost):
            scheduler.cost.level = slowness(now)
        if what in ("arrival", "one of a burst"):
            tokens = length()
            item = Item(now, now + timeout, estimate(tokens), payload=tokens)
            if scheduler.offer([item], now) is not None:
                outcome.ends.append(End(tokens, "rejected", 0.0, now))
            if rate and what == "arrival":
                later(now + dice.expovariate(rate), "arrival")
        elif what == "end":
            assert running is not None
            for item in running.items:
                how = "ok" if now <= item.deadline else "late"
                outcome.ends.append(End(item.tokens, how, now - item.arrived, item.arrived))
                if clients:
                    later(now + turnaround(), "arrival")
            if why := scheduler.finished(now, ok=True):
                assert why in scheduler.degraded_reason(now)
                outcome.released.add(why)
            running = None
        if running is None:  # the model thread prepares between two steps
            for item in scheduler.unprepared():
                scheduler.ready(item, item.payload, "g")
        decision = scheduler.poll(now)
        for item, _ in decision.dropped:
            outcome.ends.append(End(item.tokens, "dropped", now - item.arrived, item.arrived))
        if decision.batch is not None:
            outcome.sizes.append(len(decision.batch.items))
            outcome.reasons.append(decision.batch.reason)
            running = decision.batch
            took = (a + b * running.computed_tokens) * slowness(now)
            took *= math.exp(dice.gauss(0, noise) if noise else 0)
            if seldom[0] and dice.random() < seldom[0]:
                took *= seldom[1]
            later(now + took, "end")
        elif decision.wake_at is not None:
            later(decision.wake_at, "wake")
    return outcome
