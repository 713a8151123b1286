"""Actions performed on a model: what it raises is a value, and what ends is released."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from serving_kit import execution
from serving_kit.actions import Answered, Canary, Executed, Free, Prepare, Release, Step
from serving_kit.errors import InputRejected
from serving_kit.execution import perform
from serving_kit.failures.classify import Failure
from serving_kit.items import Item, ItemState
from serving_kit.model import Done, FailureKind, Input, More, Part, Prepared, StepResult, Work
from serving_kit.model import Failed as FailedAlone
from serving_kit.records import BatchReason
from tests.support_core import Echo, running

pytestmark = pytest.mark.light


class Clock:
    """Ten seconds more at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10.0
        return self.now


def step(model: Echo, items: Sequence[Item]) -> Executed:
    result = perform(model, Step(items, BatchReason.IDLE, 0, 0.0), Clock())
    assert isinstance(result, Executed)
    return result


def waiting(value: str, **parameters: Any) -> Item:
    return Item(0.0, 1e6, 1, Input(value, parameters))


# -- prepare ---------------------------------------------------------------------------------------


def test_prepare() -> None:
    items = [waiting("a", k=1), waiting("bad")]
    prepared, rejected = perform(Echo(), Prepare(items), Clock())  # type: ignore[misc]
    assert isinstance(prepared, Prepared)
    assert (prepared.work, prepared.key) == (Work(longest=1), (("k", 1),))
    assert isinstance(rejected, Failure)
    assert isinstance(rejected.error, InputRejected)
    assert rejected.rejects_input


def test_prepare_skips_what_has_ended() -> None:
    model, item = Echo(), waiting("a")
    item.state = ItemState.DONE
    assert perform(model, Prepare([item]), Clock()) == [None]
    assert model.prepared == []


def test_prepare_that_raises_stops_no_other() -> None:
    model = Echo()
    model.raises["prepare"] = KeyboardInterrupt()
    failed, prepared = perform(model, Prepare([waiting("a"), waiting("b")]), Clock())  # type: ignore[misc]
    assert isinstance(failed, Failure)
    assert isinstance(prepared, Prepared)


# -- step ------------------------------------------------------------------------------------------


def test_step() -> None:
    model = Echo()
    executed = step(model, [running("a"), running("b")])
    assert executed == Executed(10.0, 20.0, [Answered("A"), Answered("B")], unreleased=[])
    assert model.released.total() == 2


def test_step_grants_the_tokens_of_the_item() -> None:
    model, item = Echo(), running("abc")
    item.tokens = 7
    step(model, [item])
    assert model.granted == [[7]]


@pytest.mark.parametrize("error", [ValueError(), SystemExit(), MemoryError()])
def test_step_that_raises(error: BaseException) -> None:
    """Nothing is released: its parts may run again."""
    model = Echo()
    model.raises["step"] = error
    executed = step(model, [running("a")])
    assert executed.failure is not None
    assert executed.failure.error is error
    assert executed.results == ()
    assert model.released.total() == 0


def test_step_with_too_few_results() -> None:
    model = Echo()
    model.raises["short"] = ValueError()
    failure = step(model, [running("a"), running("b")]).failure
    assert failure is not None
    assert failure.kind is FailureKind.OUTPUTS
    assert str(failure.error) == "inputs given to the model: 2; outputs that it returned: 1"


def test_step_without_results() -> None:
    model = Echo()
    model.step = lambda parts: None  # type: ignore[assignment, method-assign, return-value]
    failure = step(model, [running("a")]).failure
    assert failure is not None
    assert isinstance(failure.error, TypeError)


def test_mixed_results() -> None:
    """One has ended, one goes on, one has failed alone, and one gave something else."""
    error = ValueError()
    results: list[Any] = [Done("A"), More("chunk", Work(longest=2)), FailedAlone(error), "what?"]
    model = Echo()
    model.step = lambda parts: results  # type: ignore[assignment, method-assign]
    items = [running(value) for value in "abcd"]
    answered, more, failed, odd = step(model, items).results
    assert answered == Answered("A")
    assert more == More("chunk", Work(longest=2))
    assert failed == Failure(error, FailureKind.ERROR, "ValueError: ")
    assert isinstance(odd, Failure)
    released = {payload.value for payload in model.released}
    assert released == {"a", "c", "d"}, "what goes on keeps its cache"


def test_finish_takes_time() -> None:
    """The next step waits for it, so it is part of what this one costs."""
    model, now = Echo(), [0.0]

    def finish(prepared: object, output: object) -> object:
        now[0] += 5.0
        return output

    model.finish = finish  # type: ignore[method-assign]
    executed = execution.step(model, [running("a"), running("b")], lambda: now[0])
    assert (executed.started, executed.ended) == (0.0, 10.0)


def test_finish_that_raises() -> None:
    """It fails alone, and is released."""
    model = Echo()
    model.raises["finish"] = LookupError()
    failed, answered = step(model, [running("a"), running("b")]).results
    assert isinstance(failed, Failure)
    assert answered == Answered("B")
    assert model.released.total() == 2


def test_step_before_prepare() -> None:
    with pytest.raises(AssertionError, match="This is a bug"):
        step(Echo(), [waiting("a")])


# -- the rest --------------------------------------------------------------------------------------


def test_canary() -> None:
    model = Echo()
    assert perform(model, Canary(Input("example")), Clock()) is True
    assert model.steps == [["example"]]
    assert model.released.total() == 1


@pytest.mark.parametrize("stage", ["prepare", "step", "finish"])
def test_canary_that_raises(stage: str) -> None:
    model = Echo()
    model.raises[stage] = SystemExit()
    assert perform(model, Canary(Input("example")), Clock()) is False
    assert model.released.total() == (stage != "prepare")


def test_canary_that_fails_alone() -> None:
    model = Echo()
    model.step = lambda parts: [FailedAlone(ValueError())]  # type: ignore[assignment, method-assign, return-value]
    assert perform(model, Canary(Input("example")), Clock()) is False


def test_canary_that_goes_on() -> None:
    """One step is enough: streams wait meanwhile, and the example might never end."""
    model, granted = Echo(), list[int]()

    def go_on(parts: Sequence[Part]) -> list[StepResult]:
        granted.append(parts[0].tokens)
        return [More(work=Work(longest=2))]

    model.step = go_on  # type: ignore[method-assign]
    assert perform(model, Canary(Input("example")), Clock()) is True
    assert granted == [7]
    assert model.released.total() == 1


class Hostile(Exception):
    """An exception whose text cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_release_that_raises() -> None:
    """The item keeps its answer, and the failure is a value."""
    model, error = Echo(), Hostile()

    def refuse(prepared: object) -> None:
        raise error

    model.release = refuse  # type: ignore[method-assign]
    executed = step(model, [running("a")])
    assert executed.results == [Answered("A")]
    assert [each.error for each in executed.unreleased] == [error]


def test_last_chunk_comes_with_the_answer() -> None:
    model = Echo()
    model.advance = lambda payload: Done("A", "last")  # type: ignore[method-assign]
    assert step(model, [running("a")]).results == [Answered("A", "last")]


def test_classify_that_raises() -> None:
    model = Echo()
    model.raises["step"] = ValueError()

    def refuse(error: BaseException) -> FailureKind:
        raise LookupError

    model.classify = refuse  # type: ignore[method-assign]
    failure = step(model, [running("a")]).failure
    assert failure is not None
    assert failure.kind is FailureKind.ERROR


def test_fingerprints_of_what_failed() -> None:
    """Equal for equal inputs, also for those that are not hashable."""
    model = Echo()
    items = [running("a"), running("a"), running("b")]
    model.raises["step"] = ValueError()
    step(model, items)
    assert items[0].fingerprint == items[1].fingerprint != items[2].fingerprint


def test_free() -> None:
    model, failure = Echo(), Failure(MemoryError(), FailureKind.MEMORY)
    assert perform(model, Free(failure, thorough=True), Clock()) == []
    assert model.freed == [(failure.error, True)]


def test_release() -> None:
    model, items = Echo(), [running("a"), running("b")]
    assert perform(model, Release([item.prepared for item in items if item.prepared]), Clock()) == []
    assert {payload.value for payload in model.released} == {"a", "b"}
