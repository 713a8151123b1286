"""The model thread: nobody waits for ever, whatever raises, and A's answer never reaches B."""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from serving_kit.batching import THREAD_NAME, Batcher
from serving_kit.errors import (
    DeadlineExceeded,
    InputRejected,
    ModelFailed,
    Overloaded,
    RequestTooLarge,
    ServingError,
    Unavailable,
)
from serving_kit.execution import Result
from serving_kit.failures import classify
from serving_kit.failures.breaker import Gate
from serving_kit.model import Done, FailureKind, Input, Limits, Part, Prepared, Work
from serving_kit.models.memory import free_memory
from serving_kit.records import BatchReason, BatchRecord
from serving_kit.scheduling.scheduler import Item, Scheduler
from serving_kit.settings import Settings

pytestmark = pytest.mark.light
PATIENCE = 10.0  # seconds after which a test says that somebody hangs


class Echo:
    """Answers `value.upper()`; waits at the gate before every forward; misbehaves on request."""

    def __init__(self, example: tuple[str, Mapping[str, Any]] | None = None) -> None:
        self.example = None if example is None else Input(*example)
        self.limits = Limits()
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()
        self.batches: list[list[str]] = []
        self.raises: dict[str, BaseException] = {}

    def _maybe(self, step: str) -> None:
        if step in self.raises:
            raise self.raises.pop(step)

    def estimate(self, value: Any) -> Work:
        return Work(longest=len(value))

    def prepare(self, value: Any, parameters: Mapping[str, Any]) -> Prepared[Any]:
        self._maybe("prepare")
        if value == "bad":
            raise InputRejected("bad is bad")
        return Prepared(value, Work(longest=len(value)), tuple(sorted(parameters.items())))

    def step(self, parts: Sequence[Part]) -> Sequence[Done]:
        return [Done(output) for output in self.forward([part.prepared for part in parts])]

    def forward(self, batch: Sequence[Prepared[Any]]) -> Sequence[Any]:
        self.inside.set()
        assert self.gate.wait(PATIENCE)
        self.batches.append([each.payload for each in batch])
        self._maybe("forward")
        return [each.payload.upper() for each in batch][: len(batch) - ("short" in self.raises)]

    def finish(self, prepared: Prepared[Any], output: Any) -> Any:
        self._maybe("finish")
        return output

    def release(self, prepared: Prepared[Any]) -> None: ...

    def classify(self, error: BaseException) -> FailureKind:
        return classify.kind(error)

    def free_memory(self, error: BaseException, *, thorough: bool) -> None:
        free_memory(error, thorough=thorough)


class Bench:
    """A batcher with everything that it reported."""

    def __init__(self, example: tuple[str, Mapping[str, Any]] | None = None, **knobs: Any) -> None:
        self.model = Echo(example)
        self.records: list[BatchRecord] = []
        self.errors: list[tuple[ServingError, BaseException]] = []
        self.submitted: list[Item] = []
        self.batcher = Batcher(
            self.model, Scheduler(Settings(**knobs)), on_batch=self.on_batch, on_error=self.on_error
        )

    def on_batch(self, record: BatchRecord) -> None:
        self.model._maybe("on_batch")
        self.records.append(record)

    def on_error(self, failed: ServingError, error: BaseException) -> None:
        self.model._maybe("on_error")
        self.errors.append((failed, error))

    def submit(self, *values: str, timeout: float = PATIENCE, **parameters: Any) -> list[Item]:
        now = time.monotonic()
        items = self.batcher.submit(values, parameters, arrived=now, deadline=now + timeout)
        self.submitted += items
        return items

    async def ask(self, *values: str, **parameters: Any) -> list[Result]:
        return [await result(each) for each in self.submit(*values, **parameters)]


async def result(item: Item) -> Result:
    async with asyncio.timeout(PATIENCE):
        answer: Result = await item.payload.future
        return answer


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


def drive(test: Callable[[Bench], Coroutine[Any, Any, None]], **knobs: Any) -> Bench:
    """Run a test on a loop with a started batcher; stop it afterwards and look for remains."""

    async def main() -> Bench:
        bench = Bench(**knobs)
        bench.batcher.start()
        try:
            await test(bench)
        finally:
            bench.model.gate.set()
            await bench.batcher.stop(PATIENCE)
        assert bench.batcher.scheduler.in_flight == 0
        return bench

    bench = asyncio.run(main())
    assert THREAD_NAME not in {thread.name for thread in threading.enumerate()}
    return bench


@contextmanager
def busy(bench: Bench) -> Iterator[None]:
    """The model is in a forward, and stays there for the block."""
    bench.model.gate.clear()
    bench.model.inside.clear()
    bench.submit("busy")
    assert bench.model.inside.wait(PATIENCE)
    yield
    bench.model.gate.set()


def test_every_item_gets_its_own_answer_in_order() -> None:
    async def test(bench: Bench) -> None:
        assert [r.value for r in await bench.ask("a", "b", "c")] == ["A", "B", "C"]

    drive(test)


def test_items_that_come_while_the_model_is_busy_run_together() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            items = [bench.submit(v)[0] for v in "abcde"]
        assert [(await result(i)).value for i in items] == list("ABCDE")

    bench = drive(test, max_batch_size=4)
    assert [len(b) for b in bench.model.batches] == [1, 4, 1]
    assert [r.reason for r in bench.records] == [BatchReason.IDLE, BatchReason.FULL, BatchReason.IDLE]
    assert bench.records[1].left_waiting == 1


def test_other_parameters_never_share_a_forward() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            items = [bench.submit(f"{k}{n}", k=k)[0] for n in range(3) for k in "xy"]
        for each in items:
            await result(each)

    bench = drive(test)
    assert bench.model.batches[1:] == [["x0", "x1", "x2"], ["y0", "y1", "y2"]]


def test_an_input_that_the_model_cannot_take_fails_alone() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            items = [bench.submit(v)[0] for v in ("good", "bad", "fine")]
        results = [await result(i) for i in items]
        assert [r.value for r in results] == ["GOOD", None, "FINE"]
        assert isinstance(results[1].error, InputRejected)

    bench = drive(test)
    assert not bench.errors, "a plain verdict on an input is not an incident"


@pytest.mark.parametrize("error", [ValueError("secret"), SystemExit(3), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("step", ["prepare", "forward", "finish"])
def test_whatever_a_step_of_the_model_raises_the_client_is_told_and_the_next_one_served(
    step: str, error: BaseException
) -> None:
    async def test(bench: Bench) -> None:
        bench.model.raises[step] = error
        (failed,) = await bench.ask("a")
        assert isinstance(failed.error, RequestTooLarge if isinstance(error, MemoryError) else ModelFailed)
        assert "secret" not in str(failed.error)
        assert [r.value for r in await bench.ask("b")] == ["B"]
        assert bench.batcher.alive

    bench = drive(test)
    assert [cause for _, cause in bench.errors] == [error]


def test_a_wrong_number_of_outputs_fails_the_batch_and_never_misassigns() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            items = bench.submit("a", "b")
            bench.model.raises["short"] = ValueError()
        for each in items:
            assert isinstance((await result(each)).error, ModelFailed)

    bench = drive(test)
    assert "inputs given to the model: 1; outputs that it returned: 0" in str(bench.errors[-1][1])
    assert [record.size for record in bench.records[1:]] == [2, 1, 1], "each runs alone"


STAGES = ["poll", "unprepared", "ready", "finished", "on_batch", "deliver", "wait"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_worker_may_die_at_any_stage_and_no_client_hangs(stage: str) -> None:
    """Ours, not the model's: a bug in the loop answers everybody and the loop goes on."""

    async def test(bench: Bench) -> None:
        with busy_or_not(bench, stage):
            break_once(bench, stage)
            bench.submit("a", "b")
            bench.submit("c", k=1)
        results = [await result(each) for each in bench.submitted]
        assert all((r.value is None) != (r.error is None) for r in results)
        await until(lambda: bool(bench.errors))
        assert [r.value for r in await bench.ask("later")] == ["LATER"]
        assert bench.batcher.alive

    bench = drive(test)
    assert str(bench.errors[0][1].__cause__) == f"a bug in {stage}"


@contextmanager
def busy_or_not(bench: Bench, stage: str) -> Iterator[None]:
    """A stage that breaks before the first forward must not wait for one."""
    if stage in ("finished", "on_batch", "deliver"):
        with busy(bench):
            yield
    else:
        yield


def break_once(bench: Bench, stage: str) -> None:
    """Make one stage of the worker's loop raise the next time that it is reached."""
    if stage == "on_batch":
        bench.model.raises["on_batch"] = RuntimeError("a bug in on_batch")
        return
    owner: Any = bench.batcher if stage == "deliver" else bench.batcher.scheduler
    if stage == "wait":
        owner = bench.batcher._wake
    attribute = "_deliver" if stage == "deliver" else stage
    original = getattr(owner, attribute)
    broken = [True]

    def once(*args: Any, **kwargs: Any) -> Any:
        if broken and threading.current_thread().name == THREAD_NAME:
            broken.clear()
            raise RuntimeError(f"a bug in {stage}")
        return original(*args, **kwargs)

    if owner is bench.batcher.scheduler:  # it has slots: break its class's view of this one call
        bench.batcher.scheduler = _Broken(owner, stage, once)  # type: ignore[assignment]
    else:
        setattr(owner, attribute, once)


class _Broken:
    """The scheduler, but for one method."""

    def __init__(self, inner: Scheduler, name: str, method: Callable[..., Any]) -> None:
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "broken", {name: method})

    def __getattr__(self, name: str) -> Any:
        return self.broken.get(name) or getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)


def test_a_worker_that_keeps_dying_is_restarted_ever_more_slowly_and_the_door_says_why() -> None:
    async def test(bench: Bench) -> None:
        def bug(now: float) -> None:
            raise RuntimeError("a bug for good")

        whole = bench.batcher.scheduler
        bench.batcher.scheduler = _Broken(whole, "poll", bug)  # type: ignore[assignment]
        items = bench.submit("a")
        await until(lambda: bench.batcher.breaker.gate(time.monotonic()) is Gate.OPEN)
        assert isinstance((await result(items[0])).error, ModelFailed)
        assert len(bench.errors) == 5, "crashes in a row, also without a request between them"
        assert "a bug for good" in repr(bench.errors[0][1].__cause__)
        with pytest.raises(Unavailable, match="failed 5 times in a row, last with a crash") as refused:
            bench.submit("b")
        assert refused.value.retry_after == pytest.approx(5, abs=0.5)
        assert "tried again in 5 s" in bench.batcher.trouble()

        bench.batcher.scheduler = whole  # the bug is gone, the pause over
        assert bench.batcher._revival is not None
        bench.batcher.breaker._until = time.monotonic()
        bench.batcher._revival.cancel()
        bench.batcher._spawn()
        assert bench.batcher.trouble() == ""
        assert "one request at a time" in bench.batcher.doubt()
        assert [r.value for r in await bench.ask("c")] == ["C"]
        assert bench.batcher.doubt() == ""

    drive(test)


def test_a_broken_error_hook_does_not_keep_the_answer_from_the_client() -> None:
    async def test(bench: Bench) -> None:
        bench.model.raises |= {"forward": ValueError("x"), "on_error": RuntimeError("y")}
        (failed,) = await bench.ask("a")
        assert isinstance(failed.error, ModelFailed)
        assert [r.value for r in await bench.ask("b")] == ["B"]

    drive(test)


def test_a_full_queue_refuses_at_once_and_more_than_it_can_ever_hold_is_too_large() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            bench.submit("a", "b")
            with pytest.raises(Overloaded, match="the queue is full"):
                bench.submit("c")
            with pytest.raises(RequestTooLarge, match=r"3 inputs in one request; the most is 2"):
                bench.submit("c", "d", "e")

    drive(test, max_queue_size=2)


def test_an_item_that_was_given_up_never_starts() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            kept, given_up = bench.submit("kept"), bench.submit("given up")
            bench.batcher.cancel(given_up)
            assert bench.batcher.scheduler.queue_depth == 1
        await result(kept[0])

    assert drive(test).model.batches == [["busy"], ["kept"]]


def test_an_item_that_was_given_up_is_not_even_prepared() -> None:
    prepared: list[str] = []

    async def test(bench: Bench) -> None:
        original = bench.model.prepare

        def prepare(value: Any, parameters: Mapping[str, Any]) -> Prepared[Any]:
            prepared.append(value)
            if value == "first":
                bench.batcher.cancel([items[1]])
            return original(value, parameters)

        bench.model.prepare = prepare  # type: ignore[method-assign]
        with busy(bench):
            items = bench.submit("first", "given up", "last")
        await result(items[2])

    drive(test)
    assert prepared == ["busy", "first", "last"]


def test_an_item_whose_time_is_up_never_starts() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            (late,) = bench.submit("late", timeout=0.01)
            await asyncio.sleep(0.02)  # real time has to pass; how much does not matter
        assert isinstance((await result(late)).error, DeadlineExceeded)

    assert drive(test).model.batches == [["busy"]]


def test_forwards_wasted_on_clients_that_left_are_counted() -> None:
    async def test(bench: Bench) -> None:
        bench.model.gate.clear()
        items = bench.submit("a", "b")
        assert bench.model.inside.wait(PATIENCE)
        bench.batcher.cancel(items[:1])
        bench.model.gate.set()
        await result(items[1])

    assert drive(test).records[0].wasted == 1


def test_a_change_of_the_wait_reaches_a_worker_that_is_waiting() -> None:
    async def test(bench: Bench) -> None:
        (item,) = bench.submit("a")
        await until(lambda: bench.batcher.wakeups > 1)
        assert not item.payload.future.done()
        bench.batcher.tune(Settings(max_wait_ms=0))
        assert (await result(item)).value == "A"

    drive(test, max_wait_ms=15_000)


def test_an_idle_worker_is_never_woken() -> None:
    """[17]"""

    async def test(bench: Bench) -> None:
        await bench.ask("a")
        await until(lambda: not bench.batcher.scheduler.in_flight)
        await asyncio.sleep(0.05)
        before = bench.batcher.wakeups
        await asyncio.sleep(0.5)
        assert bench.batcher.wakeups == before

    drive(test)


def test_stop_finishes_what_was_admitted_and_refuses_the_rest() -> None:
    """[15]"""

    async def test(bench: Bench) -> None:
        with busy(bench):
            items = bench.submit("a", "b")
            stopping = asyncio.create_task(bench.batcher.stop(PATIENCE))
            await until(lambda: bench.batcher.scheduler.draining)
            with pytest.raises(Unavailable):
                bench.submit("c")
        assert await stopping
        assert [(await result(i)).value for i in items] == ["A", "B"]

    drive(test, max_batch_size=1)


def test_stop_is_bounded_by_its_patience_also_when_the_forward_is_stuck() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            items = bench.submit("a", "b")
            assert not await bench.batcher.stop(0.05)
            for each in items:
                assert isinstance((await result(each)).error, Unavailable)
        await until(lambda: not bench.batcher.alive)

    drive(test)


def test_a_loop_that_is_gone_does_not_hurt_the_worker() -> None:
    bench = Bench()

    async def leave() -> None:
        bench.batcher.start()
        bench.model.gate.clear()
        bench.submit("a")
        bench.batcher._stopping = bench.batcher.scheduler.draining = True

    asyncio.run(leave())
    bench.model.gate.set()
    assert bench.batcher._thread is not None
    bench.batcher._thread.join(PATIENCE)
    assert not bench.batcher._thread.is_alive()


@pytest.mark.parametrize("seed", range(3))
def test_a_random_schedule_loses_nothing_and_mixes_nothing_up(seed: int) -> None:
    """[1, 13] A soak: arrivals, cancels, failures and turning knobs, one outcome for each."""
    dice = random.Random(seed)
    counts: Counter[str] = Counter()

    async def client(bench: Bench, number: int) -> None:
        await asyncio.sleep(dice.random() * 0.3)
        value, k = f"value-{number}-{'x' * dice.randint(0, 40)}", dice.randint(0, 2)
        if dice.random() < 0.02:
            value = "bad"
        try:
            (item,) = bench.submit(value, k=k, timeout=dice.choice([0.01, 1, PATIENCE]))
        except Overloaded:
            counts["shed"] += 1
            return
        if dice.random() < 0.1:
            await asyncio.sleep(dice.random() * 0.01)
            bench.batcher.cancel([item])
            if not item.payload.future.done():
                counts["cancelled"] += 1
                return
        answer = await result(item)
        if answer.error is None:
            assert answer.value == value.upper()
        counts["ok" if answer.error is None else type(answer.error).__name__] += 1

    async def test(bench: Bench) -> None:
        async def disturb() -> None:
            for _ in range(60):
                await asyncio.sleep(0.005)
                if dice.random() < 0.2:
                    bench.model.raises[dice.choice(["forward", "prepare", "finish", "on_batch"])] = OSError()
                size, wait = dice.randint(1, 16), dice.choice([0, 1, 5])
                bench.batcher.tune(Settings(max_batch_size=size, max_wait_ms=wait, max_queue_size=100))

        async with asyncio.TaskGroup() as group:
            group.create_task(disturb())
            for number in range(600):
                group.create_task(client(bench, number))
        bench.model.raises.clear()

    drive(test, max_queue_size=100)
    assert counts.total() == 600
    assert counts["ok"] > 300
