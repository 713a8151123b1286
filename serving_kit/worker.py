"""The model thread: performs what the engine asks for, and is replaced when it dies.

`Handover` holds the engine behind one lock, which is never held while model code runs. `ModelThread` sleeps
on its condition, so an idle server wakes no thread. `Supervisor` starts a thread, notices its end, and
starts another after a pause that the circuit breaker sets.

Not here: the jobs of the clients (`batching.py`), what happens next (`engine.py`), running the model
(`execution.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

from serving_kit import execution, thread_warnings
from serving_kit.actions import Action, Canary, Exit, Release, Sleep, Step
from serving_kit.engine import Engine, Output
from serving_kit.errors import ServingError, Stopping
from serving_kit.incidents import make_incident
from serving_kit.model import Model
from serving_kit.records import FailureRecord
from serving_kit.status import Caches, CoreStatus, Load, Running

THREAD_NAME = "serving-kit-model"
_JOIN_S = 0.1  # for a thread that has reported its end
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
        self.model: Model | None = model  # None once it was released, and nothing is left to give back to it
        self.released = False
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
        self._deliver(_with_incidents(output))
        return action

    def look(self) -> Action:
        """The next action; `Sleep` if there is none now."""
        with self.lock:
            action, output, _ = self._next()
        self._deliver(_with_incidents(output))
        return action

    def perform(self, action: Action) -> object:
        """Perform an action, without the lock."""
        model = self.model  # held for one action: a step may outlive `release`
        if model is None or (self.released and not isinstance(action, Release)):
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
        self._deliver(_with_incidents(output))

    def release(self) -> None:
        """End everything; the worker gives back what the items hold, drops the model and ends. Any thread."""
        self.released = True
        with self.lock:
            self.engine.release()
            self.lock.notify()

    def finish(self) -> None:
        """Give back what the items hold, and let the model go. Only where no worker does: after its end."""
        with contextlib.suppress(Stopping):  # what is left besides is of no use to a client
            while not isinstance(action := self.look(), Exit | Sleep):
                self.complete(action, self.perform(action))
        self.model = None

    def status(self, alive: bool) -> CoreStatus:
        """What the core knows now; `alive`: whether a worker runs. Any thread."""
        now = self.clock()
        with self.lock:
            scheduler, breaker = self.engine.scheduler, self.engine.breaker
            unavailable = self.engine.unavailable_reason(now)
            if not unavailable and not alive:
                unavailable = "the model thread has died and is being started again"
            released, cache = scheduler.degraded_reason(now), scheduler.cache_limit()
            return CoreStatus(
                load=Load(scheduler.queue_depth, scheduler.in_flight),
                settings=scheduler.settings,
                draining=scheduler.draining,
                running=self.running,
                breaker=breaker.gate(now),
                unavailable_reason=unavailable,
                degraded_reason=breaker.degraded_reason or released,
                cost_known=scheduler.cost.known,
                cost_released_reason=released,
                call_s=scheduler.cost.a,
                token_s=scheduler.cost.b,
                max_batch_tokens=scheduler.token_budget(),
                memory_limit_tokens=scheduler.memory_limit.lowest(now),
                caches=None if cache is None else Caches(scheduler.running, scheduler.cached_tokens(), cache),
            )

    def _next(self) -> tuple[Action, Output, float]:
        self.wakeups += 1
        now = self.clock()
        action = self.engine.next(now)
        if isinstance(action, Step):
            self.running = Running(now, action.expected_s)
        elif isinstance(action, Canary):
            self.running = Running(now, 0.0)
        elif isinstance(action, Exit) and self.released:
            self.model = None
        return action, self.engine.take(), now


def _with_incidents(output: Output) -> Output:
    """Describe each failure: formatting a traceback takes milliseconds, which the loop thread has not."""
    if not any(isinstance(record, FailureRecord) for record in output.records):
        return output
    records = [
        record._replace(incident=make_incident(record.cause, record.error.outcome))
        if isinstance(record, FailureRecord)
        else record
        for record in output.records
    ]
    return output._replace(records=records)


class Worker(Protocol):
    """What performs the actions of one handover, until there are no more or it dies."""

    cause: BaseException | None  # what it has died of

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
        ended: Called with itself at its end, on it.

    Attributes:
        cause: The exception that has ended it; None: none has.
    """

    def __init__(self, handover: Handover, ended: Callable[[ModelThread], None]) -> None:
        self.cause: BaseException | None = None
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
        try:
            while self._handover.cycle():
                pass
        except BaseException as error:
            self.cause = error
        finally:
            self._ended(self)


WorkerFactory = Callable[[Handover, Callable[[Any], None]], Worker]


class Supervisor:
    """Keeps one worker running until it is told not to. Loop thread.

    Args:
        handover: What the worker drives.
        make_worker: Makes a worker.
        crashed: Called when one has died, with the error for its clients and the output of the engine.

    Attributes:
        worker: The present one, or the last; None before `start`. Any thread may read it.
        stopping: Whether a worker that ends is not replaced. Any thread may set it.
        ended: Set once the last worker has ended.
    """

    def __init__(
        self,
        handover: Handover,
        make_worker: WorkerFactory,
        crashed: Callable[[ServingError, Output], None],
    ) -> None:
        self.worker: Worker | None = None
        self.stopping = False
        self.ended: asyncio.Event | None = None
        self._handover = handover
        self._make_worker = make_worker
        self._crashed = crashed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._restart: asyncio.TimerHandle | None = None  # when a dead worker is replaced

    @property
    def alive(self) -> bool:
        """Whether a worker runs. Any thread."""
        return self.worker is not None and self.worker.alive

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the first worker."""
        self._loop = loop
        self.ended = asyncio.Event()
        self._spawn()

    def stop(self) -> None:
        """Replace no worker any more."""
        self.stopping = True
        if self._restart is not None:  # it has died, and is not replaced any more
            self._restart.cancel()

    def check(self) -> None:
        """Replace a worker that could not report its own end."""
        if self.worker is not None and not self.worker.alive:
            self._note_end(self.worker)

    def post(self, callback: Callable[..., None], *args: object) -> None:
        """Run `callback` on the loop thread. Any thread. A closed loop has no clients left."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _spawn(self) -> None:
        if self._restart is not None and self.worker is not None:
            self.worker.join(_JOIN_S)
        self._restart = None
        self.worker = worker = self._make_worker(self._handover, self._report_end)
        try:
            worker.start()
        except RuntimeError as error:  # the system has no thread to give
            worker.cause = error
            self._note_end(worker, _NO_THREAD_S)

    def _report_end(self, worker: Worker) -> None:
        """Let the loop thread know that a worker has ended. On the worker."""
        try:
            if self._handover.released:
                self._handover.finish()
        finally:  # whatever that raises, the clients must get their ends
            self.post(self._note_end, worker)

    def _note_end(self, worker: Worker, at_least_s: float = 0.0) -> None:
        """A worker has ended. Unless it was to end: end its jobs, and start another."""
        assert self._loop is not None
        assert self.ended is not None
        if worker is not self.worker or self._restart is not None:
            return  # already dealt with
        handover = self._handover
        if self.stopping and (worker.cause is None or handover.released):
            self.ended.set()
            return
        handover.running = None
        with handover.lock:
            now = handover.clock()
            failed = handover.engine.crashed(worker.cause or RuntimeError("it ended early"), now)
            pause_s = max(handover.engine.breaker.pause_s(now), at_least_s)
            output = handover.engine.take()
        if self.stopping:
            self.ended.set()
        else:
            self._restart = self._loop.call_later(pause_s, self._spawn)
        self._crashed(failed, output)
