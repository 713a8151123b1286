"""Drives the real scheduler through simulated time: clients, a model of known cost, no threads."""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from serving_kit.scheduler import Item, Scheduler
from serving_kit.settings import Settings


@dataclass
class Outcome:
    """What came of a simulated run."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    refused: int = 0

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def quantile(self, q: float) -> float:
        return sorted(self.latencies)[int(q * (len(self.latencies) - 1))]


def simulate(
    seconds: float,
    a: float,
    b: float,
    *,
    clients: int = 0,
    turnaround: Callable[[], float] = lambda: 0.001,
    rate: float = 0.0,
    length: Callable[[], int] = lambda: 20,
    seed: int = 1,
    **knobs: object,
) -> Outcome:
    """Run `clients` in a closed loop, or Poisson arrivals at `rate` a second, against a + b * tokens."""
    dice, order = random.Random(seed), itertools.count()
    scheduler = Scheduler(Settings(max_queue_size=100_000, timeout_ms=60_000, **knobs))  # type: ignore[arg-type]
    outcome = Outcome(seconds)
    events: list[tuple[float, int, str]] = []

    def later(now: float, what: str) -> None:
        heapq.heappush(events, (now, next(order), what))

    for _ in range(clients):
        later(dice.random() * 0.01, "arrival")
    if rate:
        later(dice.expovariate(rate), "arrival")
    while events:
        now, _, what = heapq.heappop(events)
        if now > seconds:
            break
        if what == "arrival":
            item = Item(now, now + 60, length())
            if scheduler.offer([item], now) is None:
                scheduler.ready(item, item.tokens, "g")
            else:
                outcome.refused += 1
            if rate:
                later(now + dice.expovariate(rate), "arrival")
        elif what == "end":
            assert scheduler._running is not None
            for item in scheduler._running.items:
                outcome.latencies.append(now - item.arrived)
                if clients:
                    later(now + turnaround(), "arrival")
            scheduler.finished(now, ok=True)
        decision = scheduler.poll(now)
        if decision.batch is not None:
            outcome.sizes.append(len(decision.batch.items))
            outcome.reasons.append(decision.batch.reason)
            later(now + a + b * decision.batch.padded_tokens, "end")
        elif decision.wake_at is not None:
            later(decision.wake_at, "wake")
    return outcome
