"""Nothing is lost: whatever fails, every request ends exactly once and the server says how it is."""

import asyncio
import contextlib
import dis
import importlib.util
import linecache
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import serving_kit
from serving_kit import (
    batching,
    execution,
    incidents,
    observers,
    service,
    status_reader,
    telemetry,
)
from serving_kit.errors import (
    DeadlineExceeded,
    InputRejected,
    ModelFailed,
    RequestTooLarge,
    ServingError,
    Unavailable,
)
from serving_kit.execution import Result
from serving_kit.failures import bisection, breaker, recovery
from serving_kit.failures.breaker import Gate
from serving_kit.failures.classify import kind
from serving_kit.model import FailureKind, Prepared
from serving_kit.models.functions import CallableModel
from serving_kit.records import BatchReason
from serving_kit.scheduling import scheduler
from serving_kit.scheduling.scheduler import State
from serving_kit.service import Service
from serving_kit.settings import Settings
from tests.support import REPOSITORY, run_script
from tests.support import until as wait_until
from tests.test_batching import PATIENCE, Bench, busy, drive, result, until

pytestmark = pytest.mark.light

KIT = (
    batching,
    execution,
    recovery,
    scheduler,
    breaker,
    bisection,
    service,
    incidents,
    observers,
    telemetry,
)  # whose lines are made to raise


class Picky:
    """A forward that raises if it sees a bad value, and counts how often it was called."""

    def __init__(self, bench: Bench, bad: Callable[[list[str]], BaseException | None]) -> None:
        self.calls: list[list[str]] = []
        self.bad = bad
        self._forward = bench.model.forward
        bench.model.forward = self  # type: ignore[method-assign, assignment]

    def __call__(self, batch: Sequence[Prepared[Any]]) -> Sequence[Any]:
        values = [each.payload for each in batch]
        self.calls.append(values)
        error = self.bad(values)
        if error is not None:
            raise error
        return self._forward(batch)


async def together(bench: Bench, *values: str) -> list[Result]:
    """The results of values that have shared a batch."""
    with busy(bench):
        items = [bench.submit(value)[0] for value in values]
    return [await result(each) for each in items]


def raise_for(*bad: str, error: Callable[[], BaseException] = lambda: ValueError("secret")) -> Any:
    return lambda values: error() if any(value in bad for value in values) else None


# -- one bad item -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 40), st.booleans())
def test_one_bad_item_fails_alone_within_the_bound(data: st.DataObject, size: int, known_good: bool) -> None:
    culprit = data.draw(st.integers(0, size - 1))
    values = [f"v{i}" for i in range(size)]

    async def test(bench: Bench) -> None:
        if known_good:
            await bench.ask("good")
        picky = Picky(bench, raise_for(values[culprit]))
        items = bench.submit(*values)
        results = [await result(each) for each in items]
        assert [r.value for r in results] == [None if i == culprit else f"V{i}" for i in range(size)]
        assert isinstance(results[culprit].error, ModelFailed)
        assert len(picky.calls) - 1 <= 2 * math.ceil(math.log2(size)) + 1
        assert [len(call) for call in picky.calls[:1]] == [size]
        assert bench.batcher.trouble() == ""

    bench = drive(test, max_batch_size=64, group_by_length=False)
    assert len(bench.errors) == 1, "one incident for one culprit"
    assert {record.reason for record in bench.records[1 + known_good :]} <= {BatchReason.RETRY}


def test_a_failure_that_was_a_whim_of_the_moment_costs_nobody_his_answer() -> None:
    async def test(bench: Bench) -> None:
        whims = [ValueError("a hiccup")]
        Picky(bench, lambda values: whims.pop() if whims and len(values) > 1 else None)
        assert [r.value for r in await together(bench, "a", "b", "c")] == ["A", "B", "C"]

    bench = drive(test)
    assert len(bench.errors) == 1, "nobody was told, but the owner is"


def test_a_verdict_that_the_model_gives_in_its_forward_reaches_the_one_it_is_about() -> None:
    async def test(bench: Bench) -> None:
        Picky(bench, raise_for("odd", error=lambda: InputRejected("odd is odd")))
        results = await together(bench, "a", "odd", "c")
        assert [r.value for r in results] == ["A", None, "C"]
        assert str(results[1].error) == "odd is odd"
        assert bench.batcher.breaker.failures == 0

    assert not drive(test).errors


def test_clients_that_left_and_late_ones_are_not_run_again() -> None:
    async def test(bench: Bench) -> None:
        def bad(values: list[str]) -> BaseException | None:
            if len(values) == 4:
                bench.batcher.cancel([items[0]])
                time.sleep(0.06)  # past the deadline of "late"
                return ValueError()
            return None

        with busy(bench):
            picky = Picky(bench, bad)
            items = [bench.submit("gone")[0], bench.submit("late", timeout=0.05)[0], *bench.submit("c", "d")]
        assert [(await result(i)).value for i in items[2:]] == ["C", "D"]
        assert isinstance((await result(items[1])).error, DeadlineExceeded)
        assert picky.calls[1:] == [["c", "d"]], "who still waits"

    drive(test, drop_hopeless=False, group_by_length=False)


def test_a_search_ends_when_the_server_stops() -> None:
    async def test(bench: Bench) -> None:
        stopping = threading.Event()

        def bad(values: list[str]) -> BaseException | None:
            if values != ["busy"]:
                stopping.wait(PATIENCE)
            return ValueError()

        with busy(bench):
            picky = Picky(bench, bad)
            items = bench.submit(*"abcdefgh")
        await until(lambda: len(picky.calls) == 1)
        assert not await bench.batcher.stop(0.01)
        for each in items:
            assert isinstance((await result(each)).error, Unavailable)
        stopping.set()
        await until(lambda: not bench.batcher.alive)
        assert len(picky.calls) == 1, "nobody waits any more"

    drive(test)


# -- a model that fails everything ------------------------------------------------------------------------


def test_a_model_that_fails_everything_is_not_asked_over_and_over_and_then_not_at_all() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("good")
        picky = Picky(bench, lambda values: LookupError("secret"))
        spent = []
        for batch in range(5):
            before = len(picky.calls)
            for each in bench.submit(*[f"{batch}-{n}" for n in range(32)]):
                answer = await result(each)
                assert isinstance(answer.error, ModelFailed)
            await until(lambda: not bench.batcher.scheduler.in_flight)
            spent.append(len(picky.calls) - before)
        assert spent == [2] * 5, "the model's own example fails as well: no search"
        with pytest.raises(Unavailable, match="failed 5 times in a row, last with LookupError") as refused:
            bench.submit("x")
        assert refused.value.retry_after == pytest.approx(5, abs=1)
        assert "secret" not in bench.batcher.trouble()

        bench.batcher.breaker._until = time.monotonic()  # the pause is over: one at a time
        (probe,) = bench.submit("probe")
        assert isinstance((await result(probe)).error, ModelFailed)
        await until(lambda: bench.batcher.trouble() != "")
        assert bench.batcher.breaker.pause(time.monotonic()) == pytest.approx(10, abs=1)

        picky.bad = lambda values: None  # it is well again
        bench.batcher.breaker._until = time.monotonic()
        with busy(bench), pytest.raises(Unavailable, match="failed 6 times"):
            bench.submit("a second one")
        await until(lambda: bench.batcher.breaker.gate(time.monotonic()) is Gate.CLOSED)
        assert [r.value for r in await bench.ask("a", "b")] == ["A", "B"]

    drive(test, group_by_length=False, example=("example", {}))


def test_who_waits_when_the_breaker_opens_is_told_at_once() -> None:
    async def test(bench: Bench) -> None:
        def forward(batch: Sequence[Prepared[Any]]) -> Sequence[Any]:
            bench.model.inside.set()
            assert bench.model.gate.wait(PATIENCE)
            raise ValueError

        bench.model.forward = forward  # type: ignore[method-assign]
        for _ in range(4):
            await bench.ask("x")
        with busy(bench):
            waiting = [bench.submit(v)[0] for v in "abc"]
        for each in waiting:
            assert isinstance((await result(each)).error, Unavailable)

    drive(test, example=("example", {}))


def test_bad_inputs_alone_never_open_the_breaker_of_a_fresh_server_whose_model_has_an_example() -> None:
    async def test(bench: Bench) -> None:
        picky = Picky(bench, lambda values: None if values == ["example"] else ValueError())
        for number in range(10):
            (answer,) = await bench.ask(f"poison {number}")
            assert isinstance(answer.error, ModelFailed)
            await until(lambda: not bench.batcher.scheduler.in_flight)
            assert bench.batcher.breaker.failures == 0
        assert picky.calls.count(["example"]) == 10

    drive(test, example=("example", {"k": 1}))


def test_a_model_that_fails_its_own_example_every_time_opens_the_breaker() -> None:
    async def test(bench: Bench) -> None:
        picky = Picky(bench, lambda values: LookupError())
        for _ in range(5):
            await bench.ask("x")
        await until(lambda: bench.batcher.trouble() != "")
        assert picky.calls == [["x"], ["example"]] * 5

    drive(test, example=("example", {}))


def test_the_canary_is_the_models_own_example_and_no_clients_input() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a client's")
        picky = Picky(bench, raise_for("poison"))
        await bench.ask("poison")
        await until(lambda: not bench.batcher.scheduler.in_flight)
        assert picky.calls == [["poison"], ["example"]]

    drive(test, example=("example", {}))


@pytest.mark.parametrize("step", ["prepare", "finish"])
def test_a_model_that_fails_everything_before_or_after_its_forward_opens_the_breaker_too(step: str) -> None:
    async def test(bench: Bench) -> None:
        def broken(*args: Any) -> Any:
            raise LookupError

        setattr(bench.model, step, broken)
        for _ in range(5):
            (answer,) = await bench.ask("x")
            assert isinstance(answer.error, ModelFailed)
        await until(lambda: bench.batcher.trouble() != "")

    drive(test, example=("example", {}))


def test_after_a_wrong_number_of_outputs_each_input_runs_alone_and_those_that_fit_are_answered() -> None:
    async def test(bench: Bench) -> None:
        calls = []

        def forward(batch: Sequence[Prepared[Any]]) -> Sequence[Any]:
            calls.append(len(batch))
            return [each.payload.upper() for each in batch if each.payload != "left out"]

        bench.model.forward = forward  # type: ignore[method-assign]
        answers = await bench.ask("a", "b", "left out", "d")
        assert [each.value for each in answers] == ["A", "B", None, "D"]
        assert calls == [4, 1, 1, 1, 1]
        assert bench.batcher.trouble() == bench.batcher.doubt() == ""

    drive(test, group_by_length=False)


def test_a_lost_device_is_never_asked_again_and_the_advice_is_to_restart() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("good")
        lost = RuntimeError("CUDA error: device-side assert triggered\nsecret kernel")
        picky = Picky(bench, lambda values: lost)
        for each in bench.submit(*"abcd"):
            assert isinstance((await result(each)).error, ModelFailed)
        assert len(picky.calls) == 1
        with pytest.raises(Unavailable, match="restart the kernel") as refused:
            bench.submit("x")
        assert refused.value.retry_after is None
        assert bench.batcher.breaker.gate(time.monotonic() + 1e9) is Gate.LATCHED

    bench = drive(test)
    assert [kind(cause) for _, cause in bench.errors] == [FailureKind.DEVICE]


# -- memory -------------------------------------------------------------------------------------------


def out_of_memory() -> BaseException:
    return RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 42 bytes.")


def more_than(capacity: int) -> Callable[[list[str]], BaseException | None]:
    """A model that holds so many padded tokens; `Echo` counts a character as a token."""
    return lambda values: out_of_memory() if len(values) * max(map(len, values)) > capacity else None


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(3, 200))
def test_what_does_not_fit_together_is_halved_until_it_does(size: int, capacity: int) -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("ok")
        picky = Picky(bench, more_than(capacity))
        results = [await result(each) for each in bench.submit(*[f"v{n:02}" for n in range(size)])]
        assert [r.value for r in results] == [f"V{n:02}" for n in range(size)]
        assert len(picky.calls) <= 2 * size
        assert bench.batcher.trouble() == ""

        await until(lambda: not bench.batcher.scheduler.in_flight)
        calls = len(picky.calls)
        for each in bench.submit(*[f"w{n:02}" for n in range(size)]):
            assert (await result(each)).error is None
        again = picky.calls[calls:]
        assert all(len(call) == 1 or 3 * len(call) <= capacity for call in again), "it has learned"

    bench = drive(test, max_batch_size=64)
    assert len(bench.errors) == (3 * size > capacity), "one incident tells the owner"


def test_an_item_that_does_not_fit_alone_is_too_large_and_teaches_nothing() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("ok")
        Picky(bench, more_than(20))
        results = await together(bench, "a", "b" * 30, "c", "d")
        assert [r.value for r in results] == ["A", None, "C", "D"]
        assert isinstance(results[1].error, RequestTooLarge)
        assert bench.batcher.scheduler.ceiling.lowest(time.monotonic()) is None
        assert bench.batcher.trouble() == ""

    drive(test, group_by_length=False)


def test_memory_that_somebody_else_has_taken_is_not_the_clients_fault() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("ok")
        Picky(bench, lambda values: out_of_memory())
        for _ in range(6):
            try:
                answers = await bench.ask("a")
            except Unavailable:
                break
            assert isinstance(answers[0].error, (Unavailable, RequestTooLarge))
        assert isinstance(bench.errors[0][0], Unavailable)
        assert "failed 5 times in a row" in bench.batcher.trouble()

    drive(test, example=("ok", {}))


def test_what_a_failed_forward_held_is_given_back_before_the_next_one() -> None:
    import weakref

    class Tensor:
        pass

    async def test(bench: Bench) -> None:
        held: list[Any] = []

        def forward(batch: Sequence[Prepared[Any]]) -> Sequence[Any]:
            tensor = Tensor()
            tensor.itself = tensor  # type: ignore[attr-defined]  # a cycle, as models have
            assert all(reference() is None for reference in held), "the halves would not fit either"
            held.append(weakref.ref(tensor))
            if len(batch) > 1:
                raise MemoryError
            del tensor.itself  # type: ignore[attr-defined]
            return [batch[0].payload.upper()]

        with busy(bench):
            items = bench.submit("a", "b")
            bench.model.forward = forward  # type: ignore[method-assign]
        assert [(await result(i)).value for i in items] == ["A", "B"]
        assert len(held) == 3

    drive(test)


@pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("torch") is None, reason="asks Linux and torch"
)
def test_torch_on_a_machine_without_the_memory_answers_everybody_and_remembers() -> None:
    """A real allocator that gives no more than 1 GB; an input takes 192 MB."""
    run_script(
        """
        import pathlib, resource, time, torch
        import serving_kit

        def model(texts):
            torch.zeros(len(texts), 192, 2**18)
            return [text.upper() for text in texts]

        with serving_kit.serve(model, port=0, max_batch_size=16, max_batch_tokens=16) as server:
            server("warm")
            used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
            assert server(["a"] * 16) == ["A"] * 16
            deadline = time.monotonic() + 10
            while server.stats()["in_flight"] and time.monotonic() < deadline:
                time.sleep(0.01)
            stats = server.stats()
            assert stats["faults"]["out_of_memory"] == 1, stats["faults"]
            assert stats["cost"]["memory_limit_tokens"] == 4, stats["cost"]
            assert server(["b"] * 16) == ["B"] * 16
            assert server.stats()["faults"] == stats["faults"], "it is not found out again"
            assert server.stats()["state"] == "ready"
        """,
        timeout=60,
    )


# -- our own code dies --------------------------------------------------------------------------------


@cache
def idle_steps(code: CodeType) -> frozenset[int]:
    """Offsets of instructions that do nothing, or only jump."""
    steps = dis.get_instructions(code)
    return frozenset(step.offset for step in steps if step.opname == "NOP" or step.opname.startswith("JUMP"))


class Killed(BaseException):
    """What a test throws into the kit's own code."""


class KilledSoftly(Exception):
    """The same for the loop thread, where asyncio deals with exceptions of callbacks."""


class Assassin:
    """Raises at one line of the kit's own code, once, on the threads that it is set upon.

    Without a target it only notes which lines there are and how often each is passed.
    """

    FILES = frozenset(module.__file__ for module in KIT)

    def __init__(
        self,
        target: tuple[str, int] | None = None,
        visit: int = 1,
        error: type[BaseException] = Killed,
    ) -> None:
        self.target, self.visit, self.error = target, visit, error
        self.passed: Counter[tuple[str, int]] = Counter()
        self.armed, self.killed = True, False

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in self.FILES:
            return None
        visited: set[int] = set()

        def line_by_line(frame: Any, event: str, arg: Any) -> Any:
            if event == "line":
                place = (frame.f_code.co_filename, frame.f_lineno)
                # The end of a `with` block shows up as its first line once more, and a `break` in it as
                # a step that does nothing. What is raised there keeps the interpreter from leaving the
                # block: its own gap, which no code can close.
                leaving = place[1] in visited and linecache.getline(*place).strip().startswith("with ")
                leaving = leaving or frame.f_lasti in idle_steps(frame.f_code)
                visited.add(place[1])
                if not leaving:
                    self.passed[place] += self.armed
                    if self.armed and place == self.target and self.passed[place] == self.visit:
                        self.armed, self.killed = False, True
                        raise self.error(f"{Path(place[0]).name}:{place[1]}")
            return line_by_line

        return line_by_line


async def everything(bench: Bench) -> None:
    """A little of all that can happen to a batch."""

    def bad(values: list[str]) -> BaseException | None:
        if "oom" in values and len(values) > 1:
            return MemoryError()
        return ValueError() if "poison" in values else None

    bench.model.forward.bad = bad  # type: ignore[attr-defined]
    for values in (["good"], ["a", "poison", "c"], ["d", "oom"], ["bad"]):
        with contextlib.suppress(ServingError):
            items = bench.submit(*values)
            if values == ["d", "oom"]:
                bench.submit("late", timeout=1e-9)
                bench.batcher.cancel(bench.submit("gone"))
            await asyncio.wait([each.payload.future for each in items], timeout=1)


def live_with(assassin: Assassin) -> None:
    """All of it, with an assassin on the model thread: everybody is answered, once."""

    async def main() -> None:
        bench = Bench(group_by_length=False)
        Picky(bench, lambda values: None)
        threading.settrace(assassin)
        bench.batcher.start()
        threading.settrace(None)  # type: ignore[arg-type]
        await everything(bench)
        await bench.ask("later")
        armed, assassin.armed = assassin.armed, False
        (answer,) = await bench.ask("last")
        assert answer.value == "LAST", "it serves on"
        assassin.armed = armed
        assert await bench.batcher.stop(5)
        for item in bench.submitted:
            assert item.abandoned or item.payload.future.done() or item.state is State.DONE
        given_up = [item for item in bench.submitted if not item.payload.future.done()]
        assert [item.payload.value for item in given_up] in ([], ["gone"])
        assert not bench.batcher.alive
        assert bench.batcher.scheduler.in_flight == 0

    asyncio.run(main())


def test_the_model_thread_may_die_at_any_line_and_nobody_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr("tests.test_batching.free_memory", lambda *args, **more: None)  # 0.1 s if large
    scout = Assassin()
    live_with(scout)
    assert len(scout.passed) > 150
    murders = 0
    for place, times in scout.passed.items():
        for visit in {1, times} if place[0] in (batching.__file__, recovery.__file__) else {1}:
            assassin = Assassin(place, visit)
            try:
                live_with(assassin)
            except BaseException as error:
                error.add_note(f"killed at {place}, visit {visit}")
                raise
            murders += assassin.killed
    assert murders > 1.1 * len(scout.passed), "most of them were really tried"


def serve_with(assassin: Assassin) -> None:
    """Some requests through the service, with an assassin on the loop thread: each ends, once."""

    def shout(texts: list[str]) -> list[str]:
        if "poison" in texts:
            raise ValueError
        return [text.upper() for text in texts]

    ended: list[BaseException | str] = []

    async def client(kit: Service, *values: str, patience: float = 0.2) -> None:
        try:
            with kit.observe() as ticket:
                ticket.limit(patience)
                answer: BaseException | str = "".join(await kit.predict(values, {}, ticket))
        except BaseException as error:  # also the assassin's
            answer = error
        ended.append(answer)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        kit = Service(CallableModel(shout), Settings(max_queue_size=4))
        await kit.start()
        sys.settrace(assassin)
        try:
            clients = [
                asyncio.ensure_future(client(kit, *each))
                for each in (["a", "b"], ["poison"], ["c"], ["d"] * 5, ["e"])
            ]
            clients.append(asyncio.ensure_future(client(kit, "late", patience=1e-9)))
            await asyncio.sleep(0)
            clients[2].cancel()
            async with asyncio.timeout(PATIENCE):
                await asyncio.wait(clients)
        finally:
            sys.settrace(None)
        assert len(ended) == 6, "each ends once"
        assert kit.metrics.requests() in ((6, 5) if assassin.killed else (6,)), (
            "and is counted once, unless it is the counting that dies"
        )
        await client(kit, "last", patience=PATIENCE)
        assert ended[-1] == "LAST"
        assert kit.state()[0] == "ready"
        assert await kit.stop(PATIENCE)
        assert kit.batcher.scheduler.in_flight == 0

    asyncio.run(main())


def test_the_loop_threads_side_may_raise_at_any_line_and_nobody_hangs() -> None:
    before = sys.gettrace()  # a debugger's or a coverage tool's
    try:
        scout = Assassin()
        serve_with(scout)
        assert len(scout.passed) > 80
        murders = 0
        for place in scout.passed:
            assassin = Assassin(place, error=KilledSoftly)
            try:
                serve_with(assassin)
            except BaseException as error:
                error.add_note(f"killed at {place}")
                raise
            murders += assassin.killed
        assert murders > 0.9 * len(scout.passed)
    finally:
        sys.settrace(before)


def test_a_thread_that_the_system_will_not_give_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "_NO_THREAD_S", 0.01)
    start, refusals = threading.Thread.start, 3

    def stingy(thread: threading.Thread) -> None:
        nonlocal refusals
        if thread.name == batching.THREAD_NAME and refusals:
            refusals -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", stingy)

    async def test(bench: Bench) -> None:
        assert "is being started again" in bench.batcher.trouble()
        await until(lambda: bench.batcher.alive)
        assert [r.value for r in await bench.ask("a")] == ["A"]

    assert "can't start new thread" in repr(drive(test).errors[0][1].__cause__)


# -- the same over HTTP -------------------------------------------------------------------------------


class Moody:
    """Shouts; raises, stops or waits for a word as it is told."""

    def __init__(self) -> None:
        self.mood: BaseException | None = None
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def __call__(self, texts: list[str]) -> list[str]:
        self.inside.set()
        assert self.go_on.wait(30)
        if self.mood is not None:
            raise self.mood
        return [text.upper() for text in texts]


@pytest.fixture
def moody(serve: Any) -> Iterator[tuple[Any, Moody, httpx.Client]]:
    model = Moody()
    server = serve(model, timeout_ms=20_000)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield server, model, client
        model.go_on.set()


def health(client: httpx.Client) -> tuple[int, str, str]:
    answer = client.get("/health")
    return answer.status_code, answer.json()["status"], answer.json().get("reason", "")


def test_a_broken_model_turns_health_red_with_the_reason_and_green_again(
    moody: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, model, client = moody
    monkeypatch.setattr(breaker, "_DOUBT_S", 0.0)
    monkeypatch.setattr(breaker, "_DOUBT_PAUSE_S", 5.0)
    assert health(client) == (200, "ready", "")
    model.mood = LookupError("secret")
    statuses = [client.post("/", content=f"x{n}").status_code for n in range(5)]
    assert statuses == [500] * 5
    wait_until(lambda: health(client)[0] == 503)
    _, status, reason = health(client)
    assert status == "failed"
    assert "no request was answered for" in reason
    assert "the last failed with LookupError; it is tried again in" in reason
    refused = client.post("/", content="x")
    assert refused.status_code == 503
    assert refused.json()["error_type"] == "unavailable"
    assert 1 <= int(refused.headers["retry-after"]) <= 5
    assert "secret" not in refused.text + reason
    assert server.stats()["faults"]["error"] == 5
    assert 'serving_kit_faults_total{kind="error"} 5.0' in client.get("/metrics").text

    model.mood = None
    server._service.batcher.breaker._until = time.monotonic()
    status_code, status, reason = health(client)
    assert (status_code, status) == (200, "ready"), "or no balancer would ever send the request that heals it"
    assert "requests are let in to try again" in reason
    assert client.post("/", content="x").json() == "X"
    assert health(client) == (200, "ready", "")


def test_a_lost_device_is_on_health_with_the_advice(moody: Any) -> None:
    _, model, client = moody
    model.mood = RuntimeError("CUDA error: device-side assert triggered")
    assert client.post("/", content="x").status_code == 500
    assert health(client)[:2] == (503, "failed")
    assert "restart the kernel" in health(client)[2]
    refused = client.post("/", content="x")
    assert (refused.status_code, "retry-after" in refused.headers) == (503, False)


def test_an_input_that_does_not_fit_is_413(moody: Any) -> None:
    server, model, client = moody
    model.mood = MemoryError()
    refused = client.post("/", content="x")
    assert (refused.status_code, refused.json()["error_type"]) == (413, "request_too_large")
    assert server.stats()["faults"]["out_of_memory"] == 1


def test_a_stuck_forward_gives_504_on_time_and_health_says_so_and_stop_returns(
    moody: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, model, client = moody
    model.go_on.clear()
    monkeypatch.setattr(status_reader, "_STUCK_AT_LEAST_S", 0.3)
    server.tune(timeout_ms=100)
    began = time.monotonic()
    late = client.post("/", content="x")
    assert late.status_code == 504
    assert time.monotonic() - began < 2
    wait_until(lambda: health(client)[:2] == (503, "stuck"))
    assert "one model call has been running for" in health(client)[2]
    model.go_on.set()
    wait_until(lambda: health(client)[0] == 200)
    model.go_on.clear()
    model.inside.clear()
    assert client.post("/", content="x").status_code == 504
    began = time.monotonic()
    server.stop(0.2)
    assert time.monotonic() - began < 5
    model.go_on.set()


def test_clients_that_leave_free_their_places_and_the_forward_for_nobody_is_counted(moody: Any) -> None:
    server, model, client = moody
    model.go_on.clear()
    sockets = []
    for _ in range(3):
        sock = socket.create_connection(("127.0.0.1", client.base_url.port), timeout=5)
        sock.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\nx")
        sockets.append(sock)
        assert model.inside.wait(5)
    wait_until(lambda: server.stats()["queue_depth"] == 2)
    for sock in sockets:
        sock.close()
    wait_until(lambda: server.stats()["queue_depth"] == 0)
    wait_until(lambda: server.stats()["requests"]["cancelled"] == 3)
    model.go_on.set()
    wait_until(lambda: server.stats()["wasted_items"] == 1)
    assert server.stats()["items"] == 1, "who left the queue never ran"


def test_a_loop_thread_that_dies_leaves_nobody_waiting_and_the_cell_can_run_again(
    moody: Any, capsys: Any
) -> None:
    def die() -> None:
        raise SystemExit("killed")

    server, model, client = moody
    port = client.base_url.port
    assert client.post("/", content="x").json() == "X"
    model.go_on.clear()
    model.inside.clear()
    with ThreadPoolExecutor(2) as pool:
        over_http = pool.submit(client.post, "/", content="x")
        assert model.inside.wait(5)
        in_the_cell = pool.submit(server, "y")
        wait_until(lambda: server.stats()["in_flight"] == 2)
        server._inline.loop.call_soon_threadsafe(die)
        with pytest.raises((RuntimeError, Unavailable, CancelledError)):
            in_the_cell.result(10)
        answer = over_http.exception(10) or over_http.result()
        assert isinstance(answer, httpx.TransportError) or answer.status_code >= 500
        wait_until(lambda: not server._inline.alive)
        assert not server.running
        model.go_on.set()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        stats = server.stats()
        assert (stats["state"], stats["reason"]) == (
            "failed",
            "the server's thread has died: run serve() again",
        )
        assert ", failed," in repr(server)
        with pytest.raises(RuntimeError, match="stopped"):
            server("z")
        assert any("the server's thread has died" in line for line in server.logs())
        again = serving_kit.serve(model, port=port)
        client.close()
    assert again("z") == "Z"
    again.stop()
    assert capsys.readouterr().err == ""


# -- SIGTERM ------------------------------------------------------------------------------------------

SLOW_APP = """
import pathlib, time
import serving_kit

def slow(texts):
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    return [text.upper() for text in texts]

app = serving_kit.create_app(slow, max_batch_size=1, timeout_ms=10_000)
"""


@pytest.fixture
def under_uvicorn(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that answers nothing before there is a file `go` in the temporary folder."""
    (tmp_path / "server.py").write_text(SLOW_APP)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"},
    ) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(url), timeout=30)
        yield process, url
        process.kill()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_sigterm_finishes_what_was_admitted_and_lets_nobody_in(under_uvicorn: Any, tmp_path: Path) -> None:
    process, url = under_uvicorn
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(httpx.post, url, content=text, timeout=20) for text in "abc"]
        wait_until(lambda: httpx.get(f"{url}/stats").json()["in_flight"] == 3)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not answers(url), what="the end of new connections")
        (tmp_path / "go").touch()
        assert sorted(each.result(20).json() for each in asked) == ["A", "B", "C"]
    said, _ = process.communicate(timeout=10)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Application shutdown complete" in said
    assert "Traceback" not in said


def test_sigterm_is_bounded_also_while_a_forward_is_stuck(under_uvicorn: Any) -> None:
    process, url = under_uvicorn
    with ThreadPoolExecutor(2) as pool:
        soon = {"x-request-timeout-ms": "1000"}
        asked = [pool.submit(httpx.post, url, content=text, timeout=20, headers=soon) for text in "ab"]
        wait_until(lambda: httpx.get(f"{url}/stats").json()["in_flight"] == 2)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert [each.result(20).status_code for each in asked] == [504, 504]
        said, _ = process.communicate(timeout=20)
    assert time.monotonic() - began < 1 + 5 + 5, "the requests' own time, the drain, and some air"
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in said


# -- everything at once -------------------------------------------------------------------------------


def test_a_short_soak_loses_nothing() -> None:
    """`make soak` in small."""
    spec = importlib.util.spec_from_file_location("soak", REPOSITORY / "scripts" / "soak.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # its dataclass looks there
    try:
        spec.loader.exec_module(module)
        soak = module.Soak(3000, seconds=60)
        soak.run()
    finally:
        del sys.modules["soak"]
    print(soak.report())
    assert soak.problems == []
    assert soak.seen.total() + soak.left == 3000
    assert soak.seen["ok"] > 300, "how many depends on the machine: the knobs turn with the clock"
    assert {"malformed", "too_large", "rejected", "shed", "expired", "failed"} <= set(soak.seen)
