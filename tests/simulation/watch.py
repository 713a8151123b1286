"""Watches one service of the simulator: wraps its engine, and checks what goes in and what comes out.

It keeps its own account of every item, from what it sees at `offer`, `cancel`, `evict`, `next`, `completed`
and `take` only, so that a mistake in the engine does not hide itself.

Not here: what the clients see (`simulator.py`), virtual time (`virtual.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Protocol

from serving_kit.actions import Action, Answered, Canary, Executed, Prepare, Release, Step
from serving_kit.engine import Engine, Output
from serving_kit.errors import InputRejected, ServingError
from serving_kit.events import Chunk, Failed
from serving_kit.failures.breaker import Gate
from serving_kit.failures.classify import Failure
from serving_kit.items import Item, ItemState, computed, longest
from serving_kit.model import FailureKind, Limits, More
from serving_kit.records import (
    BatchReason,
    BatchRecord,
    Drop,
    FailureRecord,
    Outcome,
    Record,
    RequestRecord,
)
from serving_kit.scheduling.admission import step_limit_s
from serving_kit.service import Service
from serving_kit.settings import Settings
from serving_kit.worker import Handover
from tests.simulation.virtual import SimulatedWorker, VirtualLoop

_EPSILON = 1e-6
_FAILURES, _PAUSE_S = 5, 5.0  # of the breaker
_MEMORY_S = 300.0  # how long a lack of memory is remembered at least
_OF_THE_MODEL = frozenset({Outcome.FAILED, Outcome.TOO_LARGE, Outcome.REJECTED})


class Cause(Enum):
    """Why a step of the simulated model raised."""

    NONE = "none"
    QUERY = "query"  # one of its items
    BEHAVIOUR = "behaviour"
    MEMORY = "memory"


class WatchedModel(Protocol):
    """What is read of the simulated model."""

    example: Any
    cause: Cause
    fits: int
    least_fits: int
    held: set[int]
    limits: Limits


class _Phase(Enum):
    OPEN = "open"
    LEFT = "left"  # cancelled, or evicted by its owner
    ENDED = "ended"


class Watch:
    """The account of one service.

    Args:
        loop: With virtual time.
        check: Raises unless its first argument is true.
        model: The service's.
        retry: Whether inputs may run twice.
    """

    service: Service
    worker: SimulatedWorker

    def __init__(
        self, loop: VirtualLoop, check: Callable[[bool, str], None], model: WatchedModel, retry: bool
    ) -> None:
        self.loop, self.check, self.model, self.retry = loop, check, model, retry
        self.seen: Counter[Outcome] = Counter()  # by the clients
        self.told: Counter[Outcome] = Counter()  # by the records of requests
        self.steps: Counter[BatchReason] = Counter()  # completed
        self.observed: Counter[BatchReason] = Counter()  # by the records of steps
        self.items = 0  # of completed steps
        self.faults: Counter[FailureKind] = Counter()
        self.dropped: Counter[Drop] = Counter()  # items that had been admitted
        self.starts: list[tuple[float, Sequence[Item]]] = []
        self._phases: dict[Item, _Phase] = {}
        self._open: dict[Item, None] = {}  # in order of arrival at the queue
        self._ran: set[Item] = set()
        self._excused: set[Item] = set()  # may fail although nothing is wrong with them
        self._errors: dict[int, ServingError] = {}  # that a record has told of
        self._causes: dict[int, BaseException] = {}
        self._lost = False  # the device
        self._batch: Step | None = None  # the last one that was not a retry
        self._raised: Step | None = None  # the same, if its failure is the last thing that has happened
        self._streak = 0  # batches in a row without an answer after which the canary failed
        self._shut_until = -math.inf
        self._too_much: tuple[Sequence[Item], int, int] | None = None  # did not fit; may be learned
        self._passed: set[Item] = set()  # of these: ran in a smaller step
        self._learned: dict[int, tuple[int, float]] = {}  # padded tokens that did not fit, by class of length

    def attach(self, handover: Handover, worker: SimulatedWorker) -> None:
        """Watch what drives this handover."""
        self.worker = worker
        if hasattr(self, "engine"):
            return
        self.handover = handover
        self.engine: Engine = handover.engine
        self._wrap()

    @property
    def settings(self) -> Settings:
        """In force now."""
        return self.engine.scheduler.settings

    def observe(self, record: Record) -> None:
        """A record, as an observer gets it."""
        if isinstance(record, RequestRecord):
            self.told[record.outcome] += 1
        elif isinstance(record, BatchRecord):
            self.observed[record.reason] += 1
        load = self.service.batcher.load()
        self.check(0 <= load.queue_depth <= load.in_flight, "counts do not add up")

    def forget(self, action: Action, result: object) -> None:
        """A worker has died with this action: what it alone held is lost."""
        if isinstance(action, Prepare) and isinstance(result, list):
            self.model.held.difference_update(id(each) for each in result)
        elif isinstance(action, Release):
            self.model.held.difference_update(id(each) for each in action.prepared)

    # -- at rest ---------------------------------------------------------------------------------

    def check_idle(self) -> None:
        """All requests have ended."""
        load = self.service.batcher.load()
        self.check(load.in_flight == 0, f"{load.in_flight} items are left though all requests have ended")
        self.check(not self.model.held, "the model still holds items that have ended")
        self.check(not vars(self.service.batcher)["_unanswered"], "the batcher keeps items that have ended")
        self.check(not vars(self.engine)["_errors"], "the engine keeps exceptions that are dealt with")

    def check_end(self) -> None:
        """The service has stopped."""
        self.check(self.service.batcher.load().in_flight == 0, "items are left after the stop")
        self.check(not self._open, f"{len(self._open)} admitted items got no end")
        self.check(not self.model.held, "the model still holds items after the stop")
        self.check(self.told == self.seen, f"the records say {self.told}, the clients {self.seen}")
        self.check(self.observed == self.steps, f"observed are {self.observed}, completed {self.steps}")
        told = self.service.statistics()
        self.check(_counts(told.requests) == self.seen, "statistics of requests")
        self.check(_counts(told.batches) == self.steps, "statistics of batches")
        self.check(_counts(told.faults) == self.faults, "statistics of failures")
        self.check(told.items == self.items, "statistics of items")
        self.check(
            _counts(told.dropped_items) == self.dropped, f"dropped {told.dropped_items}: {self.dropped}"
        )
        self._check_order()

    def _check_order(self) -> None:
        """Every new batch holds the oldest of the items that were waiting then and have run."""
        oldest_later = float("inf")
        for now, items in reversed(self.starts):
            oldest = min(item.arrived for item in items)
            self.check(oldest <= oldest_later or oldest_later > now, "the oldest item had to wait")
            oldest_later = min(oldest_later, oldest)

    # -- the engine ------------------------------------------------------------------------------

    def _wrap(self) -> None:
        engine: Any = self.engine
        offer, cancel, evict, crashed = engine.offer, engine.cancel, engine.evict, engine.crashed
        take, next_, completed = engine.take, engine.next, engine.completed

        def watched_offer(items: Sequence[Item], now: float) -> ServingError | None:
            error: ServingError | None = offer(items, now)
            if error is None:
                self._offered(items)
            return error

        def watched_cancel(items: Sequence[Item], expired_at: float | None = None) -> None:
            left = [item for item in items if self._phases[item] is _Phase.OPEN]
            self._leave(left)
            self.dropped[Drop.EXPIRED] += len(left) * (expired_at is not None)
            cancel(items, expired_at)

        def watched_evict() -> None:
            items = list(self._open)
            self._leave(items)
            self._too_much = None
            evict()
            if items:
                self.loop.call_soon(self._check_told, items)

        def watched_crashed(cause: BaseException, now: float) -> ServingError:
            self._raised = self._too_much = None
            failed: ServingError = crashed(cause, now)
            return failed

        def watched_take() -> Output:
            output: Output = take()
            self._taken(output)
            return output

        def watched_next(now: float) -> Action:
            action: Action = next_(now)
            if isinstance(action, Step):
                self._chosen(action, now)
            return action

        def watched_completed(action: Action, result: object, now: float) -> None:
            if isinstance(action, Step):
                assert isinstance(result, Executed)
                self._step_completed(action, result, now)
            elif isinstance(action, Canary) and result is not True:
                self._canary_failed(now)
            elif isinstance(action, Prepare) and isinstance(result, list):
                for each in result:
                    self._lost |= isinstance(each, Failure) and each.kind is FailureKind.DEVICE
            completed(action, result, now)

        engine.offer, engine.cancel, engine.evict = watched_offer, watched_cancel, watched_evict
        engine.crashed, engine.take = watched_crashed, watched_take
        engine.next, engine.completed = watched_next, watched_completed

    def _offered(self, items: Sequence[Item]) -> None:
        waiting, most = self.engine.scheduler.queue_depth, self.settings.max_queue_size
        self.check(waiting <= most, f"{waiting} items wait; max_queue_size is {most}")
        self.check(not self._lost, "an item is admitted though the device is lost")
        for item in items:
            self._phases[item] = _Phase.OPEN
            self._open[item] = None
        self.loop.call_soon(self.loop.call_soon, self._check_awake, self.handover.wakeups)

    def _check_awake(self, before: int) -> None:
        worker = self.worker
        awake = self.handover.wakeups > before or worker.busy or not worker.alive
        self.check(awake, "the worker sleeps though an item was admitted")

    def _leave(self, items: Sequence[Item]) -> None:
        for item in items:
            self.check(item.state is not ItemState.DONE, "an item has ended without an event")
            self._phases[item] = _Phase.LEFT
            del self._open[item]

    def _check_told(self, items: Sequence[Item]) -> None:
        told = all(item.payload.ended.done() for item in items)
        self.check(told, "an item was evicted and its client not told")

    def _taken(self, output: Output) -> None:
        for record in output.records:
            if isinstance(record, FailureRecord):
                self._failure_recorded(record)
        for item, event in output.events:
            phase = self._phases[item]
            self.check(phase is not _Phase.ENDED, f"{type(event).__name__} comes after the end")
            if isinstance(event, Chunk):
                ends = item.stream_deadline
                self.check(ends is None or item.deadline == ends, "a chunk does not extend the deadline")
                continue
            self._phases[item] = _Phase.ENDED
            self._open.pop(item, None)
            if isinstance(event, Failed):
                if event.error.dropped and phase is _Phase.OPEN:
                    late = event.error.outcome is Outcome.EXPIRED
                    self.dropped[Drop.EXPIRED if late else Drop.HOPELESS] += 1
                self._check_failed(item, event.error)
        for item in self._open:
            if item.state is ItemState.DONE:
                self.check(False, "an item has ended without an event")

    def _failure_recorded(self, record: FailureRecord) -> None:
        self.check(id(record.cause) not in self._causes, "an exception is recorded twice")
        self._causes[id(record.cause)] = record.cause  # kept, so that no other gets its id
        self._errors[id(record.error)] = record.error
        if not isinstance(record.error, InputRejected):
            self.faults[record.kind] += 1

    def _check_failed(self, item: Item, error: ServingError) -> None:
        if error.outcome is Outcome.FAILED or error.outcome is Outcome.TOO_LARGE:
            self.check(id(error) in self._errors, "a client is told of a failure that was not recorded")
        if item.input.value.bad or error.outcome not in _OF_THE_MODEL:
            return
        engine = self.engine
        excused = item in self._excused or not self.retry or self._lost
        unsure = self.model.example is None and engine.breaker.reason  # it is not bisected to the end
        self.check(excused or bool(unsure), f"a good query fails: {error!r}")

    # -- steps -----------------------------------------------------------------------------------

    def _chosen(self, step: Step, now: float) -> None:
        items, retried = step.items, step.reason is BatchReason.RETRY
        self.check(not self._lost, "a step runs though the device is lost")
        self.check(len(set(map(id, items))) == len(items), "an item is twice in a step")
        for item in items:
            self.check(item.deadline > now, "an item starts after its deadline")
            self.check(item.state is ItemState.RUNNING, "an item runs that has ended")
            phase = self._phases[item]
            self.check(phase is _Phase.OPEN, f"an item runs that has {phase.value}")
        if retried:
            return
        self.check(now >= self._shut_until - _EPSILON, "a step runs though the breaker must be open")
        self._check_size(step, now)
        if step.reason is BatchReason.CONTINUED:
            self._check_joins(items)
        else:
            self.starts.append((now, items))
            if step.reason is BatchReason.DEADLINE:
                self._check_wait(items, now)
        self._ran.update(items)
        self._batch, self._raised = step, None

    def _check_size(self, step: Step, now: float) -> None:
        items, settings, scheduler = step.items, self.settings, self.engine.scheduler
        if self._too_much is not None:
            together, length, tokens = self._too_much
            if not self.retry or self._passed.issuperset(together):
                self._learned[self._length_class(length)] = tokens, now
            self._too_much = None
        self._check_cache(items)
        if len(items) == 1:
            return
        kind = "of items that go on " if step.reason is BatchReason.CONTINUED else ""
        self.check(len(items) <= settings.max_batch_size, f"a step {kind}has more than max_batch_size")
        budget = settings.max_batch_tokens
        if budget == "auto" and items[0].divisible:
            budget = math.inf
        if budget == "auto":
            budget = scheduler.cost.budget(step_limit_s(settings))
        tokens, length = self._computed(items), longest(items)
        self.check(tokens <= budget, f"a step {kind}has more than max_batch_tokens")
        if items[0].divisible:  # what did not fit bounds the prompts in a step, not the step
            self.check(tokens <= budget, f"a step {kind}has more than max_batch_tokens")
            return
        limit = scheduler.memory_limit.limit(length, now)
        self.check(tokens <= limit, f"a step {kind}has more than the memory limit")
        if self.retry:  # else what did not fit may have been one item
            self.check(limit >= self.model.least_fits / 4, f"the memory limit is {limit:g}, far too low")
        for own, (too_much, at) in self._learned.items():
            if own <= self._length_class(length) and now < at + _MEMORY_S:
                self.check(tokens < too_much, f"a step {kind}is as large as what did not fit")

    def _check_cache(self, items: Sequence[Item]) -> None:
        """All caches together stay within their bound, unless there is one only."""
        limit = self.engine.scheduler.cache_limit()
        if limit is None:
            return
        cached = {item: _cached(item) for item in {*self._open, *items}}
        for item in items:
            cached[item] += item.tokens
        holding = [tokens for tokens in cached.values() if tokens]
        self.check(len(holding) < 2 or sum(holding) <= limit.value, "the caches hold more than they may")

    def _computed(self, items: Sequence[Item]) -> int:
        return computed(items, packed=self.model.limits.layout.packed)

    def _length_class(self, length: int) -> int:
        """A model that packs has no rows of one length."""
        return 0 if self.model.limits.layout.packed else length.bit_length()

    def _check_joins(self, items: Sequence[Item]) -> None:
        """Those that join are the oldest; where hopeless items are dropped, of those that it could take.

        Of prompts the shortest come next, once the oldest has its part.
        """
        joining = [item for item in items if item not in self._ran and not item.divisible]
        if not joining:
            return
        drops = self.settings.drop_hopeless
        youngest = max(joining, key=lambda item: item.arrived)
        for item in self._open:
            if item.state is not ItemState.WAITING or item.arrived >= youngest.arrived:
                continue
            passed_over = not drops or (
                item.key == youngest.key
                and item.tokens <= youngest.tokens
                and item.deadline >= youngest.deadline
            )
            self.check(not passed_over, "a younger item joins before an older one")

    def _check_wait(self, items: Sequence[Item], now: float) -> None:
        """`max_wait_ms` is waited for, unless an item would expire."""
        settings = self.settings
        if settings.drop_hopeless or now + _EPSILON >= items[0].arrived + settings.max_wait_s:
            return
        high_s = self.engine.scheduler.cost.high(self._computed(items))
        for item in items:
            reserve_s = max(high_s, (item.deadline - item.arrived) / 2)
            if item.deadline - reserve_s <= now + _EPSILON:
                return
        self.check(False, "a step does not wait for max_wait_ms")

    def _step_completed(self, step: Step, executed: Executed, now: float) -> None:
        items, cause = step.items, self.model.cause
        self.steps[step.reason] += 1
        self.items += len(items)
        if any(isinstance(each, Answered | More) for each in executed.results):
            self._streak, self._shut_until = 0, -math.inf
        if cause is Cause.BEHAVIOUR or cause is Cause.MEMORY:
            self._excused.update(items)
        else:
            self._excused.difference_update(items)
        if step.reason is BatchReason.RETRY:
            pairs = zip(items, executed.results, strict=False)  # there are none if it raised
            self._passed.update(item for item, result in pairs if isinstance(result, Answered | More))
        failure = executed.failure
        self._lost |= failure is not None and failure.kind is FailureKind.DEVICE
        if failure is None or step.reason is BatchReason.RETRY:
            self._raised = None
            return
        self._raised, fits = step, self.model.fits
        each_fits = all(item.tokens <= fits and item.input.value.bad != "memory" for item in items)
        if cause is Cause.MEMORY and len(items) > 1 and each_fits:
            self._too_much, self._passed = (items, longest(items), self._computed(items)), set()

    def _canary_failed(self, now: float) -> None:
        if self._batch is not None:
            self._excused.update(self._batch.items)
        if self._raised is None:
            return
        self._raised = None
        gate = self.engine.breaker.gate(now)
        if gate is Gate.LATCHED or now < self._shut_until:
            return
        self._streak += 1
        if self._streak >= _FAILURES:
            self._shut_until = now + _PAUSE_S


def _cached(item: Item) -> int:
    """Tokens that the model holds of an item."""
    return item.prepared.payload.cached if item.prepared is not None else 0


def _counts(told: Any) -> Counter[Any]:
    return Counter({each: count for each, count in told.items() if count})
