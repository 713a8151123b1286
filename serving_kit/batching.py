"""The loop thread's side of one model: jobs in, events out.

    loop thread                            model thread ("serving-kit-model", worker.py)
    submit() ── offer ──▶ ┌────────┐ ── next ──▶ an action, performed on the model (execution.py)
    cancel() ──────────▶  │ Engine │                        │
    Job.emit ◀────────────└────────┘◀── completed ──────────┘     one call_soon_threadsafe for each action

The loop thread keeps the list of all jobs without an end, so that it can end each of them whatever state a
dead model thread has left behind.

Not here: the model thread and the lock (`worker.py`), what happens next (`engine.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence

from serving_kit.engine import Engine, Output
from serving_kit.errors import RequestTooLarge, ServingError, Stopping
from serving_kit.events import Chunk, Failed
from serving_kit.items import Item, ItemState
from serving_kit.jobs import Job
from serving_kit.model import Input, Model
from serving_kit.records import Record
from serving_kit.settings import Settings
from serving_kit.status import CoreStatus, Load
from serving_kit.worker import Handover, ModelThread, Supervisor, Worker, WorkerFactory

_LOOK_AGAIN_S = 0.1  # for a worker that should have ended
_UNWANTED_STEP_S = 1.0  # how long a stop waits for a step whose clients have all left


class Batcher:
    """Takes inputs, and gives each a job that emits events.

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
        self._supervisor = Supervisor(self._handover, make_worker, self._crashed)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unanswered: dict[Item, None] = {}  # in order of arrival; the loop thread's own

    # -- the loop thread -------------------------------------------------------------------------

    def start(self) -> None:
        """Start the model thread. Events are delivered to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._supervisor.start(self._loop)

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
        loop, model = self._loop, self.open_model()
        assert loop is not None, "submit() before start(). This is a bug."
        most = self._engine.scheduler.settings.max_queue_size
        if len(inputs) > most:
            raise RequestTooLarge(f"{len(inputs)} inputs in one request; the most is {most} (max_queue_size)")
        packed = self._engine.scheduler.layout.packed
        items = [
            Item(
                arrived,
                deadline,
                max(1, model.estimate(given.value).computed(packed=packed)),
                given,
                Job(loop.create_future()),
                stream_deadline=stream_deadline,
            )
            for given in inputs
        ]
        with self._handover.lock:
            error = self._engine.offer(items, self._clock())
            if error is None:
                self._unanswered.update(dict.fromkeys(items))
                self._handover.lock.notify()
        if error is not None:
            raise error
        return items

    def open_model(self) -> Model:
        """The model, if new items may be submitted now.

        Raises:
            Unavailable: the server is stopping, or its thread has died.
        """
        model = self._handover.model
        if model is None or self._handover.released or self._engine.scheduler.draining:
            raise Stopping
        self._supervisor.check()
        return model

    def prolong(self, item: Item, deadline: float) -> bool:
        """Let an item live until `deadline` at least. False: it has ended, or its time is up already."""
        with self._handover.lock:
            # Under the lock in which the engine drops items: whoever gets True is never told "expired" for
            # the deadline before.
            if item.state is ItemState.DONE or item.cancelled or item.deadline <= self._clock():
                return False
            item.deadline = max(item.deadline, deadline)
        return True

    def shorten(self, item: Item, deadline: float) -> None:
        """Drop an item at `deadline`, if that is earlier than before: who had more time has left."""
        with self._handover.lock:
            item.deadline = min(item.deadline, deadline)
            self._handover.lock.notify()

    def cancel(self, items: Sequence[Item], *, expired: bool = False) -> None:
        """Their clients have left: waiting ones leave the queue now, running ones end without an event.

        Args:
            items: What they had asked for.
            expired: Whether their time was up, and their clients were told so.
        """
        for item in items:
            self._unanswered.pop(item, None)
        with self._handover.lock:
            self._engine.cancel(items, self._clock() if expired else None)
            self._handover.lock.notify()

    async def stop(self, drain_s: float) -> bool:
        """Refuse new items, finish the admitted ones within `drain_s` seconds, end the thread.

        Returns:
            Whether everything was finished. If not, what was left has been answered with `Unavailable`,
            and the thread ends when the model call that holds it returns.
        """
        self._supervisor.stop()
        with self._handover.lock:
            self._engine.stop()
            self._handover.lock.notify()
        worker, ended = self._supervisor.worker, self._supervisor.ended
        try:
            if worker is not None and ended is not None:
                async with asyncio.timeout(drain_s):
                    if not await self._drained(worker, ended):
                        return False
                worker.join(drain_s)  # it has reported its end: this takes microseconds
        except TimeoutError:
            return False
        else:
            return True
        finally:
            self._end_all(Stopping("the server has stopped"))

    async def _drained(self, worker: Worker, ended: asyncio.Event) -> bool:
        """Wait for the worker's end. Returns False once nothing that it does is of use to a client."""
        loop = asyncio.get_running_loop()
        wanted_at = loop.time()
        while worker.alive and not ended.is_set():
            now = loop.time()
            wanted_at = now if self._unanswered else wanted_at
            if self._handover.released or now > wanted_at + _UNWANTED_STEP_S:
                return False
            with contextlib.suppress(TimeoutError):  # it may end without reporting it
                await asyncio.wait_for(ended.wait(), _LOOK_AGAIN_S)
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
        self._supervisor.stopping = True
        self._handover.release()
        if not self._supervisor.alive:
            self._handover.finish()

    def join(self, timeout_s: float) -> bool:
        """Wait for the model thread's end, after `release`. Returns whether it has ended."""
        if self._supervisor.worker is not None:
            self._supervisor.worker.join(timeout_s)
        return not self._supervisor.alive

    def load(self) -> Load:
        """How much there is to do."""
        with self._handover.lock:
            return Load(self._engine.scheduler.queue_depth, self._engine.scheduler.in_flight)

    def status(self) -> CoreStatus:
        """What the core knows now."""
        return self._handover.status(self._supervisor.alive)

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
        worker = self._supervisor.worker
        return worker.thread if isinstance(worker, ModelThread) else None

    @property
    def wakeups(self) -> int:
        """Times that the model thread looked for work; an idle server adds none."""
        return self._handover.wakeups

    # -- inside ----------------------------------------------------------------------------------

    def _crashed(self, failed: ServingError, output: Output) -> None:
        """The worker has died: no job that it held gets another event."""
        try:
            self._receive(output)
        finally:  # an observer may be what is broken; the clients still come first
            self._end_all(failed)

    def _end_all(self, error: ServingError) -> None:
        with self._handover.lock:
            self._engine.evict()
            self._handover.lock.notify()
        unanswered, self._unanswered = self._unanswered, {}
        for item in unanswered:
            item.payload.emit(Failed(error))

    def _deliver(self, output: Output) -> None:
        """Hand the output of the engine to the loop thread. On the model thread."""
        if output.events or output.records:
            self._supervisor.post(self._receive, output)

    def _receive(self, output: Output) -> None:
        """Report to the observers, then to the clients: they may be told the id of an incident."""
        try:
            for record in output.records:
                self._report(record)
        finally:
            for item, event in output.events:
                if not isinstance(event, Chunk):
                    self._unanswered.pop(item, None)
                item.payload.emit(event)
