"""A model that fails, on its thread: which items run again, and what their clients are told."""

from __future__ import annotations

import importlib.util
import math
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_kit.errors import DeadlineExceeded, InputRejected, ModelFailed, RequestTooLarge, Unavailable
from serving_kit.failures.breaker import Gate
from serving_kit.model import Done as Ended
from serving_kit.model import FailureKind, Input, Part, StepResult
from serving_kit.models.memory import free_memory
from serving_kit.records import BatchReason
from tests.support import run_script
from tests.support_core import (
    Bench,
    Echo,
    busy,
    drive,
    ended,
    error_of,
    more_than,
    out_of_memory,
    raise_for,
    together,
    until,
    values_of,
)

pytestmark = pytest.mark.light

EXAMPLE = Input("example")


# -- one failing item ------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 40), st.booleans())
def test_one_item_fails_alone(data: st.DataObject, size: int, known_good: bool) -> None:
    bad = data.draw(st.integers(0, size - 1))
    values = [f"v{i}" for i in range(size)]

    async def test(bench: Bench) -> None:
        if known_good:
            await bench.ask("good")
        bench.model.bad = raise_for(values[bad])
        bench.model.steps.clear()
        ends = [await ended(each) for each in bench.submit(*values)]
        assert values_of(ends) == [None if i == bad else f"V{i}" for i in range(size)]
        assert isinstance(error_of(ends[bad]), ModelFailed)
        assert len(bench.model.steps) - 1 <= 2 * math.ceil(math.log2(size)) + 1
        assert len(bench.model.steps[0]) == size
        assert bench.batcher.status().unavailable_reason == ""

    bench = drive(test, max_batch_size=64, group_by_length=False)
    assert len(bench.failures) == 1
    assert {record.reason for record in bench.batches[1 + known_good :]} <= {BatchReason.RETRY}


def test_transient_failure() -> None:
    """No client is told, but the owner is."""

    async def test(bench: Bench) -> None:
        failures = [ValueError("transient")]
        bench.model.bad = lambda values: failures.pop() if failures and len(values) > 1 else None
        assert values_of(await together(bench, "a", "b", "c")) == ["A", "B", "C"]

    assert len(drive(test).failures) == 1


def test_rejected_in_the_step() -> None:
    async def test(bench: Bench) -> None:
        bench.model.bad = raise_for("odd", error=lambda: InputRejected("odd is odd"))
        ends = await together(bench, "a", "odd", "c")
        assert values_of(ends) == ["A", None, "C"]
        assert str(error_of(ends[1])) == "odd is odd"
        assert bench.batcher.status().degraded_reason == ""

    assert not drive(test).failures


def test_left_and_late_are_not_run_again() -> None:
    async def test(bench: Bench) -> None:
        def bad(values: list[str]) -> BaseException | None:
            if len(values) == 4:
                bench.batcher.cancel([items[0]])
                time.sleep(0.06)  # past the deadline of "late"
                return ValueError()
            return None

        with busy(bench):
            bench.model.bad = bad
            items = [bench.submit("gone")[0], bench.submit("late", timeout_s=0.05)[0]]
            items += bench.submit("c", "d")
        assert values_of([await ended(i) for i in items[2:]]) == ["C", "D"]
        assert isinstance(error_of(await ended(items[1])), DeadlineExceeded)
        assert bench.model.steps[2:] == [["c", "d"]]

    drive(test, drop_hopeless=False, group_by_length=False)


# -- a model that fails everything -----------------------------------------------------------------


def test_broken_model() -> None:
    """It is asked twice for each batch, and after five of them no more until the pause is over."""

    async def test(bench: Bench) -> None:
        await bench.ask("good")
        bench.model.bad = lambda values: LookupError("secret")
        spent = []
        for number in range(5):
            before = len(bench.model.steps)
            for each in bench.submit(*[f"{number}-{n}" for n in range(32)]):
                assert isinstance(error_of(await ended(each)), ModelFailed)
            await bench.idle()
            spent.append(len(bench.model.steps) - before)
        assert spent == [2] * 5, "the batch and the example"
        with pytest.raises(Unavailable, match="failed 5 times in a row, last with LookupError") as refused:
            bench.submit("x")
        assert refused.value.retry_after == pytest.approx(5, abs=1)
        assert "secret" not in bench.batcher.status().unavailable_reason

        bench.skipped_s += 6  # the pause is over: one at a time
        (trial,) = bench.submit("trial")
        assert isinstance(error_of(await ended(trial)), ModelFailed)
        await until(lambda: bench.batcher.status().unavailable_reason)
        with pytest.raises(Unavailable) as refused:
            bench.submit("x")
        assert refused.value.retry_after == pytest.approx(10, abs=1)

        bench.model.bad = lambda values: None
        bench.skipped_s += 11
        with busy(bench), pytest.raises(Unavailable, match="failed 6 times"):
            bench.submit("a second one")
        await until(lambda: bench.batcher.status().breaker is Gate.CLOSED)
        assert values_of(await bench.ask("a", "b")) == ["A", "B"]

    drive(test, Echo(EXAMPLE), group_by_length=False)


def test_waiting_when_the_breaker_opens() -> None:
    async def test(bench: Bench) -> None:
        bench.model.bad = lambda values: ValueError()
        for _ in range(4):
            await bench.ask("x")
        with busy(bench):
            waiting = [bench.submit(value)[0] for value in "abc"]
        for each in waiting:
            assert isinstance(error_of(await ended(each)), Unavailable)

    drive(test, Echo(EXAMPLE))


def test_bad_inputs_with_an_example() -> None:
    """Alone they never open the breaker."""

    async def test(bench: Bench) -> None:
        bench.model.bad = lambda values: None if values == ["example"] else ValueError()
        for number in range(10):
            assert isinstance(error_of((await bench.ask(f"poison {number}"))[0]), ModelFailed)
            await bench.idle()
            assert bench.batcher.status().degraded_reason == ""
        assert bench.model.steps.count(["example"]) == 10
        assert bench.batcher.status().breaker is Gate.CLOSED

    drive(test, Echo(Input("example", {"k": 1})))


def test_broken_example() -> None:
    async def test(bench: Bench) -> None:
        bench.model.bad = lambda values: LookupError()
        for _ in range(5):
            await bench.ask("x")
        await until(lambda: bench.batcher.status().unavailable_reason)
        assert bench.model.steps == [["x"], ["example"]] * 5

    drive(test, Echo(EXAMPLE))


def test_canary_is_no_clients_input() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("a client's")
        bench.model.bad = raise_for("poison")
        await bench.ask("poison")
        await bench.idle()
        assert bench.model.steps == [["a client's"], ["poison"], ["example"]]

    drive(test, Echo(EXAMPLE))


@pytest.mark.parametrize("stage", ["prepare", "finish"])
def test_broken_around_the_step(stage: str) -> None:
    async def test(bench: Bench) -> None:
        def broken(*args: Any) -> Any:
            raise LookupError

        setattr(bench.model, stage, broken)
        for _ in range(5):
            assert isinstance(error_of((await bench.ask("x"))[0]), ModelFailed)
        await until(lambda: bench.batcher.status().unavailable_reason)

    drive(test, Echo(EXAMPLE))


def test_output_left_out() -> None:
    """Each input runs alone, and those with one output are answered."""

    async def test(bench: Bench) -> None:
        def step(parts: Sequence[Part]) -> list[StepResult]:
            values = [part.prepared.payload.value for part in parts]
            bench.model.steps.append(values)
            return [Ended(value.upper()) for value in values if value != "left out"]

        bench.model.step = step  # type: ignore[method-assign]
        assert values_of(await bench.ask("a", "b", "left out", "d")) == ["A", "B", None, "D"]
        assert [len(values) for values in bench.model.steps] == [4, 1, 1, 1, 1]
        status = bench.batcher.status()
        assert status.unavailable_reason == status.degraded_reason == ""

    drive(test, group_by_length=False)


def test_lost_device() -> None:
    """The model is asked no more, and the advice is to restart."""

    async def test(bench: Bench) -> None:
        await bench.ask("good")
        lost = RuntimeError("CUDA error: device-side assert triggered\nsecret kernel")
        bench.model.bad = lambda values: lost
        for each in bench.submit(*"abcd"):
            assert isinstance(error_of(await ended(each)), ModelFailed)
        assert len(bench.model.steps) == 2
        with pytest.raises(Unavailable, match="restart the kernel") as refused:
            bench.submit("x")
        assert refused.value.retry_after is None
        bench.skipped_s += 1e9
        assert bench.batcher.status().breaker is Gate.LATCHED

    assert [record.kind for record in drive(test).failures] == [FailureKind.DEVICE]


# -- memory ----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(3, 200))
def test_halved_until_it_fits(size: int, capacity: int) -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("ok")
        bench.model.bad = more_than(capacity)
        bench.model.steps.clear()
        ends = [await ended(each) for each in bench.submit(*[f"v{n:02}" for n in range(size)])]
        assert values_of(ends) == [f"V{n:02}" for n in range(size)]
        assert len(bench.model.steps) <= 2 * size
        assert bench.batcher.status().unavailable_reason == ""

        await bench.idle()
        bench.model.steps.clear()
        ends = [await ended(each) for each in bench.submit(*[f"w{n:02}" for n in range(size)])]
        assert None not in values_of(ends)
        assert all(len(step) == 1 or 3 * len(step) <= capacity for step in bench.model.steps), "learned"

    bench = drive(test, max_batch_size=64)
    assert len(bench.failures) == (3 * size > capacity)


def test_too_large_alone() -> None:
    """It teaches nothing about the others."""

    async def test(bench: Bench) -> None:
        await bench.ask("ok")
        bench.model.bad = more_than(20)
        ends = await together(bench, "a", "b" * 30, "c", "d")
        assert values_of(ends) == ["A", None, "C", "D"]
        assert isinstance(error_of(ends[1]), RequestTooLarge)
        status = bench.batcher.status()
        assert (status.memory_limit_tokens, status.unavailable_reason) == (None, "")

    drive(test, group_by_length=False)


def test_memory_that_others_have_taken() -> None:
    async def test(bench: Bench) -> None:
        await bench.ask("ok")
        bench.model.bad = lambda values: out_of_memory()
        for _ in range(6):
            try:
                (end,) = await bench.ask("a")
            except Unavailable:
                break
            assert isinstance(error_of(end), (Unavailable, RequestTooLarge))
            await bench.idle()
        assert isinstance(bench.failures[0].error, Unavailable)
        assert "failed 5 times in a row" in bench.batcher.status().unavailable_reason

    drive(test, Echo(Input("ok")))


def test_memory_is_back_before_the_retry() -> None:
    """What the failed step held: in the frames of its traceback, and in cycles."""

    class Tensor:
        pass

    async def test(bench: Bench) -> None:
        held: list[Any] = []

        def step(parts: Sequence[Part]) -> list[StepResult]:
            tensor = Tensor()
            tensor.itself = tensor  # type: ignore[attr-defined]  # a cycle, as models have
            assert all(reference() is None for reference in held), "the halves would not fit either"
            held.append(weakref.ref(tensor))
            if len(parts) > 1:
                raise MemoryError
            del tensor.itself  # type: ignore[attr-defined]
            return [Ended(parts[0].prepared.payload.value.upper())]

        bench.model.free_memory = free_memory  # type: ignore[method-assign, assignment]
        with busy(bench):
            items = bench.submit("a", "b")
            bench.model.step = step  # type: ignore[method-assign]
        assert values_of([await ended(i) for i in items]) == ["A", "B"]
        assert len(held) == 3

    drive(test)


@pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("torch") is None, reason="asks Linux and torch"
)
def test_torch_without_the_memory() -> None:
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
