"""The model has raised: who is answered all the same, who is told, and whom it is held against.

    a batch raised ──▶ Case ──▶ parts of it, run again ──▶ answered │ blamed, alone or with all the rest
                        │
                        └─ not one answer, and the canary fails as well ──▶ the model ──▶ breaker.py

Nobody but the culprits hears of a failure: a batch is taken apart until each stands alone
(`bisection.py`). One that did not fit into memory is halved, and what was too many is remembered
(`memory_limit.py`).

The canary is the model's own example (`Model.example`). While it is answered, a failure is the input's
fault; if it is not, a batch without one answer counts against the model. A model without an example, as
every function is, has no canary: a client's input is run again only to answer that client, never for
others. There, such a batch is a doubt, of which the breaker needs more (`breaker.py`).

Without `retry`, nothing that a client has sent runs twice: a batch that raises fails whole.

`Case` is pure. `Recovery` belongs to the model thread and lives longer than it.

Not here: the queue, the thread and its death (`batching.py`), which kind of failure it is
(`classify.py`), when the model is asked again (`breaker.py`).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from serving_kit.errors import ModelFailed, RequestTooLarge, ServingError, Unavailable, error_text
from serving_kit.execution import Call, Job, Result, dropped
from serving_kit.failures import classify
from serving_kit.failures.bisection import Search
from serving_kit.failures.breaker import Breaker, Gate
from serving_kit.failures.memory_limit import Ceiling
from serving_kit.model import FailureKind
from serving_kit.scheduling.scheduler import Drop, Item, State

_LOST_DEVICE = "the device is in an error state that only a new process clears: restart the kernel"
_repr = reprlib.Repr()  # bounded, and raises nothing
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 100
_repr.maxstring = _repr.maxother = 1000
_TIDY_S = 10.0  # between thorough searches for memory: each stops all threads for a moment


class Canary(NamedTuple):
    """The model's own example: if it is still answered, a failure is not the model's."""

    value: Any
    parameters: Mapping[str, Any]


class Case:
    """One batch that raised: who runs again, and who is to blame.

    Args:
        call: The forward that raised.
        retry: Whether parts of it may run again.
        thorough: Whether to search to the end also while it is not known whether the model works.

    Attributes:
        items: Of the batch.
        started: When the batch was.
        error: What the model raised last.
        works: Whether it still answers the canary; None: not known. Whoever runs the case sets it.
        answered: Whether a part of the batch was.
        blamed: The items whose clients are told of an error.
    """

    def __init__(self, call: Call, *, retry: bool = True, thorough: bool = False) -> None:
        assert call.error is not None
        self.items, self.started, self.error = call.items, call.started, call.error
        self.works: bool | None = None
        self.answered = False
        self.blamed: set[Item] = set()
        self._retry = retry
        self._settled: set[Item] = set()  # answered, one way or the other
        self._too_large: list[Sequence[Item]] = []  # parts that did not fit into memory
        self._part = range(len(call.items))  # that runs now
        self._note_lack_of_memory(call.items)
        self._halving = retry and bool(self._too_large) and len(call.items) > 1
        self._in_vain = not self.waiting(call.ended)
        self._over = not retry
        miscounted = classify.kind(call.error) is FailureKind.OUTPUTS
        self._search = Search(len(call.items), vouched=self._halving or thorough, alone=miscounted)

    @property
    def needs_canary(self) -> bool:
        """Whether to ask the canary first: parts of what was too large are run anyway."""
        return not (self._halving or self._in_vain)

    def hear(self, works: bool | None) -> None:
        """Note what came of the canary."""
        self.works = works
        self._over = self._over or works is False
        if works:
            self._search.passed()

    def next(self, now: float) -> list[Item]:
        """The items to run again; empty: the search is over."""
        while not self._over and (part := self._search.next()) is not None:
            live = self._waiting([self.items[i] for i in part], now)
            if live:
                self._part = part
                return live
        return []

    def passed(self, items: Sequence[Item]) -> None:
        """Those of `next` were answered."""
        self.answered = True
        self._settled.update(items)
        self._search.passed()

    def failed(self, items: Sequence[Item], error: BaseException) -> bool:
        """Those of `next` raised. Returns whether it is one alone, which is to blame then."""
        self.error = error
        self._note_lack_of_memory(items)
        fault = classify.kind(error)
        self._search.failed(self._part, alone=fault is FailureKind.OUTPUTS)
        self._over = self._over or fault is FailureKind.DEVICE  # whatever runs next would fail as well
        return len(items) == 1

    def blame(self, items: Sequence[Item]) -> None:
        """They were told of the last error."""
        self._settled.update(items)
        self.blamed.update(items)

    def waiting(self, now: float) -> list[Item]:
        """Those for whose answer somebody still waits, and in time."""
        return self._waiting(self.items, now)

    def expired(self, now: float) -> list[Item]:
        """Those without an answer whose time is up."""
        return [item for item in self.items if item not in self._settled and item.deadline <= now]

    @property
    def is_the_models(self) -> bool:
        """Whether it is to be held against the model."""
        return not self.answered and self.works is not True

    def too_many(self) -> Sequence[Item]:
        """The least that did not fit together, though each of them does; empty if there is no such thing.

        Without a retry it is not known whether each of them does, and assumed.
        """
        several = [part for part in self._too_large if len(part) > 1]
        together = [part for part in several if not self._retry or self.blamed.isdisjoint(part)]
        return min(together, key=_padded, default=())

    def _waiting(self, items: Sequence[Item], now: float) -> list[Item]:
        return [item for item in items if item not in self._settled and _is_wanted(item, now)]

    def _note_lack_of_memory(self, items: Sequence[Item]) -> None:
        if classify.kind(self.error) is FailureKind.MEMORY:
            self._too_large.append(items)


@dataclass(eq=False)
class Recovery:
    """Deals with what the model raises. The model thread's own.

    Nothing of the model is called while `lock` is held, and what these functions raise is not caught.
    """

    rerun: Callable[[Sequence[Item], int], Call]  # a part of a batch that had left so many waiting
    probe: Callable[[Any, Mapping[str, Any]], bool]  # whether the model answers this input
    answer: Callable[[Call, float], None]  # the items of a forward whose batch was started then
    deliver: Callable[[list[tuple[Item, Result]]], None]
    on_error: Callable[[ServingError, BaseException], None]
    clock: Callable[[], float]
    lock: AbstractContextManager[Any]  # around every change of the next two
    breaker: Breaker
    ceiling: Ceiling
    free_memory: Callable[[BaseException, bool], None] = lambda error, thorough: None
    canary: Canary | None = None
    retry: bool = True  # whether a batch that raised may run again in parts
    on_breaker: Callable[[Gate, str], None] = lambda gate, reason: None  # its new state, and why
    _tidied_at: float = -math.inf  # when memory was last looked for thoroughly

    # -- a forward has raised ----------------------------------------------------------------------

    def recover(self, call: Call, left_waiting: int) -> None:
        """Answer every item of a batch that raised; with `retry`, none but the culprits hear of it.

        One culprit among n takes 2 * ceil(log2 n) + 1 further forwards at most: one for the canary,
        and the search. After a wrong number of outputs it is n and one.
        """
        # Without a canary, many bad inputs in a batch must not end the search before the good ones are
        # found. Once the breaker has opened it is short: the model may well be broken.
        thorough = self.canary is None and not self.breaker.reason
        case = Case(call, retry=self.retry, thorough=thorough)
        self._make_room(case.error)
        if case.needs_canary:
            case.hear(self._still_works(case.error))
        while items := case.next(self.clock()):
            self._try_again(case, items, left_waiting)
        self._close(case)

    def _try_again(self, case: Case, items: Sequence[Item], left_waiting: int) -> None:
        """Run a part of a batch that raised."""
        call = self.rerun(items, left_waiting)
        if call.error is None:
            case.passed(items)
            self.answer(call, case.started)
            return
        self._make_room(call.error)
        if case.failed(items, call.error):
            if not case.answered and case.works is None:
                case.hear(self._still_works(call.error))
            self._blame(case, items)

    def _close(self, case: Case) -> None:
        """Answer who is left, and draw the conclusions."""
        now = self.clock()
        self.deliver([(item, dropped(Drop.EXPIRED)) for item in case.expired(now)])
        if rest := case.waiting(now):
            self._blame(case, rest)
        if not case.blamed:
            self.told(case.error)  # nobody else is told, but the owner is
        if case.is_the_models:
            self._suspect(case.error, case.works, [item.payload for item in case.items])
        if many := case.too_many():
            with self.lock:
                self.ceiling.broke(max(item.tokens for item in many), _padded(many), now)

    def _blame(self, case: Case, items: Sequence[Item]) -> None:
        """Tell their clients that it was these."""
        failed = self.told(case.error, fits=case.works is not False and len(items) == 1)
        took = self.clock() - case.started
        self.deliver(
            [(i, Result(error=failed, queue_wait=case.started - i.arrived, forward=took)) for i in items]
        )
        case.blame(items)

    def _make_room(self, error: BaseException) -> None:
        """Give back what a forward holds that lacked memory."""
        if classify.kind(error) is not FailureKind.MEMORY:
            return
        now = self.clock()
        thorough = now - self._tidied_at > _TIDY_S
        if thorough:
            self._tidied_at = now
        self.free_memory(error, thorough)

    # -- is it the model? --------------------------------------------------------------------------

    def succeeded(self) -> None:
        """The model has answered."""
        if self.breaker.suspects:
            with self.lock:
                closed = self.breaker.succeeded()
            if closed:
                self.on_breaker(Gate.CLOSED, "")

    def judge(self, error: BaseException, job: Job) -> None:
        """Hold `error`, which came of `job` alone, against the model, unless it answers its canary."""
        works = self._still_works(error)
        if works is not True:
            self._suspect(error, works, [job])

    def _still_works(self, error: BaseException) -> bool | None:
        """Whether the model answers its canary; None: it has none.

        If it does, `error` is the fault of the input.
        """
        if isinstance(error, ServingError) and not isinstance(error, ModelFailed):
            return True  # a verdict on the input, not a failure
        if classify.kind(error) is FailureKind.DEVICE:
            return False
        return None if self.canary is None else self.probe(*self.canary)

    def _suspect(self, error: BaseException, works: bool | None, jobs: Sequence[Job]) -> None:
        """Count a failure against the model itself, or if it is not known to be broken, a doubt."""
        why, inputs = type(error).__name__[:60], {_fingerprint(job) for job in jobs}
        with self.lock:
            if works is False:
                opened = self.breaker.failed(self.clock(), why)
            else:
                opened = self.breaker.doubted(self.clock(), why, inputs)
        if opened:
            self.on_breaker(Gate.OPEN, self.breaker.reason)

    # -- who is told what --------------------------------------------------------------------------

    def told(self, error: BaseException, *, fits: bool = True) -> ServingError:
        """What the client is told about `error`; the owner is told everything.

        Args:
            error: As the model raised it.
            fits: Whether other inputs fit into memory, so that a lack of it is this one's own fault.
        """
        if isinstance(error, ServingError) and error.__cause__ is None:
            return error  # a plain verdict on the input: nothing went wrong here
        fault, detail = classify.kind(error), error_text(error)
        failed: ServingError
        if fault is FailureKind.DEVICE:
            with self.lock:
                latched = self.breaker.latch(_LOST_DEVICE)
            if latched:
                self.on_breaker(Gate.LATCHED, _LOST_DEVICE)
        if isinstance(error, ServingError):
            failed = error
        elif fault is FailureKind.MEMORY and fits:
            failed = RequestTooLarge("this input needs more memory than the server has", detail=detail)
        elif fault is FailureKind.MEMORY:
            failed = Unavailable("the server has run out of memory")
            failed.detail = detail
        else:
            failed = ModelFailed("the model failed on this request", detail=detail)
        self.on_error(failed, error)
        return failed


def _is_wanted(item: Item, now: float) -> bool:
    """Whether somebody waits for a running item, and may still get it in time."""
    return item.state is State.RUNNING and not item.abandoned and item.deadline > now


def _fingerprint(job: Job) -> int:
    """A number that is equal for equal inputs. Long arrays that differ may share one."""
    try:
        value = hash(job.value)
    except Exception:  # a list, or an object whose own `__hash__` raises
        value = hash(_repr.repr(job.value))
    return hash((value, _repr.repr(job.parameters)))


def _padded(items: Sequence[Item]) -> int:
    return len(items) * max(item.tokens for item in items)
