"""The engine as a pure object on a fake clock: the order of its actions, and one end for each item."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving_kit.actions import Exit, Prepare, Release, Sleep, Step
from serving_kit.errors import (
    DeadlineExceeded,
    InputRejected,
    ModelFailed,
    Overloaded,
    ServingError,
    Stopping,
    Unavailable,
)
from serving_kit.events import Chunk, Done
from serving_kit.failures.breaker import Gate
from serving_kit.failures.classify import Failure
from serving_kit.model import Done as Ended
from serving_kit.model import Failed as FailedAlone
from serving_kit.model import FailureKind, Input, Layout, More, Work
from serving_kit.records import BatchReason, CostReleasedRecord, Drop
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.scheduler import Scheduler
from tests.support_core import Bed, Echo, raise_for, values_of

pytestmark = pytest.mark.light

EXAMPLE = Input("example")


def generates(**lengths: int) -> Echo:
    """A model whose named values go on for so many steps."""
    model = Echo()
    model.lengths = lengths
    return model


# -- the order of actions ----------------------------------------------------------------------------


def test_prepare_step_sleep() -> None:
    bed = Bed()
    assert values_of(bed.ask("a", "b")) == ["A", "B"]
    assert bed.log == ["Prepare", "Step", "Sleep"]
    bed.check_released()


def test_no_deadline_no_wake_up() -> None:
    """An idle engine asks for no wake-up."""
    bed = Bed()
    assert bed.engine.next(0.0) == Sleep(None)
    bed.ask("a")
    assert bed.engine.next(bed.now) == Sleep(None)


def test_max_wait_is_a_sleep() -> None:
    bed = Bed(max_wait_ms=500)
    bed.offer("a")
    assert isinstance(bed.turn(), Prepare)
    assert bed.turn() == Sleep(0.5)
    bed.now = 0.5
    assert isinstance(bed.turn(), Step)


def test_output_is_taken_once() -> None:
    bed = Bed()
    bed.ask("a")
    assert bed.engine.take() == ([], [])


def test_times_of_an_answer() -> None:
    """Queue time ends with the choice of the first step, model time with the end of the last."""
    bed = Bed(generates(a=3))
    bed.offer("a")
    bed.turn()
    bed.now = 2.0
    bed.settle()
    assert bed.end("a") == Done("A", queue_wait_s=2.0, model_time_s=3.0)


def test_record_of_a_step() -> None:
    bed = Bed(max_batch_size=2)
    bed.offer("a", "bbb", "c")
    bed.settle()
    first, second = bed.batches
    assert (first.size, first.tokens, first.computed_tokens) == (2, 4, 6)
    assert (first.reason, first.left_waiting, first.ok) == (BatchReason.FULL, 1, True)
    assert (first.started, first.finished, second.oldest_wait_s) == (0.0, 1.0, 1.0)


def test_expected_duration_of_a_step() -> None:
    bed = Bed()
    bed.offer("a")
    bed.turn()
    step = bed.turn()
    assert isinstance(step, Step)
    assert step.expected_s == 0.0
    for _ in range(4):
        bed.ask("a")
    bed.offer("a")
    bed.turn()
    step = bed.turn()
    assert isinstance(step, Step)
    assert step.expected_s == pytest.approx(1.0, rel=0.3)


# -- items that go on --------------------------------------------------------------------------------


def test_chunks_then_done() -> None:
    bed = Bed(generates(a=3))
    bed.ask("a")
    assert [type(event) for event in bed.events["a"]] == [Chunk, Chunk, Done]
    assert bed.chunks("a") == [1, 2]
    assert [batch.reason for batch in bed.batches] == [BatchReason.IDLE, *[BatchReason.CONTINUED] * 2]
    bed.check_released()


def test_later_steps_grant_their_own_tokens() -> None:
    bed = Bed(generates(long=3))
    bed.ask("long")
    assert bed.model.granted == [[4], [1], [1]]


def test_more_without_a_chunk() -> None:
    bed = Bed()
    results = iter([More(), More(), Ended("A")])
    bed.model.advance = lambda payload: next(results)  # type: ignore[method-assign]
    assert values_of(bed.ask("a")) == ["A"]
    assert bed.chunks("a") == []


def test_waiting_items_join() -> None:
    bed = Bed(generates(a=3))
    bed.offer("a")
    bed.turn(), bed.turn()
    bed.offer("b")
    bed.settle()
    assert bed.model.steps == [["a"], ["a", "b"], ["a"]]
    assert values_of([bed.end("a"), bed.end("b")]) == ["A", "B"]
    bed.check_released()


def test_other_key_waits_for_its_turn() -> None:
    """Once the oldest waiting item has another key, none joins until it has started."""
    bed = Bed(generates(a=3))
    bed.offer("a", k=1)
    bed.turn(), bed.turn()
    bed.offer("b", k=2)
    bed.offer("c", k=1)
    bed.settle()
    assert bed.model.steps == [["a"], ["a"], ["a"], ["b"], ["c"]]


def test_cancel_between_steps() -> None:
    bed = Bed(generates(a=5))
    (item,) = bed.offer("a")
    bed.turn(), bed.turn()
    bed.cancel([item])
    assert isinstance(bed.turn(), Release)
    assert isinstance(bed.settle(), Sleep)
    assert bed.model.steps == [["a"]]
    bed.check_released()


def test_released_while_others_wait() -> None:
    """A model that is never idle must get its memory back, too."""
    bed = Bed(generates(a=9), max_batch_size=1)
    (item,) = bed.offer("a")
    bed.turn(), bed.turn()
    bed.offer("b", "c")
    bed.turn()
    bed.cancel([item])
    assert isinstance(bed.turn(), Release)
    assert isinstance(bed.turn(), Step)


def test_released_when_dropped() -> None:
    bed = Bed(generates(a=9))
    bed.offer("a", timeout_s=1.5)
    bed.turn(), bed.turn(), bed.turn()
    assert isinstance(bed.turn(), Release)


def test_cancel_during_a_step() -> None:
    bed = Bed(generates(a=5))
    items = bed.offer("a", "b")
    bed.turn()
    bed.model.bad = lambda values: bed.cancel(items[:1])  # type: ignore[func-returns-value]
    bed.settle()
    assert bed.model.steps == [["a", "b"]]
    assert bed.batches[0].wasted == 1
    bed.check_released()


def test_nothing_is_learned_from_part_of_an_item() -> None:
    """Its tokens are those of the next step already, also if its client has left during the step."""
    bed = Bed(generates(a=5))
    items = bed.offer("a")
    bed.turn()
    bed.model.bad = lambda values: bed.cancel(items)  # type: ignore[func-returns-value]
    bed.settle()
    assert bed.engine.scheduler.cost.observations == 0


def test_failed_item_among_others() -> None:
    bed = Bed(generates(a=3, b=3))
    bed.offer("a", "b")
    bed.turn(), bed.turn()
    bed.model.bad = raise_for("a")
    bed.settle()
    assert isinstance(bed.error("a"), ModelFailed)
    assert bed.end("b") == Done("B", 0.0, bed.now - 0.0)
    assert bed.chunks("b") == [1, 2]
    bed.check_released()


# -- deadlines ---------------------------------------------------------------------------------------


def test_expired_before_it_starts() -> None:
    bed = Bed()
    bed.offer("a", timeout_s=0.5)
    bed.now = 1.0
    bed.settle()
    assert isinstance(bed.error("a"), DeadlineExceeded)
    assert bed.model.steps == []


def test_expired_between_steps() -> None:
    bed = Bed(generates(a=9))
    bed.offer("a", timeout_s=2.5)
    bed.settle()
    assert isinstance(bed.error("a"), DeadlineExceeded)
    assert len(bed.model.steps) == 3
    bed.check_released()


def test_first_chunk_moves_the_deadline() -> None:
    bed = Bed(generates(a=9))
    bed.offer("a", timeout_s=1.5, stream_timeout_s=5.5)
    bed.settle()
    assert bed.chunks("a") == [1, 2, 3, 4, 5, 6]
    assert isinstance(bed.error("a"), DeadlineExceeded)
    bed.check_released()


def test_refused_is_not_dropped() -> None:
    bed = Bed(max_queue_size=1)
    bed.offer("a")
    with pytest.raises(Overloaded) as refused:
        bed.offer("b")
    assert not refused.value.dropped
    assert bed.drops == []


def test_told_that_its_time_is_up() -> None:
    """The timer of a request is quicker than the queue: each item is counted once all the same."""
    bed = Bed(max_batch_size=1)
    waiting, left = bed.offer("a", "b", timeout_s=5.0)
    bed.cancel([left])
    bed.engine.cancel([waiting, left], expired_at=5.0)
    bed.engine.cancel([waiting, left], expired_at=5.0)
    bed.now = 6.0
    bed.settle()
    assert [(each.at, each.waited_s, each.reason) for each in bed.drops] == [(5.0, 5.0, Drop.EXPIRED)]
    assert bed.model.steps == []


def test_packed_items_cost_their_sum() -> None:
    """Also of an item of several sequences, and in what is recorded of a step."""
    bed = Bed(layout=Layout(packed=True), max_batch_tokens=8)
    bed.model.work = lambda value: Work(3, len(value), packed_tokens=len(value) + 1)  # type: ignore[method-assign]
    bed.ask("aaa", "a", "a", "bbbb")
    assert [(each.tokens, each.computed_tokens, each.packed) for each in bed.batches] == [
        (8, 8, True),
        (5, 5, True),
    ]


def test_no_chunk_no_longer_deadline() -> None:
    bed = Bed()
    bed.model.advance = lambda payload: More()  # type: ignore[method-assign]
    bed.offer("a", timeout_s=1.5, stream_timeout_s=50.0)
    bed.settle()
    assert isinstance(bed.error("a"), DeadlineExceeded)
    assert len(bed.model.steps) == 2


def test_expired_between_retries() -> None:
    bed = Bed()
    bed.model.bad = lambda values: ValueError() if len(values) > 1 else None
    bed.offer("late", timeout_s=1.5)
    bed.offer("b", "c", "d")
    bed.settle()
    assert values_of([bed.end(value) for value in ("b", "c", "d")]) == ["B", "C", "D"]
    assert isinstance(bed.error("late"), DeadlineExceeded)
    bed.check_released()


def test_failed_before_its_time_is_up() -> None:
    """It has ended once, also where its step still runs again in parts when its deadline passes."""
    bed = Bed()
    bed.model.bad = raise_for("a")
    failed, *_ = bed.offer("a", "b", "c", "d", timeout_s=50.0)
    while not bed.has_ended(failed):
        bed.turn()
    assert not all(bed.has_ended(item) for item in bed.offered), "the others still run again"
    bed.engine.cancel([failed], expired_at=bed.now)
    bed.settle()
    assert isinstance(bed.error("a"), ModelFailed)
    assert bed.drops == []
    assert values_of([bed.end(value) for value in ("b", "c", "d")]) == ["B", "C", "D"]
    bed.check_released()


def test_hopeless_items_are_dropped() -> None:
    bed = Bed(drop_hopeless=True, max_batch_size=1)
    for _ in range(10):
        bed.ask("a")
    bed.offer("b", timeout_s=9.0)
    bed.offer("c", timeout_s=2.75)
    bed.now += 1
    bed.settle()
    assert type(bed.error("c")) is Overloaded
    assert bed.error("c").dropped
    assert [(each.waited_s, each.reason) for each in bed.drops] == [(2.0, Drop.HOPELESS)]
    assert bed.end("b") == Done("B", 1.0, 1.0)
    bed.check_released()


# -- retries -----------------------------------------------------------------------------------------


def test_retries_are_steps() -> None:
    bed = Bed()
    bed.model.bad = raise_for("c")
    bed.ask("a", "b", "c", "d")
    assert bed.log == ["Prepare", *["Step"] * 5, "Release", "Sleep"]
    assert bed.model.steps == [list("abcd"), ["a", "b"], ["c", "d"], ["c"], ["d"]]
    assert {batch.reason for batch in bed.batches[1:]} == {BatchReason.RETRY}
    bed.check_released()


def test_canary_before_the_retries() -> None:
    bed = Bed(Echo(EXAMPLE))
    bed.model.bad = raise_for("a")
    bed.ask("a", "b")
    assert bed.log[:4] == ["Prepare", "Step", "Canary", "Step"]
    bed.check_released()


def test_memory_is_freed_before_the_retries() -> None:
    bed = Bed()
    bed.model.bad = lambda values: MemoryError() if len(values) > 1 else None
    bed.ask("a", "b")
    assert bed.log == ["Prepare", "Step", "Free", "Step", "Step", "Sleep"]
    assert bed.engine.scheduler.memory_limit.lowest(bed.now) == 1


def test_thorough_search_every_ten_seconds() -> None:
    """It stops all threads for a moment."""
    bed = Bed()
    bed.model.bad = raise_for("large", error=MemoryError)
    bed.ask("large", "b", "c", "d")
    assert [thorough for _, thorough in bed.model.freed] == [True, False, False]
    bed.now += 11
    bed.ask("large")
    assert [thorough for _, thorough in bed.model.freed[3:]] == [True]


def test_new_items_wait_for_the_recovery() -> None:
    bed = Bed()
    bed.model.bad = raise_for("a")
    bed.offer("a", "b")
    bed.turn(), bed.turn()
    bed.offer("later")
    bed.settle()
    assert bed.model.steps[-1] == ["later"]
    bed.check_released()


def test_expected_duration_of_a_retry() -> None:
    bed = Bed()
    for _ in range(4):
        bed.ask("x")
    bed.model.bad = raise_for("a")
    bed.offer("a", "b")
    bed.turn(), bed.turn()
    step = bed.turn()
    assert isinstance(step, Step)
    assert step.reason is BatchReason.RETRY
    assert step.expected_s == pytest.approx(1.0, rel=0.3)


# -- records -----------------------------------------------------------------------------------------


def test_one_record_for_one_exception() -> None:
    bed = Bed(Echo(EXAMPLE))
    bed.model.bad = lambda values: ValueError()
    bed.ask("a", "b", "c")
    assert len(bed.failures) == 1
    assert {bed.error(value) for value in "abc"} == {bed.failures[0].error}


def test_shared_exception_of_single_items() -> None:
    """Items that failed alone with the same exception share its record."""
    bed, shared = Bed(), ValueError()
    bed.model.advance = lambda payload: _failed(shared)  # type: ignore[method-assign]
    bed.ask("a", "b")
    assert [record.cause for record in bed.failures] == [shared]
    assert bed.error("a") is bed.error("b")


def test_next_exception_has_its_own_record() -> None:
    bed, same = Bed(), ValueError()
    bed.model.bad = lambda values: same
    bed.ask("a")
    bed.ask("a")
    assert len(bed.failures) == 2


def test_unhashable_exception() -> None:
    class Odd(Exception):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise RuntimeError

    bed = Bed()
    bed.model.bad = lambda values: Odd()
    bed.ask("a", "b")
    assert isinstance(bed.error("a"), ModelFailed)
    assert len(bed.failures) == 2, "the first was passed on to no client"


def test_rejected_input_is_no_record() -> None:
    bed = Bed()
    assert values_of(bed.ask("good", "bad")) == ["GOOD", None]
    assert isinstance(bed.error("bad"), InputRejected)
    assert bed.failures == []


def test_failure_without_a_client_is_recorded() -> None:
    """Its client left while it was prepared."""
    bed = Bed()
    (item,) = bed.offer("a")
    action = bed.engine.next(0.0)
    bed.cancel([item])
    bed.engine.completed(action, [Failure(ValueError(), FailureKind.ERROR)], 0.0)
    bed.settle()
    assert len(bed.failures) == 1
    assert "a" not in bed.events


def test_transient_failure_is_recorded() -> None:
    bed = Bed()
    bed.model.raises["step"] = ValueError()
    assert values_of(bed.ask("a", "b")) == ["A", "B"]
    assert len(bed.failures) == 1


def test_released_cost_is_recorded() -> None:
    class TooLowCost(CostModel):
        def seconds(self, computed_tokens: float) -> float:
            return 1e-6

    bed = Bed(max_batch_size=1, timeout_ms=10_000)
    bed.engine.scheduler = Scheduler(bed.engine.scheduler.settings, TooLowCost())
    for _ in range(30):
        bed.offer("a", timeout_s=0.5)
        bed.settle()
    assert any(isinstance(record, CostReleasedRecord) for record in bed.records)


# -- the breaker -------------------------------------------------------------------------------------


def broken() -> Bed:
    """A model that has failed five times in a row, its example too."""
    bed = Bed(Echo(EXAMPLE))
    bed.model.bad = lambda values: LookupError("secret")
    for _ in range(5):
        bed.ask("a")
    return bed


def test_open_breaker_refuses() -> None:
    bed = broken()
    assert bed.breaker_states == ["open"]
    with pytest.raises(Unavailable, match="failed 5 times in a row, last with LookupError") as refused:
        bed.offer("b")
    assert refused.value.retry_after == pytest.approx(5)
    assert "it is tried again in 5 s" in bed.engine.unavailable_reason(bed.now)
    assert "secret" not in bed.engine.unavailable_reason(bed.now)


def test_open_breaker_ends_what_waits() -> None:
    bed = Bed(Echo(EXAMPLE), max_batch_size=1)
    bed.model.bad = lambda values: ValueError()
    bed.offer(*"abcdefg")
    bed.settle()
    assert [type(bed.error(value)) for value in "abcdefg"] == [ModelFailed] * 5 + [Unavailable] * 2
    bed.check_released()


def test_one_answer_closes_it() -> None:
    bed = broken()
    bed.now += 5
    assert bed.engine.unavailable_reason(bed.now) == ""
    assert "one request at a time" in bed.engine.breaker.degraded_reason
    bed.model.bad = lambda values: None
    bed.offer("b")
    with pytest.raises(Unavailable):
        bed.offer("c")
    bed.settle()
    assert bed.breaker_states == ["open", "closed"]
    assert bed.engine.breaker.degraded_reason == ""


def test_lost_device_latches() -> None:
    bed = Bed()
    bed.model.bad = lambda values: RuntimeError("CUDA error: device-side assert triggered")
    bed.ask("a", "b")
    assert bed.breaker_states == ["latched"]
    assert len(bed.model.steps) == 1
    assert "restart the kernel" in bed.engine.unavailable_reason(1e9)
    with pytest.raises(Unavailable) as refused:
        bed.offer("c")
    assert refused.value.retry_after is None


def test_failed_beside_rejected() -> None:
    """A step without an answer counts if one of its items was not merely rejected."""
    bed = Bed()
    results = iter([FailedAlone(InputRejected("no")), FailedAlone(ValueError())])
    bed.model.advance = lambda payload: next(results)  # type: ignore[method-assign]
    bed.ask("a", "b")
    assert bed.engine.breaker.has_failures


@pytest.mark.parametrize("stage", ["prepare", "finish"])
def test_failures_around_the_step_count(stage: str) -> None:
    bed = Bed(Echo(EXAMPLE))
    for _ in range(5):
        setattr(bed.model, stage, _broken)
        bed.ask("a")
    assert bed.engine.breaker.gate(bed.now) is Gate.OPEN


def test_one_canary_for_a_whole_preparation() -> None:
    bed = Bed(Echo(EXAMPLE))
    bed.model.prepare = _broken  # type: ignore[method-assign]
    bed.ask("a", "b", "c")
    assert bed.log.count("Canary") == 1
    assert bed.engine.breaker.failures == 3


# -- the end -----------------------------------------------------------------------------------------


def test_exit_when_all_has_ended() -> None:
    bed = Bed(generates(a=3))
    bed.offer("a")
    bed.engine.stop()
    with pytest.raises(Stopping):
        bed.offer("b")
    assert isinstance(bed.settle(), Exit)
    assert values_of([bed.end("a")]) == ["A"]


def test_drain_without_stop_does_not_exit() -> None:
    bed = Bed(max_wait_ms=5000)
    bed.offer("a")
    bed.engine.drain()
    assert bed.settle() == Sleep(None)
    assert bed.batches[0].reason is BatchReason.DRAIN


def test_eviction_has_no_events() -> None:
    bed = Bed(generates(a=9))
    bed.offer("a", "b")
    bed.turn(), bed.turn()
    bed.offer("c")
    bed.engine.evict()
    bed.engine.stop()
    assert isinstance(bed.settle(), Exit)
    assert bed.end("b") == Done("B", 0.0, 1.0)
    assert "c" not in bed.events
    bed.check_released()


def test_eviction_during_a_recovery() -> None:
    bed = Bed()
    bed.model.bad = lambda values: ValueError()
    bed.offer("a", "b", "c", "d")
    bed.turn(), bed.turn()
    bed.engine.evict()
    bed.settle()
    assert bed.events == {}
    assert bed.engine.scheduler.in_flight == 0


def test_crash_forgets_the_recovery() -> None:
    bed = Bed(Echo(EXAMPLE))
    bed.model.bad = raise_for("a")
    bed.offer("a", "b")
    bed.turn(), bed.turn()
    assert bed.log == ["Prepare", "Step"]
    error = bed.engine.crashed(RuntimeError("a bug"), bed.now)
    assert isinstance(error, ModelFailed)
    assert "a bug" in str(error.detail)
    assert values_of(bed.ask("c")) == ["C"]
    assert [record.kind for record in bed.failures] == [FailureKind.CRASH]
    bed.check_released()


def test_five_crashes_open_the_breaker() -> None:
    bed = Bed()
    for _ in range(5):
        bed.engine.crashed(None, bed.now)
    with pytest.raises(Unavailable, match="last with a crash"):
        bed.offer("a")
    bed.settle()
    assert bed.breaker_states == ["open"]


# -- all of it ---------------------------------------------------------------------------------------

VALUES = st.sampled_from(["a", "bb", "stream", "poison", "bad", "large"])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("offer"), st.lists(VALUES, min_size=1, max_size=4), st.floats(0.5, 9)),
            st.tuples(st.just("turn"), st.integers(1, 5)),
            st.tuples(st.just("cancel"), st.integers(0, 50)),
            st.tuples(st.just("time"), st.floats(0.1, 5)),
            st.tuples(st.just("crash")),
        ),
        max_size=30,
    ),
    st.booleans(),
    st.booleans(),
)
def test_one_end_and_one_release(steps: list[Any], canary: bool, retry: bool) -> None:
    """Every admitted item has one end, unless its client has left or a crash took it, and holds nothing."""
    model = generates(stream=4)
    model.example = EXAMPLE if canary else None
    model.bad = lambda values: (
        ValueError() if "poison" in values else MemoryError() if "large" in values and values[1:] else None
    )
    bed = Bed(model, retry=retry, max_batch_size=4)
    silent: set[Any] = set()  # items that may end without an event
    for step in steps:
        if step[0] == "offer":
            try:
                bed.offer(*step[1], timeout_s=step[2], stream_timeout_s=step[2] + 3)
            except ServingError:
                continue
        elif step[0] == "turn":
            for _ in range(step[1]):
                bed.turn()
        elif step[0] == "cancel" and bed.offered:
            item = bed.offered[step[1] % len(bed.offered)]
            silent.add(item)
            bed.cancel([item])
        elif step[0] == "time":
            bed.now += step[1]
        elif step[0] == "crash":
            silent |= {item for item in bed.offered if not bed.has_ended(item)}
            bed.engine.crashed(None, bed.now)
    bed.engine.stop()
    assert isinstance(bed.settle(), Exit)
    for item in bed.offered:
        assert bed.has_ended(item) or item in silent
    assert len({id(record.cause) for record in bed.failures}) == len(bed.failures)
    bed.check_released()


def _broken(*args: object) -> Any:
    raise LookupError


def _failed(error: BaseException) -> Any:
    return FailedAlone(error)
