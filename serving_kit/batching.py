"""The queue and the one model thread: the two sides of the handover, and the thread's life.

    loop thread                            model thread ("serving-kit-model")
    submit() ── offer ──▶ ┌────────┐ ── next ──▶ an action, performed on the model (execution.py)
    cancel() ──────────▶  │ Engine │                        │
    Job.emit ◀────────────└────────┘◀── completed ──────────┘     one call_soon_threadsafe for each action
    _ended() ◀──────── the thread has died: end all jobs, start another

`Handover` holds the engine behind one lock, which is never held while model code runs. The model thread
sleeps on a condition, so an idle server wakes no thread. The loop thread keeps the list of all that has no
end yet, so that it can end every job whatever state a dead thread has left behind.

Not here: what happens next (`engine.py`), running the model (`execution.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from serving_kit import execution, thread_warnings
from serving_kit.actions import Action, Canary, Exit, Sleep, Step
from serving_kit.engine import Engine, Output
from serving_kit.errors import RequestTooLarge, ServingError, Stopping
from serving_kit.events import Chunk, Failed
from serving_kit.items import Item
from serving_kit.jobs import Job
from serving_kit.model import Input, Model
from serving_kit.records import Record
from serving_kit.settings import Settings
from serving_kit.status import CoreStatus, Load, Running

THREAD_NAME = "serving-kit-model"
_LOOK_AGAIN_S = 0.1  # for a thread that should have ended
_UNWANTED_STEP_S = 1.0  # how long a stop waits for a step whose clients have all left
_NO_THREAD_S = 1.0  # between tries to start a thread, while the system refuses one


class Handover:
    """The engine behind one lock, and what the model thread does with it.

    Args:
        engine: What happens next.
        model: What the actions are performed on.
        clock: Seconds, monotonic.
        deliver: Takes the events and records of the engine, on the model thread.
    """

    def __init__(
        self, engine: Engine, model: Model, clock: Callable[[], float], deliver: Callable[[Output], None]
    ) -> None:
        self.engine = engine
        self.model: Model | None = model  # None once it was released
        self.clock = clock
        self.lock = threading.Condition()
        self.running: Running | None = None
        self.wakeups = 0  # times that the worker looked for work; an idle server adds none
        self._deliver = deliver

    def cycle(self) -> bool:
        """Wait for one action and perform it. Model thread. Returns False when there is no more to come."""
        action = self.wait()
        if isinstance(action, Exit):
            return False
        if not isinstance(action, Sleep):
            self.complete(action, self.perform(action))
        return True

    def wait(self) -> Action:
        """The next action, as soon as there is one."""
        with self.lock:
            action, output, now = self._next()
            while isinstance(action, Sleep) and not (output.events or output.records):
                self.lock.wait(None if action.until is None else action.until - now)
                action, output, now = self._next()
        self._deliver(output)
        return action

    def look(self) -> Action:
        """The next action; `Sleep` if there is none now."""
        with self.lock:
            action, output, _ = self._next()
        self._deliver(output)
        return action

    def perform(self, action: Action) -> object:
        """Perform an action, without the lock."""
        model = self.model  # held for one action: a step may outlive `release`
        if model is None:
            raise Stopping("the server has stopped")
        thread_warnings.put_first()
        try:
            return execution.perform(model, action, self.clock)
        finally:
            self.running = None

    def complete(self, action: Action, result: object) -> None:
        """Tell the engine what came of an action."""
        with self.lock:
            self.engine.completed(action, result, self.clock())
            output = self.engine.take()
        self._deliver(output)

    def _next(self) -> tuple[Action, Output, float]:
        self.wakeups += 1
        now = self.clock()
        action = self.engine.next(now)
        if isinstance(action, Step):
            self.running = Running(now, action.expected_s)
        elif isinstance(action, Canary):
            self.running = Running(now, 0.0)
        return action, self.engine.take(), now


class Worker(Protocol):
    """What performs the actions of one handover, until there are no more or it dies."""

    @property
    def alive(self) -> bool:
        """Whether it still runs."""

    def start(self) -> None:
        """Begin. Raises RuntimeError if the system has no thread to give."""

    def join(self, timeout_s: float) -> None:
        """Wait for its end."""


class ModelThread:
    """A thread that performs actions until there are no more, or until the kit's own code raises on it.

    Args:
        handover: Where the actions come from.
        ended: Called at its end, on it, with itself and the exception that has ended it; None: it has ended
            as it should.
    """

    def __init__(
        self, handover: Handover, ended: Callable[[ModelThread, BaseException | None], None]
    ) -> None:
        self._handover = handover
        self._ended = ended
        self.thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.thread.is_alive()

    def start(self) -> None:
        """Start it. Raises RuntimeError if the system has no thread to give."""
        self.thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for its end."""
        if self.thread.ident is not None:
            self.thread.join(timeout_s)

    def _run(self) -> None:
        cause: BaseException | None = None
        try:
            while self._handover.cycle():
                pass
        except BaseException as error:
            cause = error
        finally:
            self._ended(self, cause)


WorkerFactory = Callable[[Handover, Callable[[Any, BaseException | None], None]], Worker]


class Batcher:
    """The loop thread's side of one model: jobs in, events out. Restarts the model thread when it has died.

    `start`, `submit`, `cancel` and `stop` belong to the loop thread; all else may be called from any.

    Args:
        model: What answers.
        engine: With the scheduler and its settings.
        report: Takes the records of the engine, on the loop thread.
        clock: Seconds, monotonic.
        make_worker: Makes what performs the actions; for the simulator.
    """

    def __init__(
        self,
        model: Model,
        engine: Engine,
        report: Callable[[Record], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        make_worker: WorkerFactory = ModelThread,
    ) -> None:
        self._engine = engine
        self._handover = Handover(engine, model, clock, self._deliver)
        self._report = report
        self._clock = clock
        self._make_worker = make_worker
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: Worker | None = None
        self._stopped: asyncio.Event | None = None
        self._stopping = False
        self._restart: asyncio.TimerHandle | None = None  # when a dead worker is replaced
        self._unanswered: set[Item] = set()  # the loop thread's own

    # -- the loop thread -------------------------------------------------------------------------

    def start(self) -> None:
        """Start the model thread. Events are delivered to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._spawn()

    def submit(
        self,
        inputs: Sequence[Input],
        *,
        arrived: float,
        deadline: float,
        stream_deadline: float | None = None,
    ) -> list[Item]:
        """Queue every input as an item of its own, all or none.

        Args:
            inputs: What to run.
            arrived: When the request did, in seconds on the clock.
            deadline: When an answer is no longer of use; of a stream, its first chunk.
            stream_deadline: When a stream ends at the latest; None: the answers are not streamed.

        Returns:
            The items; `item.payload` is the `Job` of each.

        Raises:
            RequestTooLarge: more inputs than the queue can ever hold.
            Overloaded: not admitted.
            DeadlineExceeded: its time is shorter than any step of the model takes.
            Unavailable: the server is stopping, or the model is broken.
        """
        loop, model = self._loop, self._handover.model
        assert loop is not None, "submit() before start(). This is a bug."
        if model is None or self._engine.scheduler.draining:
            raise Stopping
        if self._worker is not None and not self._worker.alive:
            self._ended(self._worker, None)  # it could not report its own end
        most = self._engine.scheduler.settings.max_queue_size
        if len(inputs) > most:
            raise RequestTooLarge(f"{len(inputs)} inputs in one request; the most is {most} (max_queue_size)")
        items = [
            Item(
                arrived,
                deadline,
                max(1, model.estimate(given.value).tokens),
                given,
                Job(loop.create_future()),
                stream_deadline=stream_deadline,
            )
            for given in inputs
        ]
        with self._handover.lock:
            error = self._engine.offer(items, self._clock())
            if error is None:
                self._unanswered.update(items)
                self._handover.lock.notify()
        if error is not None:
            raise error
        return items

    def cancel(self, items: Sequence[Item]) -> None:
        """Their clients have left: waiting ones leave the queue now, running ones end without an event."""
        self._unanswered.difference_update(items)
        with self._handover.lock:
            self._engine.cancel(items)
            self._handover.lock.notify()

    async def stop(self, drain_s: float) -> bool:
        """Refuse new items, finish the admitted ones within `drain_s` seconds, end the thread.

        Returns:
            Whether everything was finished. If not, what was left has been answered with `Unavailable`,
            and the thread ends when the model call that holds it returns.
        """
        self._stopping = True
        with self._handover.lock:
            self._engine.stop()
            self._handover.lock.notify()
        worker = self._worker
        if self._restart is not None:  # it has died, and is not replaced any more
            self._restart.cancel()
        try:
            if worker is not None and self._stopped is not None:
                async with asyncio.timeout(drain_s):
                    if not await self._drained(worker, self._stopped):
                        return False
                worker.join(drain_s)  # it has reported its end: this takes microseconds
        except TimeoutError:
            return False
        else:
            return True
        finally:
            self._end_all(Stopping("the server has stopped"))

    async def _drained(self, worker: Worker, stopped: asyncio.Event) -> bool:
        """Wait for the worker's end. Returns False once nothing that it does is of use to a client."""
        loop = asyncio.get_running_loop()
        wanted_at = loop.time()
        while worker.alive and not stopped.is_set():
            now = loop.time()
            wanted_at = now if self._unanswered else wanted_at
            if self._handover.model is None or now > wanted_at + _UNWANTED_STEP_S:
                return False
            with contextlib.suppress(TimeoutError):  # it may die without reporting its end
                await asyncio.wait_for(stopped.wait(), _LOOK_AGAIN_S)
        return True

    # -- any thread ------------------------------------------------------------------------------

    def tune(self, settings: Settings) -> None:
        """Swap the settings; they count from the next decision."""
        with self._handover.lock:
            self._engine.scheduler.settings = settings
            self._handover.lock.notify()  # a worker that waits must look at the new max_wait_ms

    def drain(self) -> None:
        """Refuse new items from now on; the admitted ones are finished."""
        with self._handover.lock:
            self._engine.drain()
            self._handover.lock.notify()

    def release(self) -> None:
        """End the thread and release the model; after `stop`, or if the loop has died.

        A model call that is still stuck keeps the model until it ends.
        """
        self._stopping = True
        self._handover.model = None
        with self._handover.lock:
            self._engine.stop()
            self._engine.evict()
            self._handover.lock.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for the model thread's end, after `release`. Returns whether it has ended."""
        if self._worker is not None:
            self._worker.join(timeout_s)
        return self._worker is None or not self._worker.alive

    def load(self) -> Load:
        """How much there is to do."""
        with self._handover.lock:
            return Load(self._engine.scheduler.queue_depth, self._engine.scheduler.in_flight)

    def status(self) -> CoreStatus:
        """What the core knows now."""
        now = self._clock()
        alive = self._worker is not None and self._worker.alive
        with self._handover.lock:
            scheduler, breaker = self._engine.scheduler, self._engine.breaker
            gate, released = breaker.gate(now), scheduler.degraded_reason(now)
            return CoreStatus(
                load=Load(scheduler.queue_depth, scheduler.in_flight),
                settings=scheduler.settings,
                draining=scheduler.draining,
                running=self._handover.running,
                breaker=gate,
                unavailable_reason=self._engine.unavailable_reason(now)
                or ("" if alive else "the model thread has died and is being started again"),
                degraded_reason=breaker.degraded_reason or released,
                cost_known=scheduler.cost.known,
                cost_released_reason=released,
                call_s=scheduler.cost.a,
                token_s=scheduler.cost.b,
                max_batch_tokens=scheduler.token_budget(),
                memory_limit_tokens=scheduler.memory_limit.lowest(now),
            )

    @property
    def settings(self) -> Settings:
        """The knobs in force."""
        return self._engine.scheduler.settings

    @property
    def draining(self) -> bool:
        """Whether new items are refused."""
        return self._engine.scheduler.draining

    @property
    def thread(self) -> threading.Thread | None:
        """The model thread, once there is one."""
        return self._worker.thread if isinstance(self._worker, ModelThread) else None

    @property
    def wakeups(self) -> int:
        """Times that the model thread looked for work; an idle server adds none."""
        return self._handover.wakeups

    # -- inside ----------------------------------------------------------------------------------

    def _spawn(self) -> None:
        if self._restart is not None and self._worker is not None:
            self._worker.join(_LOOK_AGAIN_S)  # it has reported its end: this takes microseconds
        self._restart = None
        self._worker = worker = self._make_worker(self._handover, self._report_end)
        try:
            worker.start()
        except RuntimeError as error:  # the system has no thread to give
            self._ended(worker, error, _NO_THREAD_S)

    def _report_end(self, worker: Worker, cause: BaseException | None) -> None:
        """Tell the loop thread that a worker has ended. Called on the worker."""
        self._post(self._ended, worker, cause)

    def _ended(self, worker: Worker, cause: BaseException | None, at_least_s: float = 0.0) -> None:
        """The worker has ended. Unless it was asked to: end all jobs and start another."""
        assert self._loop is not None
        assert self._stopped is not None
        if worker is not self._worker or self._restart is not None:
            return  # already dealt with
        if self._stopping and (cause is None or self._handover.model is None):
            self._stopped.set()
            return
        self._handover.running = None
        with self._handover.lock:
            now = self._clock()
            failed = self._engine.crashed(cause, now)
            pause_s = max(self._engine.breaker.pause_s(now), at_least_s)
            output = self._engine.take()
        if self._stopping:
            self._stopped.set()
        else:
            self._restart = self._loop.call_later(pause_s, self._spawn)
        try:
            self._receive(output)
        finally:  # an observer may raise; the jobs must end all the same
            self._end_all(failed)

    def _end_all(self, error: ServingError) -> None:
        with self._handover.lock:
            self._engine.evict()
            self._handover.lock.notify()
        unanswered, self._unanswered = self._unanswered, set()
        for item in unanswered:
            item.payload.emit(Failed(error))

    def _deliver(self, output: Output) -> None:
        """Hand the output of the engine to the loop thread. Called on the model thread."""
        if output.events or output.records:
            self._post(self._receive, output)

    def _receive(self, output: Output) -> None:
        """Report to the observers, then to the clients: they may be told the id of an incident."""
        try:
            for record in output.records:
                self._report(record)
        finally:
            for item, event in output.events:
                if not isinstance(event, Chunk):
                    self._unanswered.discard(item)
                item.payload.emit(event)

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        """Run `callback` on the loop thread. A closed loop has no clients left."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
