"""The model thread: every job ends whatever raises, and no answer reaches another job."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from serving_kit.engine import Engine
from serving_kit.errors import (
    DeadlineExceeded,
    InputRejected,
    ModelFailed,
    Overloaded,
    RequestTooLarge,
    Unavailable,
)
from serving_kit.events import Chunk, Done, Failed
from serving_kit.failures.breaker import Gate
from serving_kit.model import Done as Ended
from serving_kit.model import FailureKind, Input
from serving_kit.records import BatchReason, BatchRecord, FailureRecord, Record
from serving_kit.settings import Settings
from serving_kit.worker import Handover
from tests.support_core import (
    HANG_S,
    Bench,
    Echo,
    busy,
    drive,
    ended,
    error_of,
    until,
    values_of,
)

pytestmark = pytest.mark.light


# -- answers -----------------------------------------------------------------------------------------


def test_answers_in_order() -> None:
    async def test(bench: Bench) -> None:
        assert values_of(await bench.ask("a", "b", "c")) == ["A", "B", "C"]

    drive(test)


def test_items_of_a_busy_time_share_a_step() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            items = [bench.submit(v)[0] for v in "abcde"]
        assert values_of([await ended(i) for i in items]) == list("ABCDE")

    bench = drive(test, max_batch_size=4)
    assert [len(values) for values in bench.model.steps] == [1, 4, 1]
    assert [r.reason for r in bench.batches] == [BatchReason.IDLE, BatchReason.FULL, BatchReason.IDLE]
    assert bench.batches[1].left_waiting == 1


def test_other_parameters_other_step() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            items = [bench.submit(f"{k}{n}", k=k)[0] for n in range(3) for k in "xy"]
        for each in items:
            await ended(each)

    bench = drive(test)
    assert bench.model.steps[1:] == [["x0", "x1", "x2"], ["y0", "y1", "y2"]]


def test_stream_of_chunks() -> None:
    async def test(bench: Bench) -> None:
        bench.model.lengths = {"stream": 4}
        (stream,) = bench.submit("stream", stream_timeout_s=HANG_S)
        (body,) = bench.submit("body")
        events = [event async for event in stream.payload.events()]
        assert events[:-1] == [Chunk(1), Chunk(2), Chunk(3)]
        assert values_of(events[-1:]) == ["STREAM"]
        assert values_of([await ended(body)]) == ["BODY"]

    assert drive(test).model.released.total() == 2


def test_last_chunk_precedes_the_answer() -> None:
    """A model may give the last piece of a stream with the answer."""
    model = Echo()
    model.advance = lambda payload: Ended("A", "last")  # type: ignore[method-assign]

    async def test(bench: Bench) -> None:
        (item,) = bench.submit("a", stream_timeout_s=HANG_S)
        events = [event async for event in item.payload.events()]
        assert events[:-1] == [Chunk("last")]
        assert values_of(events[-1:]) == ["A"]

    drive(test, model)


def test_stream_cancelled_between_steps() -> None:
    async def test(bench: Bench) -> None:
        bench.model.lengths = {"endless": 10**9}
        (item,) = bench.submit("endless", stream_timeout_s=HANG_S)
        async for event in item.payload.events():
            if event == Chunk(3):
                break
        bench.batcher.cancel([item])
        await bench.idle()
        await until(lambda: bench.model.released.total() == 1)

    drive(test)


def test_drain_finishes_streams() -> None:
    async def test(bench: Bench) -> None:
        bench.model.lengths = {"stream": 50}
        (item,) = bench.submit("stream", stream_timeout_s=HANG_S)
        assert await bench.batcher.stop(HANG_S)
        assert values_of([await ended(item)]) == ["STREAM"]

    drive(test)


# -- what the model raises ---------------------------------------------------------------------------


def test_rejected_input_fails_alone() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            items = [bench.submit(v)[0] for v in ("good", "bad", "fine")]
        ends = [await ended(i) for i in items]
        assert values_of(ends) == ["GOOD", None, "FINE"]
        assert isinstance(error_of(ends[1]), InputRejected)

    assert not drive(test).failures


@pytest.mark.parametrize("error", [ValueError("secret"), SystemExit(3), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("stage", ["prepare", "step", "finish"])
def test_any_exception_of_the_model(stage: str, error: BaseException) -> None:
    """Its client is told, without the text, and the next one is served."""

    async def test(bench: Bench) -> None:
        bench.model.raises[stage] = error
        failed = error_of((await bench.ask("a"))[0])
        assert isinstance(failed, RequestTooLarge if isinstance(error, MemoryError) else ModelFailed)
        assert "secret" not in str(failed)
        assert values_of(await bench.ask("b")) == ["B"]
        assert bench.batcher.status().unavailable_reason == ""

    bench = drive(test)
    assert [record.cause for record in bench.failures] == [error]


def test_wrong_number_of_outputs() -> None:
    """The items run alone; no output is given to another item."""

    async def test(bench: Bench) -> None:
        with busy(bench):
            items = bench.submit("a", "b")
            bench.model.raises["short"] = ValueError()
        for each in items:
            assert isinstance(error_of(await ended(each)), ModelFailed)

    bench = drive(test)
    assert "inputs given to the model: 1; outputs that it returned: 0" in str(bench.failures[-1].cause)
    assert [record.size for record in bench.batches[1:]] == [2, 1, 1]


# -- what the kit's own code raises ------------------------------------------------------------------

BEFORE_THE_STEP = [(Engine, "next"), (Handover, "wait"), (Handover, "perform")]
AFTER_THE_STEP = [
    (Engine, "completed"),
    (Engine, "take"),
    (Handover, "complete"),
    (asyncio.BaseEventLoop, "call_soon_threadsafe"),
]


@pytest.mark.parametrize(("owner", "stage"), [*BEFORE_THE_STEP, *AFTER_THE_STEP])
def test_the_thread_dies_at_any_stage(owner: type, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of the kit ends all jobs, and another thread takes over."""

    async def test(bench: Bench) -> None:
        with busy(bench) if (owner, stage) in AFTER_THE_STEP else nothing():
            break_once(monkeypatch, owner, stage)
            bench.submit("a", "b")
            bench.submit("c", k=1)
        ends = [await ended(each) for each in bench.submitted]
        assert all(isinstance(end, (Done, Failed)) for end in ends)
        await until(lambda: bench.failures)
        assert values_of(await bench.ask("later")) == ["LATER"]
        assert bench.batcher.status().unavailable_reason == ""

    bench = drive(test)
    assert bench.failures[0].kind is FailureKind.CRASH
    assert str(bench.failures[0].cause.__cause__) == f"a bug in {stage}"


@contextmanager
def nothing() -> Iterator[None]:
    yield


def break_once(monkeypatch: pytest.MonkeyPatch, owner: type, stage: str) -> None:
    """Make one stage of the model thread raise the next time that it is reached."""
    original, left = getattr(owner, stage), [True]

    def once(*args: Any, **kwargs: Any) -> Any:
        if left and threading.current_thread().name == "serving-kit-model":
            left.clear()
            raise RuntimeError(f"a bug in {stage}")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, stage, once)


def test_a_thread_that_keeps_dying(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started again after ever longer pauses, and clients are told why."""

    def bug(engine: Engine, now: float) -> None:
        raise RuntimeError("a bug for good")

    async def test(bench: Bench) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "next", bug)
            (item,) = bench.submit("a")
            await until(lambda: bench.batcher.status().breaker is Gate.OPEN)
            assert isinstance(error_of(await ended(item)), ModelFailed)
            assert len(bench.failures) == 5
            assert "a bug for good" in repr(bench.failures[0].cause.__cause__)
            with pytest.raises(Unavailable, match="failed 5 times in a row, last with a crash") as refused:
                bench.submit("b")
            assert refused.value.retry_after == pytest.approx(5, abs=0.5)
            assert "tried again in 5 s" in bench.batcher.status().unavailable_reason

    drive(test)


def test_the_thread_after_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        shorten_pauses(monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "next", lambda engine, now: 1 / 0)
            bench.submit("a")
            await until(lambda: len(bench.failures) >= 5)
        await until(lambda: not bench.batcher.status().unavailable_reason)
        assert "one request at a time" in bench.batcher.status().degraded_reason
        assert values_of(await bench.ask("c")) == ["C"]
        assert bench.batcher.status().degraded_reason == ""

    drive(test)


def shorten_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving_kit.failures.breaker._PAUSE_S", 0.1)


def test_no_thread_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system has no thread to give: it is tried again."""
    monkeypatch.setattr("serving_kit.worker._NO_THREAD_S", 0.01)
    start, refusals = threading.Thread.start, 3

    def refuse_some(thread: threading.Thread) -> None:
        nonlocal refusals
        if thread.name == "serving-kit-model" and refusals:
            refusals -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_some)

    async def test(bench: Bench) -> None:
        assert "is being started again" in bench.batcher.status().unavailable_reason
        await until(lambda: not bench.batcher.status().unavailable_reason)
        assert values_of(await bench.ask("a")) == ["A"]

    assert "can't start new thread" in repr(drive(test).failures[0].cause.__cause__)


def test_broken_observer_and_broken_model() -> None:
    async def test(bench: Bench) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        bench.model.raises["step"] = ValueError("x")
        report, broken = bench.report, [True]

        def observer(record: Record) -> None:
            report(record)
            if isinstance(record, FailureRecord) and broken:
                broken.clear()
                raise RuntimeError("y")

        bench.observer = observer
        assert isinstance(error_of((await bench.ask("a"))[0]), ModelFailed)
        assert values_of(await bench.ask("b")) == ["B"]
        assert not broken

    drive(test)


# -- admission and cancellation ----------------------------------------------------------------------


def test_full_queue() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            bench.submit("a", "b")
            with pytest.raises(Overloaded, match="the queue is full"):
                bench.submit("c")
            with pytest.raises(RequestTooLarge, match=r"3 inputs in one request; the most is 2"):
                bench.submit("c", "d", "e")

    drive(test, max_queue_size=2)


def test_cancelled_items_never_start() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            kept, cancelled = bench.submit("kept"), bench.submit("cancelled")
            bench.batcher.cancel(cancelled)
            assert bench.batcher.load().queue_depth == 1
        await ended(kept[0])

    assert drive(test).model.steps == [["busy"], ["kept"]]


def test_cancelled_items_are_not_prepared() -> None:
    async def test(bench: Bench) -> None:
        original = bench.model.prepare

        def prepare(value: Any, parameters: Any) -> Any:
            if value == "first":
                bench.batcher.cancel([items[1]])
            return original(value, parameters)

        bench.model.prepare = prepare  # type: ignore[method-assign]
        with busy(bench):
            items = bench.submit("first", "cancelled", "last")
        await ended(items[2])

    assert drive(test).model.prepared == ["busy", "first", "last"]


def test_expired_items_never_start() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            (late,) = bench.submit("late", timeout_s=0.01)
            await asyncio.sleep(0.02)  # real time has to pass; how much does not matter
        assert isinstance(error_of(await ended(late)), DeadlineExceeded)

    assert drive(test).model.steps == [["busy"]]


def test_wasted_items_are_counted() -> None:
    async def test(bench: Bench) -> None:
        bench.model.gate.clear()
        items = bench.submit("a", "b")
        assert bench.model.inside.wait(HANG_S)
        bench.batcher.cancel(items[:1])
        bench.model.gate.set()
        await ended(items[1])

    assert drive(test).batches[0].wasted == 1


def test_tune_wakes_a_waiting_thread() -> None:
    async def test(bench: Bench) -> None:
        (item,) = bench.submit("a")
        await until(lambda: bench.batcher.wakeups > 1)
        assert not item.payload.ended.done()
        bench.batcher.tune(Settings(max_wait_ms=0))
        assert bench.batcher.settings.max_wait_ms == 0
        assert values_of([await ended(item)]) == ["A"]

    drive(test, max_wait_ms=15_000)


def test_no_wake_ups_while_idle() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a")
        await bench.idle()
        await asyncio.sleep(0.05)
        before = bench.batcher.wakeups
        await asyncio.sleep(0.5)
        assert bench.batcher.wakeups == before

    drive(test)


def test_status() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            bench.submit("a", "b")
            status = bench.batcher.status()
            assert status.load == (2, 3)
            assert status.running is not None
            assert status.running.since <= time.monotonic()
        await bench.idle()
        status = bench.batcher.status()
        assert status.running is None
        assert (status.breaker, status.draining) == (Gate.CLOSED, False)
        assert status.memory_limit_tokens is None

    drive(test)


def test_the_canary_counts_as_running() -> None:
    """A canary that hangs must show."""

    async def test(bench: Bench) -> None:
        with busy(bench):
            (item,) = bench.submit("poison")
            bench.model.bad = lambda values: ValueError() if values == ["poison"] else None
        await until(lambda: len(bench.model.steps) == 3)
        await ended(item)
        await bench.idle()
        assert bench.batcher.status().running is None

    assert drive(test, Echo(Input("example"))).model.steps[-1] == ["example"]


# -- the end -----------------------------------------------------------------------------------------


def test_stop_finishes_what_was_admitted() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            items = bench.submit("a", "b")
            stopping = asyncio.create_task(bench.batcher.stop(HANG_S))
            await until(lambda: bench.batcher.draining)
            with pytest.raises(Unavailable):
                bench.submit("c")
        assert await stopping
        assert values_of([await ended(i) for i in items]) == ["A", "B"]

    drive(test, max_batch_size=1)


def test_stop_with_a_stuck_step() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            items = bench.submit("a", "b")
            assert not await bench.batcher.stop(0.05)
            for each in items:
                assert isinstance(error_of(await ended(each)), Unavailable)
        assert bench.batcher.join(HANG_S)

    drive(test)


def test_stop_with_a_step_without_clients() -> None:
    """It is not waited for longer than a second."""

    async def test(bench: Bench) -> None:
        with busy(bench):
            bench.batcher.cancel(bench.submitted)
            began = time.monotonic()
            assert not await bench.batcher.stop(60)
            assert time.monotonic() - began < 5

    drive(test)


def test_stop_during_a_bisection() -> None:
    async def test(bench: Bench) -> None:
        stopping = threading.Event()

        def bad(values: list[str]) -> BaseException | None:
            if values != ["busy"]:
                stopping.wait(HANG_S)
                return ValueError()
            return None

        with busy(bench):
            bench.model.bad = bad
            items = bench.submit(*"abcdefgh")
        await until(lambda: len(bench.model.steps) == 2)
        assert not await bench.batcher.stop(0.01)
        for each in items:
            assert isinstance(error_of(await ended(each)), Unavailable)
        stopping.set()
        assert await asyncio.to_thread(bench.batcher.join, HANG_S)
        assert len(bench.model.steps) == 2, "no client is left"

    drive(test)


def test_release_with_a_stuck_step() -> None:
    async def test(bench: Bench) -> None:
        with busy(bench):
            bench.batcher.release()
            assert not bench.batcher.join(0.01)
            with pytest.raises(Unavailable):
                bench.submit("a")
        assert bench.batcher.join(HANG_S)

    drive(test)


def test_the_loop_is_gone() -> None:
    """The thread ends as usual."""
    bench = Bench()

    async def leave() -> None:
        bench.batcher.start()
        bench.model.gate.clear()
        bench.submit("a")
        assert bench.model.inside.wait(HANG_S)
        bench.batcher.release()

    asyncio.run(leave())
    bench.model.gate.set()
    assert bench.batcher.join(HANG_S)


@pytest.mark.parametrize("seed", range(3))
def test_random_schedule(seed: int) -> None:
    """Arrivals, streams, cancels, failures and settings that change: one end for each item, and its own."""
    dice = random.Random(seed)
    counts: Counter[str] = Counter()

    async def client(bench: Bench, number: int) -> None:
        await asyncio.sleep(dice.random() * 0.3)
        value, k = f"value-{number}-{'x' * dice.randint(0, 40)}", dice.randint(0, 2)
        if dice.random() < 0.02:
            value = "bad"
        if dice.random() < 0.1:
            bench.model.lengths[value] = 4
        try:
            (item,) = bench.submit(value, k=k, timeout_s=dice.choice([0.01, 1, HANG_S]))
        except Overloaded:
            counts["shed"] += 1
            return
        except DeadlineExceeded:  # on a busy machine, 10 ms are less than any step takes
            counts["expired"] += 1
            return
        if dice.random() < 0.1:
            await asyncio.sleep(dice.random() * 0.01)
            bench.batcher.cancel([item])
            if not item.payload.ended.done():
                counts["cancelled"] += 1
                return
        end = await ended(item)
        if isinstance(end, Done):
            assert end.value == value.upper()
        counts["ok" if isinstance(end, Done) else type(end.error).__name__] += 1

    async def test(bench: Bench) -> None:
        async def disturb() -> None:
            for _ in range(60):
                await asyncio.sleep(0.005)
                if dice.random() < 0.2:
                    bench.model.raises[dice.choice(["step", "prepare", "finish"])] = OSError()
                size, wait = dice.randint(1, 16), dice.choice([0, 1, 5])
                bench.batcher.tune(Settings(max_batch_size=size, max_wait_ms=wait, max_queue_size=100))

        async with asyncio.TaskGroup() as group:
            group.create_task(disturb())
            for number in range(600):
                group.create_task(client(bench, number))
        bench.model.raises.clear()

    bench = drive(test, max_queue_size=100)
    assert counts.total() == 600
    assert counts["ok"] > 300
    assert sum(isinstance(record, BatchRecord) for record in bench.records) == len(bench.model.steps)
    assert set(bench.model.released.values()) == {1}
