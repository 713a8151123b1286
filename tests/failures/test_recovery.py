"""What follows from a step that raised: the generators of the recovery, and the engine that drives them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_kit.errors import DeadlineExceeded, InputRejected, ModelFailed, RequestTooLarge, Unavailable
from serving_kit.events import Done, Failed
from serving_kit.failures.breaker import Gate
from serving_kit.failures.classify import Failure, WrongNumberOfOutputs, kind
from serving_kit.failures.recovery import (
    Conclusions,
    Expire,
    FreeMemory,
    Isolated,
    Recovery,
    Reply,
    Request,
    Rerun,
    RunCanary,
    Settle,
    attribute,
    recover,
)
from serving_kit.items import Item
from serving_kit.model import Failed as FailedAlone
from serving_kit.model import Input
from tests.support_core import Bad, Bed, Echo, Payload, raise_for, running

pytestmark = pytest.mark.light


def values(items: Sequence[Item]) -> list[str]:
    return [item.input.value for item in items]


class Driver:
    """Drives one recovery with a model that is a function of what a step holds; every run takes a second.

    Attributes:
        requests: What the recovery asked for, in order.
        answered: Values that were answered.
        settled: Values that got a failure, with it.
    """

    def __init__(self, bad: Bad, *, canary: bool | None = True) -> None:
        self.bad = bad
        self.canary = canary  # whether it is answered; None: there is none
        self.now = 1.0
        self.requests: list[Request] = []
        self.answered: list[str] = []
        self.settled: dict[str, Settle] = {}
        self.expired: list[str] = []

    def recover(self, items: Sequence[Item], *, retry: bool = True, thorough: bool = False) -> Conclusions:
        error = self.bad(values(items))
        assert error is not None
        return self.run(
            recover(
                items,
                failure(error),
                self.now,
                has_canary=self.canary is not None,
                retry=retry,
                thorough=thorough,
            )
        )

    def run(self, recovery: Recovery, reply: Reply | None = None) -> Conclusions:
        while True:
            try:
                request = next(recovery) if reply is None else recovery.send(reply)
            except StopIteration as stop:
                conclusions: Conclusions = stop.value
                return conclusions
            self.requests.append(request)
            reply = self.reply_to(request)

    @property
    def reruns(self) -> list[list[str]]:
        return [values(each.items) for each in self.requests if isinstance(each, Rerun)]

    @property
    def canaries(self) -> int:
        return sum(isinstance(each, RunCanary) for each in self.requests)

    def reply_to(self, request: Request) -> Reply:
        if isinstance(request, Settle):
            for value in values(request.items):
                assert value not in self.settled
                assert value not in self.answered
                self.settled[value] = request
        elif isinstance(request, Expire):
            self.expired += values(request.items)
        elif isinstance(request, RunCanary):
            self.now += 1
            return Reply(self.now, healthy=self.canary is True)
        elif isinstance(request, Rerun):
            self.now += 1
            error = self.bad(values(request.items))
            if error is not None:
                return Reply(self.now, failure(error))
            self.answered += values(request.items)
        return Reply(self.now)


def failure(error: BaseException) -> Failure:
    return Failure(error, kind(error))


def batch(size: int) -> list[Item]:
    return [running(f"v{n}") for n in range(size)]


# -- one failed step ---------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data(), st.integers(1, 30), st.sampled_from([True, False, None]), st.booleans())
def test_one_outcome_for_each(data: st.DataObject, size: int, canary: bool | None, retry: bool) -> None:
    """Whatever fails, expires or is cancelled."""
    names = st.sets(st.sampled_from([f"v{n}" for n in range(size)]))
    gone, late = data.draw(names), data.draw(names)
    bad = data.draw(names) | {f"v{data.draw(st.integers(0, size - 1))}"}
    items = batch(size)
    for item in items:
        item.cancelled = item.input.value in gone
        if item.input.value in late:
            item.deadline = data.draw(st.floats(0.5, 20))
    driver = Driver(raise_for(*bad), canary=canary)
    conclusions = driver.recover(items, retry=retry)
    ends = [*driver.answered, *driver.settled, *driver.expired]
    assert len(ends) == len(set(ends))
    assert set(ends) >= {f"v{n}" for n in range(size)} - gone
    assert set(ends).isdisjoint(gone - late)
    assert bad.isdisjoint(driver.answered)
    if canary is not False and retry and size <= 2:
        assert set(driver.answered) >= {f"v{n}" for n in range(size)} - bad - late - gone
    assert len(driver.reruns) <= (2 * size if retry else 0)
    assert (conclusions.unreported is None) == bool(driver.settled)


def test_failing_canary_ends_it() -> None:
    """It counts against the model."""
    driver = Driver(lambda values: LookupError(), canary=False)
    conclusions = driver.recover(batch(8))
    assert (driver.reruns, driver.canaries) == ([], 1)
    assert [each.healthy for each in conclusions.attributed] == [False]
    assert len(driver.settled) == 8
    assert not any(each.alone for each in driver.settled.values())


def test_bisection_to_the_failing_item() -> None:
    driver = Driver(raise_for("v2"))
    conclusions = driver.recover(batch(4))
    assert sorted(driver.reruns) == [["v0", "v1"], ["v2"], ["v2", "v3"], ["v3"]]
    assert list(driver.settled) == ["v2"]
    assert not conclusions.attributed
    assert conclusions.unreported is None


def test_no_canary_runs_only_its_own_items() -> None:
    driver = Driver(raise_for("v0"), canary=None)
    conclusions = driver.recover([running("v0")])
    assert (driver.reruns, driver.canaries) == ([], 0)
    assert [each.healthy for each in conclusions.attributed] == [None]


@settings(deadline=None)
@given(st.data(), st.integers(2, 40))
def test_thorough_finds_every_good_item(data: st.DataObject, size: int) -> None:
    good = f"v{data.draw(st.integers(0, size - 1))}"
    driver = Driver(lambda values: None if values == [good] else ValueError(), canary=None)
    driver.recover(batch(size), thorough=True)
    assert driver.answered == [good]
    assert len(driver.reruns) <= 2 * size - 2


def test_without_retry_it_fails_whole() -> None:
    driver = Driver(raise_for("v0"))
    conclusions = driver.recover(batch(8), retry=False)
    assert (driver.reruns, driver.canaries) == ([], 1)
    assert len(driver.settled) == 8
    assert not conclusions.attributed


def test_wrong_number_of_outputs() -> None:
    """Every item that is left runs alone."""

    def bad(values: list[str]) -> BaseException | None:
        if len(values) == 4:
            return ValueError()
        return WrongNumberOfOutputs() if "a" in values else None

    driver = Driver(bad)
    driver.recover([running(value) for value in "abcd"])
    assert driver.reruns == [list("ab"), ["c"], ["d"], ["a"], ["b"]]
    assert sorted(driver.answered) == list("bcd")

    driver = Driver(raise_for("a", error=WrongNumberOfOutputs))
    driver.recover([running(value) for value in "abcd"])
    assert driver.reruns == [["a"], ["b"], ["c"], ["d"]]
    assert driver.answered == list("bcd")


def test_device_lost_during_the_bisection() -> None:
    def bad(values: list[str]) -> BaseException | None:
        error = RuntimeError("CUDA error: device-side assert triggered")
        return ValueError() if len(values) == 4 else error

    driver = Driver(bad)
    driver.recover([running(value) for value in "abcd"])
    assert len(driver.reruns) == 1
    assert len(driver.settled) == 4


def test_no_client_left() -> None:
    driver = Driver(raise_for("v0"))
    items = [running("v0"), running("v1", deadline=0.5)]
    items[0].cancelled = True
    conclusions = driver.recover(items)
    assert (driver.reruns, driver.canaries) == ([], 0)
    assert driver.expired == ["v1"]
    assert conclusions.unreported is not None


def test_expired_while_the_canary_runs() -> None:
    driver = Driver(raise_for("v0"))
    driver.recover([running("v0", deadline=1.5), running("v1", deadline=1.5)])
    assert driver.expired == ["v0", "v1"]
    assert driver.reruns == []


def test_skipped_rerun() -> None:
    """Its clients have left since it was asked for; the bisection goes on."""
    items = batch(4)
    recovery = recover(items, failure(ValueError()), 1.0, has_canary=False, retry=True, thorough=True)
    first = next(recovery)
    assert isinstance(first, Rerun)
    for item in first.items:
        item.cancelled = True
    second = recovery.send(Reply(2.0, skipped=True))
    assert isinstance(second, Rerun)
    assert not set(first.items) & set(second.items)
    driver = Driver(lambda values: ValueError(), canary=None)
    conclusions = driver.run(recovery, driver.reply_to(second))
    assert conclusions.attributed, "what was skipped was not answered"


# -- memory ------------------------------------------------------------------------------------------


def test_too_many_together() -> None:
    """The halves run anyway, and the least that did not fit is reported."""
    driver = Driver(lambda values: MemoryError() if len(values) > 2 else None)
    conclusions = driver.recover([running("vvvv"), *batch(8)[1:]])
    assert conclusions.too_large is not None
    assert values(conclusions.too_large.items) == ["v4", "v5", "v6", "v7"]
    assert (conclusions.too_large.longest, conclusions.too_large.computed_tokens) == (2, 8)
    assert driver.canaries == 0
    assert len(driver.answered) == 8


def test_too_large_alone() -> None:
    driver = Driver(raise_for("large", error=MemoryError))
    conclusions = driver.recover([running("large"), running("v1")])
    assert conclusions.too_large is None
    assert driver.settled["large"].alone
    assert driver.answered == ["v1"]


def test_no_canary_after_an_answer() -> None:
    driver = Driver(raise_for("large", error=MemoryError))
    driver.recover([running("v1"), running("large")])
    assert driver.canaries == 0


@pytest.mark.parametrize("size", [1, 2])
def test_no_memory_for_the_canary(size: int) -> None:
    """It is not the inputs."""
    driver = Driver(lambda values: MemoryError(), canary=False)
    conclusions = driver.recover(batch(size))
    assert not any(each.alone for each in driver.settled.values())
    assert (len(driver.reruns), driver.canaries) == (size - 1, 1)
    assert [each.healthy for each in conclusions.attributed] == [False]


def test_every_item_too_large() -> None:
    driver = Driver(lambda values: MemoryError())
    conclusions = driver.recover(batch(2))
    assert all(each.alone for each in driver.settled.values())
    assert not conclusions.attributed


def test_memory_is_freed_each_time() -> None:
    driver = Driver(raise_for("large", error=MemoryError))
    driver.recover([running(value) for value in ("large", "b", "c", "d")])
    kinds = [type(each) for each in driver.requests]
    assert kinds.count(FreeMemory) == 3, "the batch, its half, the one"
    for before, after in itertools.pairwise(kinds):
        assert before is not FreeMemory or after in (Rerun, RunCanary, Settle)


def test_memory_without_retry() -> None:
    driver = Driver(lambda values: MemoryError(), canary=None)
    conclusions = driver.recover(batch(8), retry=False)
    assert conclusions.too_large is not None
    assert len(conclusions.too_large.items) == 8
    assert not any(each.alone for each in driver.settled.values())
    driver = Driver(lambda values: MemoryError(), canary=None)
    driver.recover(batch(1), retry=False)
    assert driver.settled["v0"].alone


# -- single items ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "canary", "healthy"),
    [
        (ValueError(), True, []),
        (ValueError(), False, [False]),
        (ValueError(), None, [None]),
        (ModelFailed("of a finish"), False, [False]),
        (InputRejected("no mask"), False, []),
        (RuntimeError("CUDA error: device-side assert triggered"), True, [False]),
    ],
)
def test_what_counts_against_the_model(
    error: Exception, canary: bool | None, healthy: list[bool | None]
) -> None:
    driver = Driver(lambda values: None, canary=canary)
    isolated = Isolated(running("v"), failure(error))
    conclusions = driver.run(attribute([isolated], canary is not None))
    assert [each.healthy for each in conclusions.attributed] == healthy


def test_one_canary_for_several_items() -> None:
    driver = Driver(lambda values: None, canary=False)
    several = [Isolated(item, failure(ValueError())) for item in batch(3)]
    assert len(driver.run(attribute(several, True)).attributed) == 3
    assert driver.canaries == 1


# -- the engine --------------------------------------------------------------------------------------

EXAMPLE = Input("good")


class StepBed(Bed):
    """An engine around a model that is a function of what a step holds."""

    def __init__(self, bad: Bad, canary: Input | None = EXAMPLE, *, retry: bool = True) -> None:
        super().__init__(Echo(canary), retry=retry, max_batch_size=64)
        self.model.bad = bad

    def treat(self, *values: str) -> None:
        """What becomes of items that share a step, once for each."""
        self.ask(*values)
        self.check_released()


def test_failures_of_the_model_are_counted() -> None:
    bed = StepBed(lambda values: LookupError())
    for failures in (1, 2):
        bed.treat(*"abcdefgh")
        assert bed.model.steps == [list("abcdefgh"), ["good"]] * failures
        assert len(bed.failures) == failures
        assert bed.engine.breaker.failures == failures


def test_an_answer_clears_inconclusive_failures() -> None:
    bed = StepBed(raise_for("v0", "v1"), canary=None)
    bed.treat("v0", "v1")
    assert bed.engine.breaker.failures == 0
    assert bed.engine.breaker.has_failures
    bed.treat("v0", "v2")
    assert not bed.engine.breaker.has_failures


@settings(deadline=None)
@given(st.data(), st.integers(2, 40))
def test_good_input_among_bad_ones(data: st.DataObject, size: int) -> None:
    """Without a canary, before the breaker has opened, it is found among any number."""
    names = [f"v{n}" for n in range(size)]
    good = data.draw(st.sampled_from(names))
    bed = StepBed(lambda values: None if values == [good] else ValueError(), canary=None)
    bed.treat(*names)
    assert [name for name in names if isinstance(bed.end(name), Done)] == [good]
    assert len(bed.model.steps) <= 2 * size - 1


def test_short_bisection_once_it_has_opened() -> None:
    bed = StepBed(lambda values: ValueError(), canary=None)
    for number in range(12):
        bed.now += 1
        try:
            bed.treat(f"v{number}")
        except Unavailable:
            continue
    assert bed.engine.breaker.reason
    bed.now += 10
    before = len(bed.model.steps)
    bed.treat(*[f"w{n}" for n in range(64)])
    assert len(bed.model.steps) - before <= 1 + 2 * 6


def test_engine_without_retry() -> None:
    bed = StepBed(raise_for("v0"), retry=False)
    names = [f"v{n}" for n in range(8)]
    bed.treat(*names)
    assert bed.model.steps == [names, ["good"]]
    assert all(isinstance(bed.error(name), ModelFailed) for name in names)
    assert len(bed.failures) == 1
    assert bed.engine.breaker.failures == 0


def test_memory_limit_is_learned() -> None:
    bed = StepBed(lambda values: MemoryError() if len(values) > 2 else None)
    bed.treat("vvvv", *[f"v{n}" for n in range(1, 8)])
    assert bed.engine.scheduler.memory_limit.lowest(bed.now) == pytest.approx(8 / 2, abs=1)

    bed = StepBed(raise_for("large", error=MemoryError))
    bed.treat("large", "v1")
    assert bed.engine.scheduler.memory_limit.lowest(bed.now) is None
    assert isinstance(bed.error("large"), RequestTooLarge)
    assert bed.end("v1") == Done("V1", 0.0, bed.now)


def test_memory_limit_without_retry() -> None:
    bed = StepBed(lambda values: MemoryError() if len(values) > 2 else None, canary=None, retry=False)
    names = [f"v{n}" for n in range(8)]
    bed.treat(*names)
    assert all(isinstance(bed.error(name), Unavailable) for name in names)
    assert bed.engine.scheduler.memory_limit.lowest(bed.now) == 8 * 2 / 2
    assert len(bed.model.steps) == 1


@pytest.mark.parametrize("size", [1, 2])
def test_memory_that_others_have_taken(size: int) -> None:
    bed = StepBed(lambda values: MemoryError())
    names = [f"v{n}" for n in range(size)]
    bed.treat(*names)
    assert all(type(bed.error(name)) is Unavailable for name in names)
    assert bed.engine.breaker.failures == 1


def test_inputs_too_large_each() -> None:
    bed = StepBed(raise_for("v0", "v1", error=MemoryError))
    bed.treat("v0", "v1")
    assert all(isinstance(bed.error(name), RequestTooLarge) for name in ("v0", "v1"))
    assert bed.engine.breaker.failures == 0


def test_lost_device_in_the_bisection() -> None:
    def bad(values: list[str]) -> BaseException | None:
        if values == ["good"]:
            return None
        return ValueError() if len(values) == 4 else RuntimeError("CUDA error: device-side assert triggered")

    bed = StepBed(bad)
    bed.treat(*"abcd")
    assert bed.model.steps == [list("abcd"), ["good"], ["a", "b"]]
    assert all(isinstance(bed.error(value), ModelFailed) for value in "abcd")
    assert bed.engine.breaker.gate(bed.now) is Gate.LATCHED


def test_items_that_fail_alone_in_a_retry() -> None:
    """A retry that gives no answer, only failures of single items, is attributed as well."""

    def advance(payload: Payload) -> FailedAlone:
        return FailedAlone(ValueError())

    bed = StepBed(lambda values: ValueError() if len(values) > 1 else None, canary=None)
    bed.model.advance = advance  # type: ignore[assignment, method-assign]
    bed.treat("a", "b")
    assert all(isinstance(bed.end(value), Failed) for value in "ab")
    assert len(bed.failures) == 3, "the step's and the items'"
    assert bed.engine.breaker.has_failures


def test_no_client_left_is_recorded() -> None:
    bed = StepBed(raise_for("v0"))
    items = [*bed.offer("v0"), *bed.offer("v1", timeout_s=0.5)]
    bed.turn()
    bed.model.takes = after(bed.model.takes, lambda: bed.cancel(items[:1]))
    bed.settle()
    assert bed.model.steps == [["v0", "v1"]]
    assert "v0" not in bed.events
    assert isinstance(bed.error("v1"), DeadlineExceeded)
    assert len(bed.failures) == 1
    bed.check_released()


def after(first: Callable[[], None], then: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        then()

    return both
