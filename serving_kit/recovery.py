"""The model has raised: who is answered all the same, who is told, and whom it is held against.

    a batch raised ──▶ Case ──▶ parts of it, run again ──▶ answered │ blamed, alone or with all the rest
                        │
                        └─ not one answer, and the witness fails as well ──▶ the model ──▶ breaker.py

Nobody but the culprits hears of a failure: a batch is taken apart until each stands alone
(`culprits.py`). One that did not fit into memory is halved, and what was too many is remembered
(`memory.py`).

The witness is an input that the model has answered well: its own example, or else the one that it has
answered fastest. While it still answers that, a failure is the input's fault. If it does not, or there
is no witness, a batch without one answer counts against the model. So bad inputs alone close no server
that has a witness, and a model that is broken is not asked for every item.

`Case` is pure. `Recovery` belongs to the model thread and lives longer than it.

Not here: the queue, the thread and its death (`batching.py`), which kind of failure it is
(`faults.py`), when the model is asked again (`breaker.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from serving_kit import faults
from serving_kit.breaker import Breaker, Gate
from serving_kit.culprits import Search
from serving_kit.errors import ModelFailed, RequestTooLarge, ServingError, Unavailable
from serving_kit.faults import Fault
from serving_kit.forward import Call, Job, Result, dropped
from serving_kit.memory import Ceiling, make_room
from serving_kit.scheduler import Drop, Item, State

_LOST_DEVICE = "the device is in an error state that only a new process clears: restart the kernel"
_TIDY_S = 10.0  # between thorough searches for memory: each stops all threads for a moment


class Witness(NamedTuple):
    """An input that the model has answered well: if it still does, a failure is not the model's."""

    seconds: float  # that its batch took; 0: no other shall take its place
    value: Any
    parameters: Mapping[str, Any]


class Case:
    """One batch that raised: who runs again, and who is to blame.

    Args:
        call: The forward that raised.

    Attributes:
        started: When the batch was.
        error: What the model raised last.
        works: Whether it still answers the witness; None: not known. Whoever runs the case sets it.
        answered: Whether a part of the batch was.
        blamed: The items whose clients are told of an error.
    """

    def __init__(self, call: Call) -> None:
        assert call.error is not None
        self.started, self.error = call.started, call.error
        self.works: bool | None = None
        self.answered = False
        self.blamed: set[Item] = set()
        self._items = call.items
        self._settled: set[Item] = set()  # answered, one way or the other
        self._too_large: list[Sequence[Item]] = []  # parts that did not fit into memory
        self._part = range(len(call.items))  # that runs now
        self._note_lack_of_memory(call.items)
        self._halving = bool(self._too_large) and len(call.items) > 1
        self._in_vain = not self.waiting(call.ended)
        self._over = faults.kind(call.error) is Fault.OUTPUTS
        self._search = Search(len(call.items), vouched=self._halving)

    @property
    def needs_witness(self) -> bool:
        """Whether to ask the witness first: parts of what was too large are run anyway."""
        return not (self._halving or self._in_vain)

    def hear(self, works: bool | None) -> None:
        """Note what the witness has said."""
        self.works = works
        self._over = self._over or works is False
        if works:
            self._search.passed()

    def next(self, now: float) -> list[Item]:
        """The items to run again; empty: the search is over."""
        while not self._over and (part := self._search.next()) is not None:
            live = self._waiting([self._items[i] for i in part], now)
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
        """Those of `next` raised. Returns whether they are the culprits, and not to be split further."""
        self.error = error
        self._note_lack_of_memory(items)
        self._search.failed(self._part)
        fault = faults.kind(error)
        self._over = self._over or fault is Fault.DEVICE  # whatever runs next would fail as well
        return len(items) == 1 or fault is Fault.OUTPUTS

    def blame(self, items: Sequence[Item]) -> None:
        """They were told of the last error."""
        self._settled.update(items)
        self.blamed.update(items)

    def waiting(self, now: float) -> list[Item]:
        """Those for whose answer somebody still waits, and in time."""
        return self._waiting(self._items, now)

    def expired(self, now: float) -> list[Item]:
        """Those without an answer whose time is up."""
        return [item for item in self._items if item not in self._settled and item.deadline <= now]

    @property
    def is_the_models(self) -> bool:
        """Whether it is to be held against the model."""
        return not self.answered and self.works is not True

    def too_many(self) -> Sequence[Item]:
        """The least that did not fit together, though each of them does; empty if there is no such thing."""
        together = [part for part in self._too_large if len(part) > 1 and self.blamed.isdisjoint(part)]
        return min(together, key=_padded, default=())

    def _waiting(self, items: Sequence[Item], now: float) -> list[Item]:
        return [item for item in items if item not in self._settled and _is_wanted(item, now)]

    def _note_lack_of_memory(self, items: Sequence[Item]) -> None:
        if faults.kind(self.error) is Fault.MEMORY:
            self._too_large.append(items)


@dataclass(eq=False)
class Recovery:
    """Deals with what the model raises. The model thread's own, but for `forget`.

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
    witness: Witness | None = None
    on_breaker: Callable[[Gate, str], None] = lambda gate, reason: None  # its new state, and why
    _tidied_at: float = -math.inf  # when memory was last looked for thoroughly

    # -- a forward has raised ----------------------------------------------------------------------

    def recover(self, call: Call, left_waiting: int) -> None:
        """Answer every item of a batch that raised; none but the culprits hear of it.

        One culprit among n takes 2 * ceil(log2 n) + 1 further forwards at most: one for the witness,
        and the search.
        """
        case = Case(call)
        self._make_room(case.error)
        if case.needs_witness:
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
            self._suspect(case.error)
        if many := case.too_many():
            with self.lock:
                self.ceiling.broke(max(item.tokens for item in many), _padded(many), now)

    def _blame(self, case: Case, items: Sequence[Item]) -> None:
        """Tell their clients that it was these."""
        failed = self.told(case.error, fits=case.works is not False)
        took = self.clock() - case.started
        self.deliver(
            [(i, Result(error=failed, queue_wait=case.started - i.arrived, forward=took)) for i in items]
        )
        case.blame(items)

    def _make_room(self, error: BaseException) -> None:
        """Give back what a forward holds that lacked memory."""
        if faults.kind(error) is not Fault.MEMORY:
            return
        now = self.clock()
        thorough = now - self._tidied_at > _TIDY_S
        if thorough:
            self._tidied_at = now
        make_room(error, thorough=thorough)

    # -- is it the model? --------------------------------------------------------------------------

    def succeeded(self, job: Job, seconds: float) -> None:
        """The model has answered `job` well, in a forward of so many seconds."""
        if self.breaker.reason or self.breaker.failures:
            with self.lock:
                closed = self.breaker.succeeded()
            if closed:
                self.on_breaker(Gate.CLOSED, "")
        if self.witness is None or seconds < self.witness.seconds:
            self.witness = Witness(seconds, job.value, job.parameters)

    def judge(self, error: BaseException) -> None:
        """Hold `error` against the model, unless its witness speaks for it."""
        if self._still_works(error) is not True:
            self._suspect(error)

    def forget(self) -> None:
        """Let the witness go. Any thread."""
        self.witness = None

    def _still_works(self, error: BaseException) -> bool | None:
        """Whether the model answers what it has answered before; None: it never has.

        If it does, `error` is the fault of the input.
        """
        if isinstance(error, ServingError) and not isinstance(error, ModelFailed):
            return True  # a verdict on the input, not a failure
        if faults.kind(error) is Fault.DEVICE:
            return False
        witness = self.witness
        if witness is None:
            return None
        if self.probe(witness.value, witness.parameters):
            return True
        self.witness = None  # it may be the witness that has gone bad: do not trust it twice
        return False

    def _suspect(self, error: BaseException) -> None:
        """Blame the model itself."""
        with self.lock:
            opened = self.breaker.failed(self.clock(), type(error).__name__[:60])
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
        fault, detail = faults.kind(error), f"{type(error).__name__}: {error}"
        failed: ServingError
        if fault is Fault.DEVICE:
            with self.lock:
                latched = self.breaker.latch(_LOST_DEVICE)
            if latched:
                self.on_breaker(Gate.LATCHED, _LOST_DEVICE)
        if isinstance(error, ServingError):
            failed = error
        elif fault is Fault.MEMORY and fits:
            failed = RequestTooLarge("this input needs more memory than the server has", detail=detail)
        elif fault is Fault.MEMORY:
            failed = Unavailable("the server has run out of memory")
            failed.detail = detail
        else:
            failed = ModelFailed("the model failed on this request", detail=detail)
        self.on_error(failed, error)
        return failed


def _is_wanted(item: Item, now: float) -> bool:
    """Whether somebody waits for a running item, and may still get it in time."""
    return item.state is State.RUNNING and not item.abandoned and item.deadline > now


def _padded(items: Sequence[Item]) -> int:
    return len(items) * max(item.tokens for item in items)
