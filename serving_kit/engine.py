"""What happens next: scheduling and recovery as one pure object.

    offer, cancel, drain, stop                      clients and owners, at any time
    next(now) ──▶ Action ──▶ (performed) ──▶ completed(action, result, now)      the worker, in turn
    take() ──▶ Output: events for the clients, records for the observers          after each of them

No threads, no clock, no model: every method takes `now`, in seconds on any monotonic clock. `batching.py`
drives it in production, and the simulator in tests. Not thread-safe: the owner holds a lock around each call.

The unit is a step: the scheduler chooses items, the model runs once, and each item is answered, has failed,
or goes on in the next step. Retries are steps that `next` returns; deadlines and cancellation apply between
steps.

Not here: performing an action (`execution.py`), which items share a step (`scheduling/`), what a failure
means (`failures/`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from serving_kit.actions import (
    Action,
    Answered,
    Canary,
    Executed,
    Exit,
    Free,
    Prepare,
    Release,
    Sleep,
    Step,
)
from serving_kit.errors import (
    DeadlineExceeded,
    InputRejected,
    ModelFailed,
    Overloaded,
    ServingError,
    Stopping,
    Unavailable,
    error_text,
)
from serving_kit.events import Chunk, Done, Event, Failed
from serving_kit.failures.breaker import Breaker, Gate
from serving_kit.failures.classify import Failure, WorkerDied, client_error
from serving_kit.failures.recovery import (
    Attributed,
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
from serving_kit.items import Item, ItemState, computed
from serving_kit.model import AnyPrepared, FailureKind, Input, More, Prepared, Work
from serving_kit.records import (
    BatchReason,
    BatchRecord,
    BreakerRecord,
    CostReleasedRecord,
    Drop,
    DropRecord,
    EvictedRecord,
    FailureRecord,
    Record,
    TokensRecord,
)
from serving_kit.scheduling.admission import Rejected
from serving_kit.scheduling.scheduler import Scheduler

_DEVICE_LOST = "the device is in an error state that only a new process clears: restart the kernel"
_TIDY_S = 10.0  # between thorough searches for memory: each stops all threads for a moment


class Output(NamedTuple):
    """The events and records since the last call of `take`."""

    events: Sequence[tuple[Item, Event]]
    records: Sequence[Record]


class Engine:
    """One model's queue, its breaker and its recovery.

    Args:
        scheduler: With the settings.
        canary: An input that the model is known to answer; None: there is none.
        retry: Whether a step that raised may run again in parts.
    """

    def __init__(self, scheduler: Scheduler, *, canary: Input | None = None, retry: bool = True) -> None:
        self.scheduler = scheduler
        self.breaker = Breaker()
        self._canary = canary
        self._retry = retry
        self._stopping = False
        self._released = False  # nothing is left to do but to give back what items hold
        self._recovery: Recovery | None = None
        self._request: Request | None = None  # what the recovery asks the worker for
        self._failed_step: Step | None = None  # that the recovery is for; None: it is for single items
        self._continuing: list[Item] = []  # items of the failed step that go on
        # What clients were told of which exception, by identity: a model's own class may not be hashable.
        self._errors: dict[tuple[int, bool], tuple[ServingError, BaseException]] = {}
        self._tidied_at = -math.inf  # when memory was last searched thoroughly
        self._events: list[tuple[Item, Event]] = []
        self._records: list[Record] = []
        self._to_release: list[AnyPrepared] = []

    # -- clients and owners ----------------------------------------------------------------------

    def offer(self, items: Sequence[Item], now: float) -> ServingError | None:
        """Admit all items, or none of them. Returns why not."""
        # The reason is looked at first, because every request passes here.
        if self.breaker.reason and not self.breaker.admits(now, self.scheduler.in_flight):
            return self._unavailable(now)
        rejected = self.scheduler.offer(items, now)
        return None if rejected is None else _rejection(rejected)

    def cancel(self, items: Sequence[Item], expired_at: float | None = None) -> None:
        """Their clients have left: waiting ones end now, those in the running step when it ends.

        Args:
            items: All of them, ended or not.
            expired_at: When their time was up and their clients were told so; None: it was not.
        """
        if expired_at is not None:
            self._record_drops([item for item in items if _is_alive(item)], Drop.EXPIRED, expired_at)
        for item in items:
            self.scheduler.cancel(item)
            if item.state is ItemState.DONE:
                self._release(item)

    def drain(self) -> None:
        """Admit nothing more; what was admitted is finished without waiting for more items."""
        self.scheduler.draining = True

    def stop(self) -> None:
        """The same, and `next` returns `Exit` once all of it has ended."""
        self._stopping = self.scheduler.draining = True

    def release(self) -> None:
        """End everything without an event; `next` only gives back what items hold, and ends."""
        self._released = True
        self.stop()
        self.evict()

    def evict(self) -> None:
        """End everything without an event: its owner answers."""
        self._recovery = self._request = self._failed_step = None
        self._continuing = []
        for item in self.scheduler.evict():
            self._release(item)

    def crashed(self, cause: BaseException, now: float) -> ServingError:
        """The thread that performs the actions has died. Returns what all its clients are told."""
        died = WorkerDied("the model thread has died")
        died.__cause__ = cause
        failed = ModelFailed("the server failed on this request", detail=f"{died}: {error_text(cause)}")
        self._errors.clear()
        self._records.append(FailureRecord(failed, died, FailureKind.CRASH))
        if self.breaker.failed(now, "a crash of its thread"):
            self._breaker_moved(Gate.OPEN)
        self.evict()
        return failed

    def unavailable_reason(self, now: float) -> str:
        """Why the breaker lets nothing be answered at `now`; empty if it does."""
        gate = self.breaker.gate(now)
        if gate is Gate.OPEN:
            return f"{self.breaker.reason}; it is tried again in {self.breaker.pause_s(now):.0f} s"
        return self.breaker.reason if gate is Gate.LATCHED else ""

    def take(self) -> Output:
        """The events and records since the last call."""
        output = Output(self._events, self._records)
        if output.events or output.records:
            self._events, self._records = [], []
        return output

    # -- the worker ------------------------------------------------------------------------------

    def next(self, now: float) -> Action:
        """What to do at `now`. It is performed before the next call, unless it is `Sleep` or `Exit`."""
        if self._released:
            return self._release_now() if self._to_release else Exit()
        while isinstance(self._request, Rerun) and not _is_any_wanted(self._request.items, now):
            self._resume(Reply(now, skipped=True), now)
        if self._request is not None:
            return self._action(self._request, now)
        if self._to_release:
            return self._release_now()
        if self.breaker.refuses_admitted(now):
            self._end(self.scheduler.evict(), self._unavailable(now), now)
        if fresh := self.scheduler.unprepared():
            return Prepare(fresh)
        decision = self.scheduler.poll(now)
        for item, drop in decision.dropped:
            self._drop([item], drop, decision.retry_after_s, now)
        if decision.evicted:
            self._records.append(EvictedRecord(len(decision.evicted)))
            return Release([item.prepared for item in decision.evicted if item.prepared is not None])
        if (batch := decision.batch) is not None:
            expected_s = self.scheduler.cost.high(batch.computed_tokens)
            return Step(batch.items, batch.reason, batch.left_waiting, expected_s)
        if self._to_release:  # of what was dropped just now
            return self._release_now()
        if self._stopping and not self.scheduler.in_flight:
            return Exit()
        return Sleep(decision.wake_at)

    def completed(self, action: Action, result: object, now: float) -> None:
        """An action was performed.

        Args:
            action: As `next` returned it.
            result: What came of it; see `actions.py`.
            now: When.
        """
        if self._released:
            self._completed_after_release(action, result)
            return
        if isinstance(action, Step):
            assert isinstance(result, Executed)
            self._step_completed(action, result, now)
        elif isinstance(action, Prepare):
            assert isinstance(result, list)
            self._prepared(action.items, result, now)
        elif isinstance(action, Canary):
            self._resume(Reply(now, healthy=result is True), now)
        elif isinstance(action, Free | Release):
            assert isinstance(result, list)
            self._report(result)
            if isinstance(action, Free):
                self._resume(Reply(now), now)
        if self._recovery is None:
            self._errors.clear()

    def _completed_after_release(self, action: Action, result: object) -> None:
        """An action has outlived its clients: it is recorded, and nothing follows from it."""
        if isinstance(action, Prepare) and isinstance(result, list):
            self._to_release += [each for each in result if isinstance(each, Prepared)]
        elif isinstance(action, Step) and isinstance(result, Executed):
            self._records.append(_batch_record(action, result, packed=self._packed))
            self._report([*result.unreleased, *([result.failure] if result.failure else [])])
        self._errors.clear()

    @property
    def _packed(self) -> bool:
        return self.scheduler.layout.packed

    def _tokens(self, work: Work) -> int:
        """Tokens that the model computes for an item alone."""
        return max(1, work.computed(packed=self._packed))

    # -- inside: steps ---------------------------------------------------------------------------

    def _prepared(
        self, items: Sequence[Item], results: Sequence[AnyPrepared | Failure | None], now: float
    ) -> None:
        failures = []
        for item, prepared in zip(items, results, strict=True):
            result = self._within_cache(prepared) if isinstance(prepared, Prepared) else prepared
            if isinstance(result, Failure):
                if item.state is ItemState.WAITING:
                    self.scheduler.cancel(item)
                    self._settle([item], result, alone=True, now=now)
                else:  # the owner is still told
                    self._client_error(result, alone=True)
                failures.append(Isolated(item, result))
            elif result is None:  # its client had left before
                continue
            elif item.state is ItemState.WAITING:
                item.prepared = result
                work = result.work
                self.scheduler.ready(
                    item,
                    self._tokens(work),
                    result.key,
                    divisible=work.divisible,
                    context_tokens=work.context_tokens,
                )
            else:  # its client has left since
                self._to_release.append(result)
        if failures:
            self._begin(attribute(failures, self._canary is not None), now)

    def _within_cache(self, prepared: AnyPrepared) -> AnyPrepared | Failure:
        """The same, or a refusal of a text that the cache cannot hold even alone."""
        limit, most = self.scheduler.cache_limit(), prepared.work.most_context
        if limit is None or most is None or most <= limit.value:
            return prepared
        tokens = prepared.work.tokens + prepared.work.context_tokens
        new = most - tokens
        text = (
            f"the text has {tokens} tokens and may get {new} more; the cache of this server holds "
            f"{limit.value} ({limit.reason}): send a shorter text, or ask for fewer new tokens"
        )
        self._to_release.append(prepared)
        return Failure(InputRejected(text), FailureKind.ERROR, text)

    def _report(self, failures: Sequence[Failure]) -> None:
        """Let the owner know of failures that no client is told of."""
        for failure in failures:
            self._client_error(failure, alone=True)

    def _step_completed(self, step: Step, executed: Executed, now: float) -> None:
        self._records.append(_batch_record(step, executed, packed=self._packed))
        self._report(executed.unreleased)
        retried, failure = step.reason is BatchReason.RETRY, executed.failure
        if failure is not None:
            self._resume(Reply(now, failure), now) if retried else self._recover(step, failure, now)
            return
        computed_tokens = sum(item.tokens for item in step.items)
        continuing, isolated = self._deliver(step.items, executed)
        self._record_tokens(step.items, executed, computed_tokens)
        if retried:
            self._continuing += continuing
            self._resume(Reply(now, isolated=isolated), now)
            return
        ok = any(isinstance(result, Answered) for result in executed.results)
        released = self.scheduler.finished(
            executed.ended, ok=ok, started=executed.started, continuing=continuing
        )
        self._release_ended(continuing)
        if released:
            self._records.append(CostReleasedRecord(released))
        if isolated is not None:
            self._begin(attribute([isolated], self._canary is not None), now)

    def _deliver(self, items: Sequence[Item], executed: Executed) -> tuple[list[Item], Isolated | None]:
        """Emit what a step gave. Returns what goes on, and if nothing was answered the first failure."""
        continuing: list[Item] = []
        isolated: Isolated | None = None
        answered = False
        for item, result in zip(items, executed.results, strict=True):
            if isinstance(result, Answered):
                answered = True
                item.prepared = None
                if result.chunk is not None:
                    self._events.append((item, Chunk(result.chunk)))
                self._events.append((item, Done(result.answer, *item.waited_s(executed.ended))))
            elif isinstance(result, More):
                answered = True
                item.tokens, item.context_tokens = self._tokens(result.work), result.work.context_tokens
                continuing.append(item)
                if result.chunk is not None:
                    if item.stream_deadline is not None:
                        item.deadline = item.stream_deadline
                    self._events.append((item, Chunk(result.chunk)))
            else:
                item.prepared = None
                self._settle([item], result, alone=True, now=executed.ended)
                if isolated is None and not result.rejects_input:
                    isolated = Isolated(item, result)
        if answered and self.breaker.has_failures and self.breaker.succeeded():
            self._breaker_moved(Gate.CLOSED)
        return continuing, None if answered else isolated

    def _record_tokens(self, items: Sequence[Item], executed: Executed, computed_tokens: int) -> None:
        """Record what a step of continuous batching has computed, with the times between tokens."""
        if not items[0].divisible:
            return
        first, between, new, decoded = [], [], 0, 0
        for item, result in zip(items, executed.results, strict=True):
            generated = 0 if isinstance(result, Failure) else result.generated
            if not generated:
                decoded += isinstance(result, Failure) and item.token_at is not None
                continue
            new += generated
            if item.token_at is None:
                first.append(executed.ended - item.arrived)
            else:
                decoded += 1
                between += [(executed.ended - item.token_at) / generated] * generated
            item.token_at = executed.ended
        self._records.append(
            TokensRecord(
                executed.ended,
                computed_tokens - decoded,
                new,
                tuple(first),
                tuple(between),
            )
        )

    # -- inside: recovery ------------------------------------------------------------------------

    def _recover(self, step: Step, failure: Failure, now: float) -> None:
        self._failed_step, self._continuing = step, []
        # Without a canary, many failing items in a batch must not end the bisection before the others are
        # found. Once the breaker has opened it is short: the model may well be broken.
        canary = self._canary is not None
        thorough = not canary and not self.breaker.reason
        recovery = recover(
            step.items,
            failure,
            now,
            has_canary=canary,
            retry=self._retry,
            thorough=thorough,
            packed=self._packed,
        )
        self._begin(recovery, now)

    def _begin(self, recovery: Recovery, now: float) -> None:
        self._recovery = recovery
        self._resume(None, now)

    def _resume(self, reply: Reply | None, now: float) -> None:
        """Run the recovery up to its next request to the worker. The ends of items are emitted here."""
        while self._recovery is not None:  # None: the thread that asked has died
            try:
                request = next(self._recovery) if reply is None else self._recovery.send(reply)
            except StopIteration as stop:
                self._recovery = self._request = None
                self._conclude(stop.value, now)
                return
            if isinstance(request, Settle):
                self._settle(request.items, request.failure, alone=request.alone, now=now)
                for item in request.items:  # it has ended, also for a cancellation before the step does
                    self._release(item)
            elif isinstance(request, Expire):
                self._drop(request.items, Drop.EXPIRED, None, now)
            else:
                self._request = request
                return
            reply = Reply(now)

    def _action(self, request: Request, now: float) -> Action:
        """A request of the recovery as an action."""
        if isinstance(request, Rerun):
            assert self._failed_step is not None
            expected_s = self.scheduler.cost.high(computed(request.items, packed=self._packed))
            return Step(request.items, BatchReason.RETRY, self._failed_step.left_waiting, expected_s)
        if isinstance(request, RunCanary):
            assert self._canary is not None
            return Canary(self._canary)
        assert isinstance(request, FreeMemory)
        thorough = now - self._tidied_at > _TIDY_S
        if thorough:
            self._tidied_at = now
        return Free(request.failure, thorough)

    def _conclude(self, conclusions: Conclusions, now: float) -> None:
        if conclusions.unreported is not None:
            self._client_error(conclusions.unreported, alone=True)
        for each in conclusions.attributed:
            self._record_failure(each, now)
        if (many := conclusions.too_large) is not None:
            self.scheduler.memory_limit.exceeded(many.longest, many.computed_tokens, now)
            if self._failed_step is not None and self._failed_step.items[0].divisible:
                self.scheduler.caches_exceeded(now)
        if self._failed_step is not None:
            self.scheduler.finished(now, ok=False, continuing=self._continuing)
            for item in self._failed_step.items:
                if item.state is ItemState.DONE:
                    self._release(item)
            self._failed_step, self._continuing = None, []

    def _record_failure(self, attributed: Attributed, now: float) -> None:
        """Count a failure against the model; if it is not known to be broken, an inconclusive one."""
        why = type(attributed.failure.error).__name__[:60]
        if attributed.healthy is False:
            opened = self.breaker.failed(now, why)
        else:
            inputs = {item.fingerprint for item in attributed.items}
            opened = self.breaker.failed_inconclusively(now, why, inputs)
        if opened:
            self._breaker_moved(Gate.OPEN)

    # -- inside: ends ----------------------------------------------------------------------------

    def _settle(self, items: Sequence[Item], failure: Failure, *, alone: bool, now: float) -> None:
        """End items with what their clients are told of a failure."""
        error = self._client_error(failure, alone=alone)
        for item in items:
            self._events.append((item, Failed(error, *item.waited_s(now))))

    def _end(self, items: Sequence[Item], error: ServingError, now: float) -> None:
        """End items that the model has not answered."""
        for item in items:
            self._events.append((item, Failed(error, *item.waited_s(now))))
            self._release(item)

    def _drop(self, items: Sequence[Item], drop: Drop, retry_after_s: float | None, now: float) -> None:
        """End items that were admitted, for lack of time."""
        self._record_drops(items, drop, now)
        for item in items:
            self._end([item], _dropped(drop, retry_after_s), now)

    def _record_drops(self, items: Sequence[Item], drop: Drop, now: float) -> None:
        """Record each once: of a cancelled item the client has left, or was told before."""
        self._records += [DropRecord(now, now - item.arrived, drop) for item in items if not item.cancelled]

    def _client_error(self, failure: Failure, *, alone: bool) -> ServingError:
        """What clients are told; the owner is told once for each exception."""
        if failure.is_plain:
            assert isinstance(failure.error, ServingError)
            return failure.error
        key = id(failure.error), alone or failure.kind is not FailureKind.MEMORY
        if key not in self._errors:
            error = client_error(failure, alone=alone)
            self._errors[key] = error, failure.error
            self._records.append(FailureRecord(error, failure.error, failure.kind))
            if failure.kind is FailureKind.DEVICE and self.breaker.latch(_DEVICE_LOST):
                self._breaker_moved(Gate.LATCHED)
        return self._errors[key][0]

    def _release_now(self) -> Release:
        released, self._to_release = self._to_release, []
        return Release(released)

    def _release(self, item: Item) -> None:
        if item.prepared is not None:
            self._to_release.append(item.prepared)
            item.prepared = None

    def _release_ended(self, continuing: Sequence[Item]) -> None:
        for item in continuing:  # its client has left during the step
            if item.state is ItemState.DONE:
                self._release(item)

    def _breaker_moved(self, gate: Gate) -> None:
        self._records.append(BreakerRecord(gate.value, self.breaker.reason))

    def _unavailable(self, now: float) -> Unavailable:
        pause_s = self.breaker.pause_s(now)
        return Unavailable(self.breaker.reason, retry_after=pause_s if pause_s < math.inf else None)


def _is_any_wanted(items: Sequence[Item], now: float) -> bool:
    return any(item.is_wanted(now) for item in items)


def _rejection(rejected: Rejected) -> ServingError:
    """What the client of a rejected request is told."""
    if rejected.stopping:
        return Stopping()
    if rejected.expired:
        return DeadlineExceeded(f"the request cannot be answered: {rejected.reason}")
    return Overloaded(f"the server is overloaded: {rejected.reason}", retry_after=rejected.retry_after_s)


def _is_alive(item: Item) -> bool:
    """Whether it has not ended; in a step that runs again in parts, some have before the others."""
    return item.state is ItemState.WAITING or (
        item.state is ItemState.RUNNING and item.prepared is not None and not item.cancelled
    )


def _dropped(drop: Drop, retry_after_s: float | None) -> ServingError:
    """What the client of an admitted item is told that gets no answer for lack of time."""
    error: ServingError
    if drop is Drop.EXPIRED:
        error = DeadlineExceeded("the request's time was up before the model was free")
    else:
        text = "the server is overloaded: it could not be answered in time"
        error = Overloaded(text, retry_after=retry_after_s)
    error.dropped = True
    return error


def _batch_record(step: Step, executed: Executed, *, packed: bool) -> BatchRecord:
    items = step.items
    return BatchRecord(
        started=executed.started,
        finished=executed.ended,
        size=len(items),
        tokens=sum(item.tokens for item in items),
        computed_tokens=computed(items, packed=packed),
        reason=step.reason,
        oldest_wait_s=executed.started - items[0].arrived,
        left_waiting=step.left_waiting,
        wasted=sum(item.cancelled or item.deadline < executed.ended for item in items),
        ok=executed.failure is None,
        packed=packed,
    )
