"""The decisions after a failure, without threads or clocks: who is to blame, what fits, when to ask."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.errors import (
    DeadlineExceeded,
    InputRejected,
    ModelFailed,
    RequestTooLarge,
    ServingError,
    Unavailable,
)
from serving_kit.execution import Call, Job, Result
from serving_kit.failures.bisection import Search
from serving_kit.failures.breaker import Breaker, Gate
from serving_kit.failures.classify import WorkerDied, WrongNumberOfOutputs, kind
from serving_kit.failures.memory_limit import Ceiling
from serving_kit.failures.recovery import Canary, Case, Recovery
from serving_kit.model import FailureKind
from serving_kit.scheduling.scheduler import Item, Scheduler, State
from serving_kit.settings import Settings

pytestmark = pytest.mark.light


# -- who is to blame ----------------------------------------------------------------------------------


def search(size: int, culprits: set[int], *, vouched: bool) -> tuple[int, set[int], set[int]]:
    """Forwards after the first, positions that were answered, culprits that were found."""
    forwards, answered, found = 0, set[int](), set[int]()
    looking = Search(size, vouched=vouched)
    while (part := looking.next()) is not None:
        forwards += 1
        assert answered.isdisjoint(part), "nobody runs again after his answer"
        if culprits.isdisjoint(part):
            answered.update(part)
            looking.passed()
        else:
            looking.failed(part)
            if len(part) == 1:
                found.update(part)
    return forwards, answered, found


def depth(size: int) -> int:
    return math.ceil(math.log2(size))


@given(st.data(), st.integers(1, 300), st.booleans())
def test_one_culprit_is_found_within_the_bound_and_everybody_else_answered(
    data: st.DataObject, size: int, vouched: bool
) -> None:
    culprit = data.draw(st.integers(0, size - 1))
    forwards, answered, found = search(size, {culprit}, vouched=vouched)
    assert forwards <= 2 * depth(size)
    assert answered == set(range(size)) - {culprit}
    assert found == ({culprit} if size > 1 else set()), "one alone has been found already"


@given(st.integers(2, 200), st.sets(st.integers(0, 199), min_size=1))
def test_several_culprits_are_all_found_if_the_model_is_known_to_work(size: int, culprits: set[int]) -> None:
    culprits = {each for each in culprits if each < size} or {size - 1}
    forwards, answered, found = search(size, culprits, vouched=True)
    assert (answered, found) == (set(range(size)) - culprits, culprits)
    assert forwards <= min(2 * depth(size) * len(culprits), 2 * size - 2)


@given(st.integers(2, 200), st.sets(st.integers(0, 199), min_size=1))
def test_few_culprits_are_all_found_though_nobody_vouches(size: int, culprits: set[int]) -> None:
    culprits = set(sorted(each for each in culprits if each < size)[: depth(size)]) or {0}
    _, answered, found = search(size, culprits, vouched=False)
    assert (answered, found) == (set(range(size)) - culprits, culprits)


@given(st.integers(2, 5000))
def test_a_model_that_fails_everything_is_not_asked_for_every_item(size: int) -> None:
    forwards, answered, _ = search(size, set(range(size)), vouched=False)
    assert forwards <= 2 * depth(size)
    assert not answered


# -- one batch from failure to answers ----------------------------------------------------------------


class Ward:
    """A `Recovery` with all that it asks for, around a model that is a function of what a batch holds."""

    def __init__(
        self,
        bad: Callable[[Sequence[str]], BaseException | None],
        canary: str | None = "good",
        *,
        retry: bool = True,
    ) -> None:
        self.bad = bad
        self.now = 0.0
        self.locked = False
        self.calls: list[list[str]] = []
        self.probes: list[str] = []
        self.results: dict[str, list[Result]] = {}
        self.incidents: list[ServingError] = []
        self.recovery = Recovery(
            rerun=lambda items, left_waiting: self.run(items),
            probe=self.probe,
            answer=self.answer,
            deliver=self.deliver,
            on_error=lambda failed, error: self.incidents.append(failed),
            clock=lambda: self.now,
            lock=self,
            breaker=Breaker(),
            ceiling=Ceiling(),
            canary=None if canary is None else Canary(canary, {}),
            retry=retry,
        )

    def __enter__(self) -> None:
        assert not self.locked
        self.locked = True

    def __exit__(self, *exc: object) -> None:
        self.locked = False

    def run(self, items: Sequence[Item]) -> Call:
        values = [item.payload.value for item in items]
        assert not self.locked, "no model code under the lock"
        self.calls.append(values)
        began, self.now = self.now, self.now + 1.0
        answers = [value.upper() for value in values]
        return Call(items, began, self.now, answers, self.bad(values))

    def probe(self, value: str, parameters: Any) -> bool:
        assert not self.locked
        self.probes.append(value)
        return self.bad([value]) is None

    def answer(self, call: Call, started: float) -> None:
        self.recovery.succeeded()
        self.deliver(call.results(started))

    def deliver(self, results: list[tuple[Item, Result]]) -> None:
        assert not self.locked
        for item, result in results:
            self.results.setdefault(item.payload.value, []).append(result)

    def treat(self, items: Sequence[Item]) -> None:
        """What becomes of a batch, told once for each."""
        self.results.clear()
        call = self.run(items)
        assert call.error is not None
        self.recovery.recover(call, 0)
        assert all(len(results) == 1 for results in self.results.values()), "exactly one outcome"

    def said(self, value: str) -> Result:
        return self.results[value][0]


def running(value: str, deadline: float = 1e6) -> Item:
    return Item(0.0, deadline, max(1, len(value)), Job(value, {}, None), "g", State.RUNNING)  # type: ignore[arg-type]


def any_of(bad: set[str], error: type[BaseException] = ValueError) -> Callable[..., BaseException | None]:
    return lambda values: None if bad.isdisjoint(values) else error()


@given(st.data(), st.integers(1, 30), st.sampled_from(["good", "bad", None]))
def test_whoever_still_waits_gets_exactly_one_outcome_and_nobody_else_any(
    data: st.DataObject, size: int, canary: str | None
) -> None:
    names = st.sets(st.sampled_from([f"v{n}" for n in range(size)]))
    gone, late = data.draw(names), data.draw(names)
    bad = data.draw(names) | {f"v{data.draw(st.integers(0, size - 1))}"}
    items = [running(f"v{n}") for n in range(size)]
    for item in items:
        item.abandoned = item.payload.value in gone
        if item.payload.value in late:
            item.deadline = data.draw(st.floats(0.5, 20))
    ward = Ward(any_of(bad | {"bad"}), canary)
    ward.treat(items)
    assert {f"v{n}" for n in range(size)} - gone <= ward.results.keys()
    assert ward.results.keys().isdisjoint(gone - late), "nobody listens"
    for item in items:
        value = item.payload.value
        if value in ward.results:
            answer = ward.said(value)
            assert answer.value in ((None,) if value in bad else (None, value.upper()))
            assert (answer.value is None) != (answer.error is None)
            assert isinstance(answer.error, (DeadlineExceeded, ModelFailed, type(None)))
            if canary != "bad" and value not in bad | late | gone:
                assert answer.value is not None, "the innocent are answered"
    assert len(ward.calls) <= 2 * size


def test_a_canary_that_fails_too_ends_the_search_and_counts_against_the_model() -> None:
    ward = Ward(lambda values: LookupError())
    for failures in (1, 2):
        ward.treat([running(f"v{n}") for n in range(8)])
        assert (len(ward.calls), ward.probes) == (failures, ["good"] * failures)
        assert len(ward.incidents) == failures
        assert ward.recovery.breaker.failures == failures


def test_without_a_canary_nothing_runs_but_the_inputs_of_the_batch_that_failed() -> None:
    ward = Ward(any_of({"v0"}), canary=None)
    ward.treat([running("v0"), running("v1")])
    ward.calls.clear()
    ward.treat([running("v0")])
    assert (ward.calls, ward.probes) == ([["v0"]], [])
    assert ward.recovery.breaker.failures == 0


def test_without_a_canary_and_an_answer_it_is_a_doubt_that_an_answer_dispels() -> None:
    ward = Ward(any_of({"v0", "v1"}), canary=None)
    ward.treat([running("v0"), running("v1")])
    assert (ward.recovery.breaker.failures, ward.recovery.breaker.suspects) == (0, True)
    ward.treat([running("v0"), running("v2")])
    assert not ward.recovery.breaker.suspects


@given(st.data(), st.integers(2, 40))
def test_without_a_canary_every_good_input_is_found_among_any_number_of_bad_ones(
    data: st.DataObject, size: int
) -> None:
    good = data.draw(st.integers(0, size - 1))
    ward = Ward(lambda values: None if values == [f"v{good}"] else ValueError(), canary=None)
    ward.treat([running(f"v{n}") for n in range(size)])
    assert [n for n in range(size) if ward.said(f"v{n}").error is None] == [good]
    assert len(ward.calls) <= 2 * size - 1


def test_without_retry_a_batch_that_fails_fails_whole_and_its_inputs_run_once() -> None:
    ward = Ward(any_of({"v0"}), retry=False)
    ward.treat([running(f"v{n}") for n in range(8)])
    assert (len(ward.calls), ward.probes) == (1, ["good"])
    assert all(isinstance(ward.said(f"v{n}").error, ModelFailed) for n in range(8))
    assert len(ward.incidents) == 1
    assert ward.recovery.breaker.failures == 0


def test_without_retry_what_does_not_fit_is_a_lack_of_memory_and_lowers_the_limit() -> None:
    ward = Ward(lambda values: MemoryError() if len(values) > 2 else None, canary=None, retry=False)
    ward.treat([running(f"v{n}") for n in range(8)])
    assert all(isinstance(ward.said(f"v{n}").error, Unavailable) for n in range(8))
    assert ward.recovery.ceiling.lowest(ward.now) == 8 * 2 / 2
    assert len(ward.calls) == 1
    ward = Ward(lambda values: MemoryError(), canary=None, retry=False)
    ward.treat([running("v")])
    assert isinstance(ward.said("v").error, RequestTooLarge)


def test_what_was_too_many_teaches_the_ceiling_and_what_is_too_large_alone_does_not() -> None:
    ward = Ward(lambda values: MemoryError() if len(values) > 2 else None)
    ward.treat([running("vvvv") if n == 0 else running(f"v{n}") for n in range(8)])
    assert ward.recovery.ceiling.lowest(ward.now) == 8 / 2, "4 of 2 tokens did not fit"
    assert not ward.probes, "it was the number: the halves are run anyway"

    ward = Ward(any_of({"large"}, MemoryError))
    ward.treat([running("large"), running("v1")])
    assert ward.recovery.ceiling.lowest(ward.now) is None
    assert isinstance(ward.said("large").error, RequestTooLarge)
    assert ward.said("v1").value == "V1"


@pytest.mark.parametrize("size", [1, 2])
def test_memory_that_not_even_the_canary_gets_is_not_the_clients_fault(size: int) -> None:
    ward = Ward(lambda values: MemoryError())
    ward.treat([running(f"v{n}") for n in range(size)])
    for n in range(size):
        assert isinstance(ward.said(f"v{n}").error, Unavailable)
    assert (len(ward.calls), ward.probes) == (size, ["good"])
    assert ward.recovery.breaker.failures == 1


def test_inputs_that_are_too_large_each_by_itself_are_told_so_and_the_model_is_not_to_blame() -> None:
    ward = Ward(any_of({"v0", "v1"}, MemoryError))
    ward.treat([running("v0"), running("v1")])
    assert all(isinstance(ward.said(value).error, RequestTooLarge) for value in ("v0", "v1"))
    assert ward.recovery.breaker.failures == 0


def test_every_forward_that_lacked_memory_gives_it_back_thoroughly_only_now_and_then() -> None:
    searches: list[bool] = []
    ward = Ward(any_of({"large"}, MemoryError))
    ward.recovery.free_memory = lambda error, thorough: searches.append(thorough)
    ward.treat([running(value) for value in ("large", "b", "c", "d")])
    assert searches == [True, False, False], "the batch, its half, the one"
    ward.now += 11
    ward.treat([running("large")])
    assert searches[3:] == [True]


def test_after_a_wrong_number_of_outputs_every_item_runs_alone() -> None:
    def bad(values: Sequence[str]) -> BaseException | None:
        if len(values) == 4:
            return ValueError()
        return WrongNumberOfOutputs() if "a" in values else None

    ward = Ward(bad)
    ward.treat([running(value) for value in "abcd"])
    assert ward.calls == [list("abcd"), list("ab"), ["c"], ["d"], ["a"], ["b"]]
    assert [ward.said(value).value for value in "abcd"] == [None, "B", "C", "D"]

    ward = Ward(lambda values: WrongNumberOfOutputs() if "a" in values else None)
    ward.treat([running(value) for value in "abcd"])
    assert ward.calls == [list("abcd"), *map(list, "abcd")]
    assert [ward.said(value).value for value in "abcd"] == [None, "B", "C", "D"]


def test_a_device_that_is_lost_meanwhile_is_not_asked_again() -> None:
    def bad(values: Sequence[str]) -> BaseException | None:
        if values == ["good"]:
            return None
        return ValueError() if len(values) == 4 else RuntimeError("CUDA error: device-side assert triggered")

    ward = Ward(bad)
    ward.treat([running(value) for value in "abcd"])
    assert len(ward.calls) == 2
    assert all(isinstance(ward.said(value).error, ModelFailed) for value in "abcd")
    assert ward.recovery.breaker.gate(ward.now) is Gate.LATCHED


@pytest.mark.parametrize(
    ("error", "canary", "failures", "suspects"),
    [
        (ValueError(), "good", 0, False),
        (ValueError(), "bad", 1, True),
        (ValueError(), None, 0, True),
        (ModelFailed("of a finish"), "bad", 1, True),
        (InputRejected("a verdict"), "bad", 0, False),
    ],
)
def test_what_is_held_against_the_model(
    error: Exception, canary: str | None, failures: int, suspects: bool
) -> None:
    ward = Ward(any_of({"bad"}), canary)
    ward.recovery.judge(error, running("v").payload)
    assert (ward.recovery.breaker.failures, ward.recovery.breaker.suspects) == (failures, suspects)
    ward.recovery.succeeded()
    assert not ward.recovery.breaker.suspects, "an answer makes up for it"


def test_a_batch_that_nobody_waits_for_is_not_run_again() -> None:
    ward = Ward(any_of({"v0"}))
    items = [running("v0"), running("v1", deadline=0.5)]
    items[0].abandoned = True
    ward.treat(items)
    assert (len(ward.calls), ward.probes) == (1, [])
    assert list(ward.results) == ["v1"]
    assert len(ward.incidents) == 1, "the owner is told"


def test_a_case_hands_out_parts_until_each_culprit_stands_alone() -> None:
    items = [running(value) for value in "abcd"]
    case = Case(Call(items, 0.0, 1.0, error=ValueError()))
    assert case.needs_canary
    case.hear(True)
    runs: Counter[str] = Counter()
    while part := case.next(1.0):
        values = [item.payload.value for item in part]
        runs["".join(values)] += 1
        if "c" not in values:
            case.passed(part)
        elif case.failed(part, ValueError()):
            case.blame(part)
    assert runs == Counter(["ab", "cd", "c", "d"])
    assert case.blamed == {items[2]}
    assert not case.is_the_models
    assert not case.waiting(1.0)


# -- when to ask --------------------------------------------------------------------------------------

EVENTS = st.lists(
    st.tuples(st.floats(0, 100), st.sampled_from(["failed", "succeeded", "nothing"])), max_size=60
)


@given(EVENTS)
def test_the_breaker_opens_after_five_failures_in_a_row_and_never_for_longer_than_a_minute(
    events: list[tuple[float, str]],
) -> None:
    breaker, now, in_a_row, was_open_until = Breaker(), 0.0, 0, -1.0
    for wait, event in events:
        now += wait
        gate = breaker.gate(now)
        assert breaker.admits(now, 0) == (gate is not Gate.OPEN)
        assert breaker.admits(now, 1) == (gate is Gate.CLOSED), "on probation one at a time"
        assert 0 <= breaker.pause(now) <= 60
        assert (breaker.pause(now) > 0) == (gate is Gate.OPEN)
        assert bool(breaker.reason) == (gate is not Gate.CLOSED)
        if event == "succeeded":
            breaker.succeeded()
            in_a_row = 0
            assert breaker.gate(now) is Gate.CLOSED, "an answer closes it"
        elif event == "failed":
            breaker.failed(now, "ValueError")
            if gate is Gate.CLOSED:
                in_a_row += 1
                assert breaker.gate(now) is (Gate.OPEN if in_a_row >= 5 else Gate.CLOSED)
            else:
                assert breaker.gate(now) is Gate.OPEN
                if gate is Gate.OPEN:
                    assert now + breaker.pause(now) == pytest.approx(was_open_until), "no news"
        if breaker.gate(now) is Gate.OPEN:
            was_open_until = now + breaker.pause(now)


def test_every_failure_on_probation_doubles_the_pause() -> None:
    breaker, now, pauses = Breaker(), 0.0, []
    for _ in range(5):
        breaker.failed(now, "ValueError")
    for _ in range(6):
        pauses.append(breaker.pause(now))
        now += breaker.pause(now)
        breaker.failed(now, "ValueError")
    assert pauses == [5, 10, 20, 40, 60, 60]
    assert breaker.reason == "the model has failed 11 times in a row, last with ValueError"


def doubt(breaker: Breaker, now: float, *inputs: int) -> None:
    breaker.doubted(now, "ValueError", set(inputs))


def test_without_a_canary_it_opens_after_ten_seconds_of_different_inputs_without_an_answer() -> None:
    breaker = Breaker()
    for second in range(10):
        doubt(breaker, float(second), second)
        assert breaker.gate(second) is Gate.CLOSED, "others may yet be answered"
    doubt(breaker, 10.0, 10)
    assert breaker.gate(10.0) is Gate.OPEN
    assert breaker.pause(10.0) == 1
    assert breaker.reason == "no request was answered for 10 s, and the last failed with ValueError"
    assert not breaker.refuses_admitted(10.0), "what was admitted still runs"


def test_without_a_canary_one_bad_input_sent_over_and_over_opens_nothing() -> None:
    breaker = Breaker()
    for second in range(1000):
        doubt(breaker, float(second), 1, 2)
        doubt(breaker, float(second), 3, 4)
    assert breaker.gate(1000.0) is Gate.CLOSED


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=60), st.floats(0, 9.9))
def test_without_a_canary_an_answer_every_ten_seconds_keeps_it_closed(
    events: list[tuple[float, bool]], phase: float
) -> None:
    breaker, now, answered = Breaker(), 0.0, -phase
    for number, (wait, _) in enumerate(events):
        now += wait
        while answered + 9.9 <= now:
            answered += 9.9
            breaker.succeeded()
        doubt(breaker, now, number)
        assert breaker.gate(now) is Gate.CLOSED


def test_in_doubt_a_client_that_comes_back_after_its_pause_is_let_in_and_one_answer_closes_it() -> None:
    breaker, now, pauses = Breaker(), 0.0, []
    for number in range(1000):  # bad inputs alone, all the time
        now += 0.1
        was = breaker.gate(now)
        doubt(breaker, now, number)
        if breaker.gate(now) is Gate.OPEN and was is not Gate.OPEN:
            pause = breaker.pause(now)
            pauses.append(pause)
            for later in (pause, pause + 1.9):
                assert breaker.admits(now + later, 100), "also beside others"
                doubt(trial := copy.deepcopy(breaker), now + later, 1000 + number)
                assert trial.admits(now + later, 100), "and whatever fails first"
    assert pauses == pytest.approx([1, 2, 4, *[8] * 8])
    breaker.succeeded()
    assert breaker.gate(now) is Gate.CLOSED
    assert not breaker.suspects


def test_a_crash_counts_also_in_doubt_and_then_one_request_at_a_time_is_let_in() -> None:
    breaker = Breaker()
    for second in (*range(5), 10):
        doubt(breaker, float(second), second)
    assert breaker.in_doubt
    for _ in range(5):
        breaker.failed(10.5, "a crash of its thread")
    assert not breaker.in_doubt
    assert breaker.pause(10.5) == 5
    assert breaker.refuses_admitted(10.5)
    assert not breaker.admits(16.0, 1)
    doubt(breaker, 16.0, 99)
    assert breaker.admits(16.0, 0), "a bad input is no crash"


@given(EVENTS)
def test_a_lost_device_is_lost_whatever_happens_afterwards(events: list[tuple[float, str]]) -> None:
    breaker, now = Breaker(), 0.0
    breaker.latch("the device is lost")
    for wait, event in events:
        now += wait
        if event == "succeeded":
            breaker.succeeded()
        elif event == "failed":
            breaker.failed(now, "ValueError")
        assert breaker.gate(now) is Gate.LATCHED
        assert not breaker.admits(now, 0)
        assert breaker.reason == "the device is lost"


# -- what fits ----------------------------------------------------------------------------------------


def fill(scheduler: Scheduler, lengths: Sequence[int], now: float) -> None:
    for length in lengths:
        item = Item(now, now + 1e6, length)
        assert scheduler.offer([item], now) is None
        scheduler.ready(item, length, "g")


def live_a_day(capacity: int, length: int, seconds: float = 86_400) -> tuple[int, float]:
    """Batches that broke in a day under full load, and the mean share of the possible size."""
    scheduler = Scheduler(Settings(max_batch_size=64, group_by_length=False, drop_hopeless=False))
    broken, shares, now = 0, [], 0.0
    while now < seconds:
        fill(scheduler, [length] * (64 - scheduler.queue_depth), now)
        batch = scheduler.poll(now).batch
        assert batch is not None
        scheduler.finished(now, ok=True)
        if batch.padded_tokens > capacity:
            broken += 1
            parts = [batch.padded_tokens]
            while parts[-1] / 2 > capacity:
                parts.append(parts[-1] // 2)
            scheduler.ceiling.broke(length, parts[-1], now)
        else:
            shares.append(batch.padded_tokens / capacity)
        now += 30.0
    return broken, sum(shares) / len(shares)


@pytest.mark.parametrize("capacity", [64 * 10 - 1, 33 * 10, 20 * 10, 7 * 10])
def test_a_day_at_full_load_finds_the_ceiling_a_handful_of_times(capacity: int) -> None:
    broken, share = live_a_day(capacity, 10)
    assert 1 <= broken <= 14
    assert share > 0.6, "and most of the room is used"


def test_what_broke_may_be_tried_again_after_a_while_that_doubles() -> None:
    ceiling = Ceiling()
    assert ceiling.limit(8, 0.0) == math.inf
    ceiling.broke(8, 1000, 0.0)
    assert [ceiling.limit(8, t) for t in (0.0, 150.0, 299.9)] == pytest.approx([500, 750, 1000], abs=1)
    assert ceiling.limit(8, 300.0) == math.inf
    assert (ceiling.lowest(0.0), ceiling.lowest(300.0)) == (500, None)
    ceiling.broke(8, 1000, 310.0)
    assert ceiling.limit(8, 310.0 + 599) < 1000
    assert ceiling.limit(8, 310.0 + 600) == math.inf


def test_what_long_rows_cannot_have_short_ones_may() -> None:
    ceiling = Ceiling()
    ceiling.broke(500, 8000, 0.0)
    assert ceiling.limit(500, 0.0) == ceiling.limit(5000, 0.0) == 4000
    assert ceiling.limit(100, 0.0) == math.inf
    ceiling.broke(10, 2000, 0.0)
    assert ceiling.limit(500, 0.0) == ceiling.limit(10, 0.0) == 1000


@given(
    lengths=st.lists(st.integers(1, 600), min_size=1, max_size=60),
    broken=st.lists(st.tuples(st.integers(1, 600), st.integers(2, 20_000)), max_size=4),
    by_length=st.booleans(),
)
def test_no_batch_exceeds_the_ceiling_and_the_oldest_is_in_it(
    lengths: list[int], broken: list[tuple[int, int]], by_length: bool
) -> None:
    scheduler = Scheduler(Settings(group_by_length=by_length))
    for timing in [(100, 0.01), (200, 0.02), (400, 0.04)]:
        scheduler.cost.observe(*timing)
    for longest, padded in broken:
        scheduler.ceiling.broke(longest, padded, 0.0)
    fill(scheduler, lengths, 0.0)
    oldest = scheduler._queue[0]
    batch = scheduler.poll(0.0).batch
    assert batch is not None
    assert oldest in batch.items
    longest = max(item.tokens for item in batch.items)
    assert len(batch.items) == 1 or batch.padded_tokens <= scheduler.ceiling.limit(longest, 0.0)


# -- what kind of failure -----------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """As `torch.cuda.OutOfMemoryError` is named."""


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("no"), FailureKind.ERROR),
        (MemoryError(), FailureKind.MEMORY),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), FailureKind.MEMORY),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 400000000000 bytes. Error code 12 (Cannot allocate memory)"
            ),
            FailureKind.MEMORY,
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 42 bytes."),
            FailureKind.MEMORY,
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be..."), FailureKind.MEMORY),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            FailureKind.MEMORY,
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), FailureKind.MEMORY),
        (raised_from(ValueError("wrapped"), MemoryError()), FailureKind.MEMORY),
        (RuntimeError("CUDA error: device-side assert triggered\nCUDA kernel errors..."), FailureKind.DEVICE),
        (RuntimeError("CUDA error: an illegal memory access was encountered\n..."), FailureKind.DEVICE),
        (RuntimeError("HIP error: unspecified launch failure"), FailureKind.DEVICE),
        (RuntimeError("CUDA error: invalid configuration argument"), FailureKind.ERROR),
        (WrongNumberOfOutputs("2 inputs, 1 outputs"), FailureKind.OUTPUTS),
        (raised_from(WorkerDied("dead"), ValueError()), FailureKind.CRASH),
        # What a client has written proves nothing.
        (ValueError("CUDA error: device-side assert triggered"), FailureKind.ERROR),
        (RuntimeError("cannot read 'CUDA error: device-side assert triggered'"), FailureKind.ERROR),
        (RuntimeError("cannot read 'not enough memory'"), FailureKind.ERROR),
    ],
)
def test_failures_are_told_apart_by_what_their_libraries_say(
    error: BaseException, expected: FailureKind
) -> None:
    assert kind(error) is expected


def test_what_torch_really_says_when_the_memory_is_not_there() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8)
    assert kind(raised.value) is FailureKind.MEMORY
