"""WHEN it runs: the queue and the one model thread around the scheduler.

The loop thread and the model thread meet only here:

    loop thread                            model thread ("serving-kit-model")
    submit() ── offer ──▶ ┌───────────┐ ── poll ──▶ prepare, forward, finish
    cancel() ──────────▶  │ Scheduler │                        │
    futures ◀─────────────└───────────┘◀── finished ───────────┘  one call_soon_threadsafe per batch
    _ended() ◀──────── the thread has died: answer everybody, start another ── breaker.py

One lock guards the scheduler and the breaker; no model code runs while it is held. The model thread
sleeps on a condition, so an idle server wakes nobody.

Nobody waits for ever. What the model raises is dealt with on its thread: a batch is taken apart until
the culprit stands alone (`culprits.py`), one that does not fit into memory is halved (`memory.py`).
What our own code raises there ends the thread. The loop thread keeps the list of all that is
unanswered, so that it can answer everybody whatever state the dead one has left behind.

Not here: which items run together (`scheduler.py`), what a model is (`models.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from serving_kit import faults
from serving_kit.breaker import Breaker, Gate
from serving_kit.culprits import Search
from serving_kit.errors import (
    DeadlineExceeded,
    ModelFailed,
    Overloaded,
    RequestTooLarge,
    ServingError,
    Unavailable,
)
from serving_kit.faults import Fault, WorkerDied, WrongNumberOfOutputs
from serving_kit.memory import make_room
from serving_kit.records import BatchReason, BatchRecord
from serving_kit.scheduler import Batch, Decision, Drop, Item, Scheduler, State
from serving_kit.settings import Settings

THREAD_NAME = "serving-kit-model"
_LOST_DEVICE = "the device is in an error state that only a new process clears: restart the kernel"
_LOOK_AGAIN_S = 0.1  # for a thread that should have ended
_TIDY_S = 10.0  # between thorough searches for memory: each stops all threads for a moment
_NO_THREAD_S = 1.0  # until it is tried again to start a thread that the system would not give


@dataclass(frozen=True, slots=True)
class Prepared:
    """One input, ready for the model.

    `group` names what may share a forward: items of different groups never do.
    """

    payload: Any
    tokens: int = 1
    group: Hashable = ()


class Model(Protocol):
    """What the worker needs: three steps, all of them called on the model thread only.

    `prepare` raises `InputRejected` for an input that this model cannot take. `forward` gets
    prepared inputs of one group and returns one output for each, in order. `finish` turns one
    output into what the client gets. Anything else that they raise is a `ModelFailed`, or a
    `RequestTooLarge` if it is for want of memory.

    A batch on which `forward` has raised is run again in parts, and so is an input that was answered
    before, to see whether the model still works.
    """

    def estimate(self, value: Any) -> int:
        """Rough length in tokens, before `prepare`. Called on the loop thread; must be cheap."""

    def prepare(self, value: Any, parameters: Mapping[str, Any]) -> Prepared:
        """Check and convert one input."""

    def forward(self, batch: Sequence[Prepared]) -> Sequence[Any]:
        """Run the model once."""

    def finish(self, output: Any, prepared: Prepared) -> Any:
        """Make one output presentable."""


class Result(NamedTuple):
    """How one item ended. Errors travel as values: a future that nobody reads must not complain."""

    value: Any = None
    error: ServingError | None = None
    queue_wait: float | None = None  # seconds from arrival to batch start; None: never started
    forward: float | None = None  # seconds that its batch took; None: never started


@dataclass(eq=False, slots=True)
class Job:
    """The payload of an item: what to run and where to put the result."""

    value: Any
    parameters: Mapping[str, Any]
    future: asyncio.Future[Result]
    prepared: Prepared | None = None


class _Call(NamedTuple):
    """One forward and what came of it."""

    items: Sequence[Item]
    started: float
    ended: float
    answers: Sequence[Any] = ()  # one for each item: what its client gets, or a `ServingError`
    error: BaseException | None = None  # what the model raised instead


class _Witness(NamedTuple):
    """An input that the model has answered well: if it still does, a failure is not the model's."""

    seconds: float  # that its batch took
    value: Any
    parameters: Mapping[str, Any]


@dataclass(eq=False)
class Batcher:
    """Runs one model on one thread, a batch at a time.

    Start, submit, cancel and stop belong to the loop thread; `tune` and the readers may be called
    from any thread. The two hooks are called on the model thread, and `on_error` also on the loop
    thread; if one raises, that counts as a crash of the model thread.
    """

    model: Model | None  # None once it was let go
    scheduler: Scheduler
    on_batch: Callable[[BatchRecord], None]
    on_error: Callable[[ServingError, BaseException], None]  # keeps the details, sets error.incident
    clock: Callable[[], float] = time.monotonic
    breaker: Breaker = field(default_factory=Breaker)
    busy_since: float | None = None  # start of the running forward
    wakeups: int = 0  # times that the worker looked for work; an idle server adds none
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None
    _stopped: asyncio.Event | None = None
    _stopping: bool = False
    _cause: BaseException | None = None  # what the model thread has died of
    _revival: asyncio.TimerHandle | None = None  # when a dead thread will have a successor
    _unanswered: set[Item] = field(default_factory=set)  # the loop thread's own
    _witness: _Witness | None = None  # the model thread's own
    _tidied_at: float = -math.inf  # when memory was last looked for thoroughly
    _wake: threading.Condition = field(default_factory=threading.Condition)

    # -- the loop thread's side ------------------------------------------------------------------

    def start(self) -> None:
        """Start the model thread. Results will be delivered to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._spawn()

    def submit(
        self,
        values: Sequence[Any],
        parameters: Mapping[str, Any],
        *,
        arrived: float,
        deadline: float,
    ) -> list[Item]:
        """Queue every value as an item of its own, all or none.

        Returns:
            The items; await `item.payload.future` for each one's `Result`.

        Raises:
            RequestTooLarge: more values than the queue can ever hold.
            Overloaded: refused at the door.
            Unavailable: the server is stopping, or the model is broken.
        """
        assert self._loop is not None, "submit() before start(). This is a bug."
        model = self.model
        if model is None or self.scheduler.draining:
            raise Unavailable("the server is stopping")
        if self._thread is not None and not self._thread.is_alive():
            self._ended(self._thread)  # it could not even say so
        most = self.scheduler.settings.max_queue_size
        if len(values) > most:
            raise RequestTooLarge(f"{len(values)} inputs in one request; the most is {most} (max_queue_size)")
        items = [
            Item(
                arrived,
                deadline,
                max(1, model.estimate(value)),
                Job(value, parameters, self._loop.create_future()),
            )
            for value in values
        ]
        now = self.clock()
        with self._wake:
            if not self.breaker.admits(now, self.scheduler.in_flight):
                raise self._out_of_order(now)
            refusal = self.scheduler.offer(items, now)
            if refusal is None:
                self._unanswered.update(items)
                self._wake.notify()
        if refusal is not None:
            raise Overloaded(f"the server is overloaded: {refusal.reason}", retry_after=refusal.retry_after)
        return items

    def cancel(self, items: Sequence[Item]) -> None:
        """Give up on items: waiting ones leave the queue now, running ones end unheard."""
        self._unanswered.difference_update(items)
        with self._wake:
            for item in items:
                self.scheduler.cancel(item)

    def tune(self, settings: Settings) -> None:
        """Swap the settings; they count from the next decision. Any thread."""
        with self._wake:
            self.scheduler.settings = settings
            self._wake.notify()  # a worker that lingers must look at the new max_wait_ms

    def drain(self) -> None:
        """Refuse new items from now on; the admitted ones are finished. Any thread."""
        with self._wake:
            self.scheduler.draining = True
            self._wake.notify()

    async def stop(self, drain_s: float) -> bool:
        """Refuse new items, finish the admitted ones within `drain_s` seconds, end the thread.

        Returns whether everything was finished. If not, what was left has been answered with
        `Unavailable`, and the thread ends when the forward that holds it returns.
        """
        self._stopping = True
        self.drain()
        thread = self._thread
        if self._revival is not None:  # it is dead, and stays so
            self._revival.cancel()
        try:
            if thread is not None and self._stopped is not None:
                async with asyncio.timeout(drain_s):
                    while thread.is_alive() and not self._stopped.is_set():
                        with contextlib.suppress(TimeoutError):  # it may die without a word
                            await asyncio.wait_for(self._stopped.wait(), _LOOK_AGAIN_S)
                thread.join(drain_s)  # it has said that it is done: this is the last microsecond
        except TimeoutError:
            return False
        else:
            return True
        finally:
            self._answer_everybody(Unavailable("the server has stopped"))

    def abandon(self) -> None:
        """End the thread and let the model go. Any thread; after `stop`, or if the loop has died.

        A forward that is still stuck in the model keeps it until it ends.
        """
        self._stopping = True
        self.model = self._witness = None
        with self._wake:
            self.scheduler.draining = True
            self.scheduler.evict()
            self._wake.notify()

    @property
    def alive(self) -> bool:
        """Whether the model thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def trouble(self) -> str:
        """Why nothing can be answered now, in words for strangers; empty if something can."""
        now = self.clock()
        gate = self.breaker.gate(now)
        if gate is Gate.OPEN:
            return f"{self.breaker.reason}; it is tried again in {self.breaker.pause(now):.0f} s"
        if gate is Gate.LATCHED:
            return self.breaker.reason
        return "" if self.alive else "the model thread has died and is being started again"

    def doubt(self) -> str:
        """Why it is not certain that requests can be answered; empty if there is no reason for doubt."""
        return self.breaker.reason and f"{self.breaker.reason}; one request at a time is let in to try again"

    def _out_of_order(self, now: float) -> Unavailable:
        pause = self.breaker.pause(now)
        return Unavailable(self.breaker.reason, retry_after=pause if pause < math.inf else None)

    def _spawn(self) -> None:
        if self._revival is not None and self._thread is not None and self._thread.ident is not None:
            self._thread.join(_LOOK_AGAIN_S)  # the last microsecond of the one before
        self._revival = None
        self._thread = threading.Thread(target=self._live, name=THREAD_NAME, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # the system has no thread to give
            self._cause = error
            self._ended(self._thread, _NO_THREAD_S)

    def _ended(self, thread: threading.Thread, at_least_s: float = 0.0) -> None:
        """The model thread is gone. Unless it was to go: answer everybody and start another."""
        assert self._loop is not None
        assert self._stopped is not None
        if thread is not self._thread or self._revival is not None:
            return  # already dealt with
        if self._stopping and (self._cause is None or self.model is None):
            self._stopped.set()
            return
        died = WorkerDied("the model thread has died")
        died.__cause__, self._cause = self._cause, None
        failed = ModelFailed("the server failed on this request", detail=f"{died}: {died.__cause__!r}")
        self.busy_since = None
        with self._wake:
            now = self.clock()
            self.breaker.failed(now, "a crash of its thread")
            pause = max(self.breaker.pause(now), at_least_s)
        if self._stopping:
            self._stopped.set()
        else:
            self._revival = self._loop.call_later(pause, self._spawn)
        try:
            self.on_error(failed, died)
        finally:  # the hook may be what is broken; the clients still come first
            self._answer_everybody(failed)

    def _answer_everybody(self, error: ServingError) -> None:
        with self._wake:
            self.scheduler.evict()
            self._wake.notify()
        self._resolve([(item, Result(error=error)) for item in self._unanswered])

    def _resolve(self, results: Sequence[tuple[Item, Result]]) -> None:
        """Wake the clients."""
        for item, result in results:
            self._unanswered.discard(item)
            future: asyncio.Future[Result] = item.payload.future
            if not future.done():
                future.set_result(result)

    # -- the model thread's side -----------------------------------------------------------------

    def _live(self) -> None:
        """The thread's life; whatever ends it, the loop thread hears of it."""
        try:
            while self._cycle():
                pass
        except BaseException as error:
            self._cause = error
        finally:
            self._post(self._ended, threading.current_thread())

    def _cycle(self) -> bool:
        """Wait for something to do and do it. Returns False when there is no more to come."""
        refused: list[Item] = []
        fresh: list[Item] = []
        decision = Decision()
        with self._wake:
            while True:
                self.wakeups += 1
                now = self.clock()
                if self.breaker.gate(now) in (Gate.OPEN, Gate.LATCHED):
                    refused = self.scheduler.evict()
                fresh = self.scheduler.unprepared()
                if fresh:
                    break
                decision = self.scheduler.poll(now)
                if refused or decision.batch or decision.dropped:
                    break
                if self._stopping and not self.scheduler.queue_depth:
                    return False
                self._wake.wait(None if decision.wake_at is None else decision.wake_at - now)
        if refused:
            self._deliver([(item, Result(error=self._out_of_order(now))) for item in refused])
        if fresh:
            self._prepare(fresh)
            return True
        self._deliver([(item, Result(error=_why(drop))) for item, drop in decision.dropped])
        if decision.batch:
            self._run(decision.batch)
        return True

    def _prepare(self, items: Sequence[Item]) -> None:
        """Learn the lengths of new items; answer those that the model cannot take."""
        model = self._model()
        for item in items:
            if item.state is not State.WAITING:
                continue  # its client has left since
            job: Job = item.payload
            try:
                prepared = model.prepare(job.value, job.parameters)
            except BaseException as error:
                failed = self._failure(error)
                with self._wake:
                    self.scheduler.cancel(item)
                self._deliver([(item, Result(error=failed))])
                if self._still_works(error) is not True:
                    self._suspect(error)
            else:
                with self._wake:
                    job.prepared = prepared
                    self.scheduler.ready(item, max(1, prepared.tokens), prepared.group)

    def _run(self, batch: Batch) -> None:
        """One batch from start to answers."""
        call = self._call(batch.items)
        if call.error is not None:
            self._record(call, batch.reason, batch.left_waiting)
            self._recover(batch, call, call.error)
            with self._wake:
                self.scheduler.finished(self.clock(), ok=False)
            return
        with self._wake:
            self.scheduler.finished(call.ended, ok=True, started=call.started)
        self._answer(call, call.started)
        self._record(call, batch.reason, batch.left_waiting)

    def _call(self, items: Sequence[Item]) -> _Call:
        """Run the model once on prepared items."""
        model = self._model()
        inputs: list[Prepared] = [item.payload.prepared for item in items]
        started = self.busy_since = self.clock()
        try:
            outputs = model.forward(inputs)
            if len(outputs) != len(inputs):
                raise WrongNumberOfOutputs(f"{len(inputs)} inputs, {len(outputs)} outputs")
        except BaseException as error:
            return _Call(items, started, self.clock(), error=error)
        else:
            answers = [self._finish(model, *pair) for pair in zip(outputs, inputs, strict=True)]
            return _Call(items, started, self.clock(), answers)
        finally:
            self.busy_since = None

    def _finish(self, model: Model, output: Any, prepared: Prepared) -> Any:
        """One answer, or the `ServingError` that stands in for it. A bad one fails alone."""
        try:
            return model.finish(output, prepared)
        except BaseException as error:
            return self._failure(error)

    def _answer(self, call: _Call, started: float) -> None:
        """Deliver what a forward has given to items whose batch was `started` then."""
        pairs = list(zip(call.items, call.answers, strict=True))
        good = next((item for item, answer in pairs if not isinstance(answer, ServingError)), None)
        if good is not None and (self.breaker.reason or self.breaker.failures):
            with self._wake:  # before anybody is answered, or he could be refused for what is over
                self.breaker.succeeded()
        self._deliver(
            [(item, _result(answer, started - item.arrived, call.ended - started)) for item, answer in pairs]
        )
        if good is None:
            bad = next((answer for answer in call.answers if isinstance(answer, ModelFailed)), None)
            if bad is not None and self._still_works(bad) is not True:
                self._suspect(bad)
            return
        seconds = call.ended - call.started
        if self._witness is None or seconds < self._witness.seconds:
            self._witness = _Witness(seconds, good.payload.value, good.payload.parameters)

    def _record(self, call: _Call, reason: BatchReason, left_waiting: int) -> None:
        """Tell the world about one forward."""
        tokens = [item.tokens for item in call.items]
        self.on_batch(
            BatchRecord(
                started=call.started,
                finished=call.ended,
                size=len(tokens),
                tokens=sum(tokens),
                padded_tokens=_padded(call.items),
                reason=reason,
                oldest_wait=call.started - call.items[0].arrived,
                left_waiting=left_waiting,
                wasted=sum(item.abandoned or item.deadline < call.ended for item in call.items),
                ok=call.error is None,
            )
        )

    # -- the model thread's side, when the model has raised ----------------------------------------

    def _recover(self, batch: Batch, call: _Call, error: BaseException) -> None:
        """Answer every item of a batch that raised; none but the culprits hear of it.

        One culprit among n takes 2 * ceil(log2 n) + 1 further forwards at most: one for the witness,
        and the search.
        """
        items, started = batch.items, call.started
        settled: set[Item] = set()  # answered, one way or the other
        blamed: set[Item] = set()
        too_large: list[Sequence[Item]] = []  # parts that did not fit into memory
        passed = False

        def blame(culprits: Sequence[Item]) -> None:
            failed = self._failure(error, fits=passed or works is not False)
            took = self.clock() - started
            results = [
                (i, Result(error=failed, queue_wait=started - i.arrived, forward=took)) for i in culprits
            ]
            self._deliver(results)
            settled.update(culprits)
            blamed.update(culprits)

        fault = faults.kind(error)
        if fault is Fault.MEMORY:
            self._make_room(error)
            too_large.append(items)
        halving = fault is Fault.MEMORY and len(items) > 1
        nobody = not any(_is_wanted(item, call.ended) for item in items)
        works = None if halving or nobody else self._still_works(error)
        over = nobody or fault is Fault.OUTPUTS or works is False
        search = Search(len(items), vouched=halving or works is True)
        while not over and (part := search.next()) is not None:
            now = self.clock()
            live = [items[i] for i in part if items[i] not in settled and _is_wanted(items[i], now)]
            if not live:
                continue
            call = self._call(live)
            self._record(call, BatchReason.RETRY, batch.left_waiting)
            if call.error is None:
                passed = True
                search.passed()
                self._answer(call, started)
                settled.update(live)
                continue
            error, fault = call.error, faults.kind(call.error)
            if fault is Fault.MEMORY:
                self._make_room(error)
                too_large.append(live)
            search.failed(part)
            if len(live) == 1 or fault in (Fault.OUTPUTS, Fault.DEVICE):
                if not passed and works is None:
                    works = self._still_works(error)
                blame(live)
                over = works is False
        now = self.clock()
        late = [item for item in items if item not in settled and item.deadline <= now]
        self._deliver([(item, Result(error=_why(Drop.EXPIRED))) for item in late])
        settled.update(late)
        if rest := [item for item in items if item not in settled and _is_wanted(item, now)]:
            blame(rest)
        if not blamed:
            self._failure(error)  # nobody else is told, but the owner is
        if not passed and works is not True:
            self._suspect(error)
        together = [part for part in too_large if len(part) > 1 and blamed.isdisjoint(part)]
        if together:  # each of them fits: it was their number
            least = min(together, key=_padded)
            with self._wake:
                self.scheduler.ceiling.broke(_longest(least), _padded(least), now)

    def _make_room(self, error: BaseException) -> None:
        now = self.clock()
        thorough = now - self._tidied_at > _TIDY_S
        if thorough:
            self._tidied_at = now
        make_room(error, thorough=thorough)

    def _still_works(self, error: BaseException) -> bool | None:
        """Whether the model answers what it has answered before; None: it never has.

        If it does, `error` is the fault of the input.
        """
        if isinstance(error, ServingError) and not isinstance(error, ModelFailed):
            return True  # a verdict on the input, not a failure
        if faults.kind(error) is Fault.DEVICE:
            return False
        witness = self._witness
        if witness is None:
            return None
        model = self._model()
        self.busy_since = self.clock()
        try:
            prepared = model.prepare(witness.value, witness.parameters)
            (output,) = model.forward([prepared])
            model.finish(output, prepared)
        except BaseException:
            self._witness = None  # it may be the witness that has gone bad: do not trust it twice
            return False
        else:
            return True
        finally:
            self.busy_since = None

    def _suspect(self, error: BaseException) -> None:
        """Blame the model itself."""
        with self._wake:
            self.breaker.failed(self.clock(), _class_of(error))

    def _model(self) -> Model:
        """The model, held for one step: a forward may outlive `release`."""
        if self.model is None:
            raise Unavailable("the server has stopped")
        return self.model

    def _failure(self, error: BaseException, *, fits: bool = True) -> ServingError:
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
            with self._wake:
                self.breaker.latch(_LOST_DEVICE)
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

    def _deliver(self, results: list[tuple[Item, Result]]) -> None:
        """Hand results to the loop thread."""
        if results:
            self._post(self._resolve, results)

    def _post(self, callback: Callable[..., None], *args: Any) -> None:
        """Run `callback` on the loop thread. A closed loop has no clients left."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise


def _why(drop: Drop) -> ServingError:
    if drop is Drop.EXPIRED:
        return DeadlineExceeded("the request's time was up before the model was free")
    return Overloaded("the server is overloaded: it could not be answered in time")


def _result(answer: Any, queue_wait: float, forward: float) -> Result:
    if isinstance(answer, ServingError):
        return Result(error=answer, queue_wait=queue_wait, forward=forward)
    return Result(value=answer, queue_wait=queue_wait, forward=forward)


def _is_wanted(item: Item, now: float) -> bool:
    """Whether somebody waits for a running item, and may still get it in time."""
    return item.state is State.RUNNING and not item.abandoned and item.deadline > now


def _class_of(error: BaseException) -> str:
    return type(error).__name__[:60]


def _longest(items: Sequence[Item]) -> int:
    return max(item.tokens for item in items)


def _padded(items: Sequence[Item]) -> int:
    return len(items) * _longest(items)
