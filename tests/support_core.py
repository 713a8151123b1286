"""Models and drivers for the tests of the core: items, an engine on a fake clock, a batcher with a thread."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from serving_kit import execution
from serving_kit.actions import Action, Exit, Sleep
from serving_kit.batching import Batcher
from serving_kit.engine import Engine
from serving_kit.errors import InputRejected, ServingError
from serving_kit.events import Chunk, Done, End, Event, Failed
from serving_kit.failures import classify
from serving_kit.items import Item, ItemState
from serving_kit.model import (
    PADDED,
    FailureKind,
    Input,
    Layout,
    Limits,
    More,
    Part,
    Prepared,
    StepResult,
    Work,
)
from serving_kit.model import Done as Ended
from serving_kit.records import BatchRecord, BreakerRecord, DropRecord, FailureRecord, Record
from serving_kit.scheduling.scheduler import Scheduler
from serving_kit.settings import Settings
from serving_kit.worker import THREAD_NAME

HANG_S = 10.0  # after which a test fails because something hangs

Bad = Callable[[list[str]], BaseException | None]  # what a step with these values raises


class Echo:
    """Answers `value.upper()`; waits at the gate before every step; misbehaves on request.

    Attributes:
        gate: Every step waits for it.
        inside: Set when a step has begun.
        steps: The values of every step.
        raises: What `prepare`, `step`, `finish`, ... raise the next time, by name.
        bad: What a step raises, by its values.
        lengths: In how many steps a value is answered; one where it is not named. It gives a chunk in each.
        released: How often each payload was released.
    """

    limits = Limits()

    def __init__(self, example: Input | None = None) -> None:
        self.example = example
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()
        self.steps: list[list[str]] = []
        self.granted: list[list[int]] = []
        self.prepared: list[str] = []
        self.raises: dict[str, BaseException] = {}
        self.bad: Bad = lambda values: None
        self.takes: Callable[[], None] = lambda: None  # called in every step: moves a clock
        self.lengths: dict[str, int] = {}
        self.released: Counter[Payload] = Counter()
        self.freed: list[tuple[BaseException, bool]] = []

    def estimate(self, value: Any) -> Work:
        return Work(longest=len(value))

    def work(self, value: str) -> Work:
        """What its first step costs."""
        return Work(longest=len(value))

    def prepare(self, value: Any, parameters: Mapping[str, Any]) -> Prepared[Payload]:
        self.prepared.append(value)
        self._raise_once("prepare")
        if value == "bad":
            raise InputRejected("bad is bad")
        key = tuple(sorted(parameters.items()))
        return Prepared(Payload(value), self.work(value), key)

    def step(self, parts: Sequence[Part]) -> Sequence[StepResult]:
        self.inside.set()
        assert self.gate.wait(HANG_S)
        payloads: list[Payload] = [part.prepared.payload for part in parts]
        values = [each.value for each in payloads]
        self.steps.append(values)
        self.granted.append([part.tokens for part in parts])
        self.takes()
        self._raise_once("step")
        error = self.bad(values)
        if error is not None:
            raise error
        short = "short" in self.raises
        return [self.advance(each) for each in payloads][: len(payloads) - short]

    def finish(self, prepared: Prepared[Payload], output: Any) -> Any:
        self._raise_once("finish")
        return output

    def release(self, prepared: Prepared[Payload]) -> None:
        self.released[prepared.payload] += 1

    def classify(self, error: BaseException) -> FailureKind:
        return classify.kind(error)

    def free_memory(self, error: BaseException, *, thorough: bool) -> None:
        self.freed.append((error, thorough))
        traceback.clear_frames(error.__traceback__)
        gc.collect(1)

    def advance(self, payload: Payload) -> StepResult:
        payload.step += 1
        if payload.step < self.lengths.get(payload.value, 1):
            return More(payload.step, Work())
        return Ended(payload.value.upper())

    def _raise_once(self, stage: str) -> None:
        if stage in self.raises:
            raise self.raises.pop(stage)


class Payload:
    """What `Echo` makes of an input."""

    def __init__(self, value: str) -> None:
        self.value = value
        self.step = 0

    def __repr__(self) -> str:
        return f"Payload({self.value!r})"


def raise_for(*bad: str, error: Callable[[], BaseException] = lambda: ValueError("secret")) -> Bad:
    """A step raises if one of these is in it."""
    return lambda values: error() if any(value in bad for value in values) else None


def more_than(capacity: int) -> Bad:
    """A step runs out of memory that computes more tokens, padded; `Echo` counts a character as a token."""
    return lambda values: out_of_memory() if len(values) * max(map(len, values)) > capacity else None


def out_of_memory() -> BaseException:
    return RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 42 bytes.")


def running(value: str, *, deadline: float = 1e6) -> Item:
    """An item that runs, prepared as `Echo` does it."""
    item = Item(0.0, deadline, max(1, len(value)), Input(value), key=(), state=ItemState.RUNNING)
    item.prepared = Prepared(Payload(value), Work(longest=max(1, len(value))))
    item.started = 0.0
    return item


class Bed:
    """An engine with a model on a fake clock; every step takes one second.

    Attributes:
        log: The names of the actions, in order.
        events: The events of the latest item of each value, in order.
    """

    def __init__(
        self, model: Echo | None = None, *, retry: bool = True, layout: Layout = PADDED, **knobs: Any
    ) -> None:
        self.model = model or Echo()
        self.model.takes = self._tick
        self.now = 0.0
        knobs = {"max_batch_size": 8, "group_by_length": False, "drop_hopeless": False, **knobs}
        scheduler = Scheduler(Settings(**knobs), layout=layout)
        self.engine = Engine(scheduler, canary=self.model.example, retry=retry)
        self.log: list[str] = []
        self.events: dict[str, list[Event]] = {}
        self.records: list[Record] = []
        self.offered: list[Item] = []
        self._of_item: dict[Item, list[Event]] = {}

    def offer(
        self,
        *values: str,
        timeout_s: float = 1000.0,
        stream_timeout_s: float | None = None,
        **parameters: Any,
    ) -> list[Item]:
        """Items that were admitted."""
        stream_deadline = None if stream_timeout_s is None else self.now + stream_timeout_s
        items = [
            Item(
                self.now,
                self.now + timeout_s,
                len(value),
                Input(value, parameters),
                stream_deadline=stream_deadline,
            )
            for value in values
        ]
        error = self.engine.offer(items, self.now)
        self._take()
        if error is not None:
            raise error
        self.offered += items
        return items

    def cancel(self, items: Sequence[Item]) -> None:
        self.engine.cancel(items)
        self._take()

    def turn(self) -> Action:
        """One action, performed."""
        action = self.engine.next(self.now)
        self._take()
        self.log.append(type(action).__name__)
        if not isinstance(action, (Sleep, Exit)):
            result = execution.perform(self.model, action, self._clock)
            self.engine.completed(action, result, self.now)
            self._take()
        return action

    def settle(self, most: int = 1000) -> Action:
        """Perform actions until there is nothing to do now. Returns the last one."""
        for _ in range(most):
            action = self.turn()
            if isinstance(action, (Sleep, Exit)):
                return action
        raise AssertionError("it never comes to rest")

    def ask(self, *values: str, **parameters: Any) -> list[Event]:
        """Offer values together and return their ends."""
        self.offer(*values, **parameters)
        self.settle()
        return [self.end(value) for value in values]

    def end(self, value: str) -> End:
        """How the latest item of this value has ended."""
        end = self.events[value][-1]
        assert not isinstance(end, Chunk)
        return end

    def error(self, value: str) -> ServingError:
        end = self.end(value)
        assert isinstance(end, Failed)
        return end.error

    def has_ended(self, item: Item) -> bool:
        return any(not isinstance(event, Chunk) for event in self._of_item.get(item, ()))

    def chunks(self, value: str) -> list[Any]:
        return [event.value for event in self.events.get(value, []) if isinstance(event, Chunk)]

    @property
    def failures(self) -> list[FailureRecord]:
        return [record for record in self.records if isinstance(record, FailureRecord)]

    @property
    def batches(self) -> list[BatchRecord]:
        return [record for record in self.records if isinstance(record, BatchRecord)]

    @property
    def drops(self) -> list[DropRecord]:
        return [record for record in self.records if isinstance(record, DropRecord)]

    @property
    def breaker_states(self) -> list[str]:
        return [record.state for record in self.records if isinstance(record, BreakerRecord)]

    def check_released(self) -> None:
        """Nothing is held after everything has ended, and nothing was given back twice."""
        assert self.engine.scheduler.in_flight == 0
        assert set(self.model.released.values()) <= {1}
        assert all(item.prepared is None for item in self.offered)

    def _clock(self) -> float:
        return self.now

    def _tick(self) -> None:
        self.now += 1.0

    def _take(self) -> None:
        events, records = self.engine.take()
        self.records += records
        for item, event in events:
            before = self._of_item.setdefault(item, [])
            assert all(isinstance(each, Chunk) for each in before), "two ends of one item"
            before.append(event)
            self.events[item.input.value] = before


class Bench:
    """A batcher with a thread, and everything that it reported."""

    def __init__(self, model: Echo | None = None, **knobs: Any) -> None:
        self.model = model or Echo()
        self.records: list[Record] = []
        self.submitted: list[Item] = []
        self.scheduler = Scheduler(Settings(**knobs))
        self.engine = Engine(self.scheduler, canary=self.model.example)
        self.skipped_s = 0.0
        self.observer: Callable[[Record], None] = self.report
        self.batcher = Batcher(
            self.model, self.engine, lambda record: self.observer(record), clock=self.clock
        )

    def clock(self) -> float:
        """The real time, and what a test has added to `skipped_s`."""
        return time.monotonic() + self.skipped_s

    def report(self, record: Record) -> None:
        self.records.append(record)

    def submit(
        self,
        *values: str,
        timeout_s: float = HANG_S,
        stream_timeout_s: float | None = None,
        **parameters: Any,
    ) -> list[Item]:
        now = self.clock()
        items = self.batcher.submit(
            [Input(value, parameters) for value in values],
            arrived=now,
            deadline=now + timeout_s,
            stream_deadline=None if stream_timeout_s is None else now + stream_timeout_s,
        )
        self.submitted += items
        return items

    async def ask(self, *values: str, **parameters: Any) -> list[End]:
        return [await ended(each) for each in self.submit(*values, **parameters)]

    async def idle(self) -> None:
        """Wait until everything has ended on the model thread."""
        await until(lambda: not self.batcher.load().in_flight)

    @property
    def failures(self) -> list[FailureRecord]:
        return [record for record in self.records if isinstance(record, FailureRecord)]

    @property
    def batches(self) -> list[BatchRecord]:
        return [record for record in self.records if isinstance(record, BatchRecord)]


async def ended(item: Item) -> End:
    """How an item ends."""
    async with asyncio.timeout(HANG_S):
        end: End = await asyncio.shield(item.payload.ended)
        return end


def values_of(ends: Sequence[Event]) -> list[Any]:
    """Answers; None where there is an error instead."""
    return [end.value if isinstance(end, Done) else None for end in ends]


def error_of(end: Event) -> ServingError:
    assert isinstance(end, Failed), end
    return end.error


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(HANG_S):
        while not condition():
            await asyncio.sleep(0.001)


def drive(
    test: Callable[[Bench], Coroutine[Any, Any, None]], model: Echo | None = None, **knobs: Any
) -> Bench:
    """Run a test on a loop with a started batcher; stop it afterwards, and check that nothing is left."""

    async def main() -> Bench:
        bench = Bench(model, **knobs)
        bench.batcher.start()
        try:
            await test(bench)
        finally:
            bench.model.gate.set()
            await bench.batcher.stop(HANG_S)
        assert bench.batcher.load().in_flight == 0
        return bench

    bench = asyncio.run(main())
    assert THREAD_NAME not in {thread.name for thread in threading.enumerate()}
    return bench


@contextmanager
def busy(bench: Bench) -> Iterator[None]:
    """The model is in a step, and stays in it for the block."""
    bench.model.gate.clear()
    bench.model.inside.clear()
    bench.submit("busy")
    assert bench.model.inside.wait(HANG_S)
    yield
    bench.model.gate.set()


async def together(bench: Bench, *values: str) -> list[End]:
    """The ends of values that have shared a step."""
    with busy(bench):
        items = [bench.submit(value)[0] for value in values]
    return [await ended(each) for each in items]
