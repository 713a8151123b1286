"""WHEN it runs: the queue and the one model thread around the scheduler.

The loop thread and the model thread meet only here:

    loop thread                            model thread ("serving-kit-model")
    submit() ── offer ──▶ ┌───────────┐ ── poll ──▶ prepare, forward, finish
    cancel() ──────────▶  │ Scheduler │                        │
    futures ◀─────────────└───────────┘◀── finished ───────────┘  one call_soon_threadsafe per batch
    _ended() ◀──────── the thread has died: answer everybody, start another ── breaker.py

One lock guards the scheduler and the breaker; no model code runs while it is held. The model thread
sleeps on a condition, so an idle server wakes nobody.

Nobody waits for ever. What the model raises is dealt with on its thread (`recovery.py`). What our own
code raises there ends the thread. The loop thread keeps the list of all that is unanswered, so that it
can answer everybody whatever state the dead one has left behind.

Not here: which items run together (`scheduler.py`), the forward itself (`execution.py`), whom to blame for
one that raised (`recovery.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving_kit import execution, thread_warnings
from serving_kit.errors import (
    DeadlineExceeded,
    ModelFailed,
    Overloaded,
    RequestTooLarge,
    ServingError,
    Stopping,
    Unavailable,
)
from serving_kit.execution import Call, Job, Model, Result, dropped
from serving_kit.failures.breaker import Breaker, Gate
from serving_kit.failures.classify import WorkerDied
from serving_kit.failures.recovery import Canary, Recovery
from serving_kit.records import BatchReason, BatchRecord
from serving_kit.scheduling.scheduler import Batch, Decision, Item, Scheduler, State
from serving_kit.settings import Settings
from serving_kit.status import CoreStatus, Load, Running

THREAD_NAME = "serving-kit-model"
_LOOK_AGAIN_S = 0.1  # for a thread that should have ended
_UNHEARD_FORWARD_S = 1.0  # how long a stop waits for a forward whose clients have all left
_NO_THREAD_S = 1.0  # until it is tried again to start a thread that the system would not give


@dataclass(eq=False)
class Batcher:
    """Runs one model on one thread, a batch at a time.

    Start, submit, cancel and stop belong to the loop thread; `tune` and the readers may be called
    from any thread. The hooks are called on the model thread, and `on_error` and `on_breaker` also on the
    loop thread; if one raises, that counts as a crash of the model thread.
    """

    model: Model | None  # None once it was let go
    scheduler: Scheduler
    on_batch: Callable[[BatchRecord], None]
    on_error: Callable[[ServingError, BaseException], None]  # keeps the details, sets error.incident
    on_breaker: Callable[[Gate, str], None] = lambda gate, reason: None  # its new state, and why
    on_cost_given_up: Callable[[str], None] = lambda reason: None  # why it is not trusted any more
    clock: Callable[[], float] = time.monotonic
    breaker: Breaker = field(default_factory=Breaker)
    running: Running | None = None  # the forward that runs
    retry: bool = True  # whether a batch that raised may run again in parts
    wakeups: int = 0  # times that the worker looked for work; an idle server adds none
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None
    _stopped: asyncio.Event | None = None
    _stopping: bool = False
    _cause: BaseException | None = None  # what the model thread has died of
    _revival: asyncio.TimerHandle | None = None  # when a dead thread will have a successor
    _unanswered: set[Item] = field(default_factory=set)  # the loop thread's own
    _wake: threading.Condition = field(default_factory=threading.Condition)
    _recovery: Recovery = field(init=False)  # the model thread's own

    def __post_init__(self) -> None:
        example = None if self.model is None else self.model.example
        self._recovery = Recovery(
            rerun=self._run_again,
            probe=self._probe,
            answer=self._answer,
            deliver=self._deliver,
            on_error=self.on_error,
            on_breaker=self.on_breaker,
            clock=self.clock,
            lock=self._wake,
            breaker=self.breaker,
            ceiling=self.scheduler.ceiling,
            canary=None if example is None else Canary(*example),
            retry=self.retry,
        )

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
            Overloaded: not admitted.
            DeadlineExceeded: its time is shorter than any call of the model takes.
            Unavailable: the server is stopping, or the model is broken.
        """
        assert self._loop is not None, "submit() before start(). This is a bug."
        model = self.model
        if model is None or self.scheduler.draining:
            raise Stopping
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
        if refusal is not None and refusal.expired:
            raise DeadlineExceeded(f"the request cannot be answered: {refusal.reason}")
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
                waited_for = asyncio.get_running_loop().time()  # when a client last waited for an answer
                async with asyncio.timeout(drain_s):
                    while thread.is_alive() and not self._stopped.is_set():
                        now = asyncio.get_running_loop().time()
                        waited_for = now if self._unanswered else waited_for
                        if self.model is None or now > waited_for + _UNHEARD_FORWARD_S:
                            return False
                        with contextlib.suppress(TimeoutError):  # it may die without a word
                            await asyncio.wait_for(self._stopped.wait(), _LOOK_AGAIN_S)
                thread.join(drain_s)  # it has said that it is done: this is the last microsecond
        except TimeoutError:
            return False
        else:
            return True
        finally:
            self._answer_everybody(Stopping("the server has stopped"))

    def abandon(self) -> None:
        """End the thread and let the model go. Any thread; after `stop`, or if the loop has died.

        A forward that is still stuck in the model keeps it until it ends.
        """
        self._stopping = True
        self.model = None
        with self._wake:
            self.scheduler.draining = True
            self.scheduler.evict()
            self._wake.notify()

    def join(self, timeout: float) -> bool:
        """Wait for the model thread's end, after `abandon`. Returns whether it has ended."""
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join(timeout)
        return not self.alive

    def load(self) -> Load:
        """How much there is to do. Any thread."""
        with self._wake:
            return Load(self.scheduler.queue_depth, self.scheduler.in_flight)

    def status(self) -> CoreStatus:
        """What the core knows now. Any thread."""
        now = self.clock()
        with self._wake:
            scheduler = self.scheduler
            return CoreStatus(
                load=Load(scheduler.queue_depth, scheduler.in_flight),
                draining=scheduler.draining,
                breaker=self.breaker.gate(now),
                cost_known=scheduler.cost.known,
                cost_doubt=scheduler.doubt(now),
                call_s=scheduler.cost.a,
                token_s=scheduler.cost.b,
                max_batch_tokens=scheduler.token_budget(),
                memory_limit_tokens=scheduler.ceiling.lowest(now),
                running=self.running,
                unavailable_reason=self.trouble(),
                degraded_reason=self.doubt(),
                settings=scheduler.settings,
            )

    @property
    def thread(self) -> threading.Thread | None:
        """The model thread, once there is one. Any thread."""
        return self._thread

    @property
    def alive(self) -> bool:
        """Whether the model thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def trouble(self) -> str:
        """Why nothing can be answered now, in words for strangers; empty if something can."""
        now = self.clock()
        with self._wake:
            gate, reason, pause = self.breaker.gate(now), self.breaker.reason, self.breaker.pause(now)
        if gate is Gate.OPEN:
            return f"{reason}; it is tried again in {pause:.0f} s"
        if gate is Gate.LATCHED:
            return reason
        return "" if self.alive else "the model thread has died and is being started again"

    def doubt(self) -> str:
        """Why it is not certain that requests can be answered; empty if there is no reason for doubt."""
        if reason := self.breaker.reason:
            who = "requests are" if self.breaker.in_doubt else "one request at a time is"
            return f"{reason}; {who} let in to try again"
        with self._wake:
            return self.scheduler.doubt(self.clock())

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
        self.running = None
        with self._wake:
            now = self.clock()
            opened = self.breaker.failed(now, "a crash of its thread")
            pause = max(self.breaker.pause(now), at_least_s)
        if self._stopping:
            self._stopped.set()
        else:
            self._revival = self._loop.call_later(pause, self._spawn)
        try:
            self.on_error(failed, died)
            if opened:
                self.on_breaker(Gate.OPEN, self.breaker.reason)
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
                if self.breaker.refuses_admitted(now):
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
        self._deliver([(item, dropped(drop, decision.retry_after)) for item, drop in decision.dropped])
        if decision.batch:
            self._run(decision.batch)
        return True

    def _prepare(self, items: Sequence[Item]) -> None:
        """Learn the lengths of new items; answer those that the model cannot take."""
        model = self._model()
        prepared = []
        for item in items:
            if item.state is not State.WAITING:
                continue  # its client has left since
            job: Job = item.payload
            try:
                given = job.prepared = model.prepare(job.value, job.parameters)
            except BaseException as error:
                failed = self._recovery.told(error)
                with self._wake:
                    self.scheduler.cancel(item)
                self._deliver([(item, Result(error=failed))])
                self._recovery.judge(error, job)
            else:
                prepared.append((item, given))
        with self._wake:
            for item, given in prepared:
                self.scheduler.ready(item, max(1, given.tokens), given.group)

    def _run(self, batch: Batch) -> None:
        """One batch from start to answers."""
        call = self._call(batch.items)
        if call.error is not None:
            self.on_batch(call.record(batch.reason, batch.left_waiting))
            self._recovery.recover(call, batch.left_waiting)
            with self._wake:
                self.scheduler.finished(self.clock(), ok=False)
            return
        with self._wake:
            given_up = self.scheduler.finished(call.ended, ok=True, started=call.started)
        self._answer(call, call.started)
        self.on_batch(call.record(batch.reason, batch.left_waiting))
        if given_up:
            self.on_cost_given_up(given_up)

    def _run_again(self, items: Sequence[Item], left_waiting: int) -> Call:
        """A part of a batch that raised."""
        call = self._call(items)
        self.on_batch(call.record(BatchReason.RETRY, left_waiting))
        return call

    def _call(self, items: Sequence[Item]) -> Call:
        """Run the model once on prepared items."""
        model = self._model()
        with self._wake:
            padded_tokens = len(items) * max(item.tokens for item in items)
            self.running = Running(self.clock(), self.scheduler.cost.high(padded_tokens))
        try:
            return execution.run(model, items, self.clock, self._recovery.told)
        finally:
            self.running = None

    def _probe(self, value: Any, parameters: Mapping[str, Any]) -> bool:
        """Whether the model answers one input that nobody waits for."""
        model = self._model()
        self.running = Running(self.clock(), 0.0)
        try:
            return execution.probe(model, value, parameters)
        finally:
            self.running = None

    def _answer(self, call: Call, started: float) -> None:
        """Deliver what a forward has given to items whose batch was `started` then."""
        answered = any(not isinstance(answer, ServingError) for answer in call.answers)
        if answered:  # before any client is, or its next request could be refused for what is over
            self._recovery.succeeded()
        self._deliver(call.results(started))
        if not answered:
            pairs = zip(call.items, call.answers, strict=True)
            bad = next((pair for pair in pairs if isinstance(pair[1], ModelFailed)), None)
            if bad is not None:
                self._recovery.judge(bad[1], bad[0].payload)

    def _model(self) -> Model:
        """The model, held for one step: a forward may outlive `abandon`."""
        if self.model is None:
            raise Stopping("the server has stopped")
        thread_warnings.put_first()
        return self.model

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
