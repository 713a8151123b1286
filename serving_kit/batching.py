"""WHEN it runs: the queue and the one model thread around the scheduler.

The loop thread and the model thread meet only here:

    loop thread                            model thread ("serving-kit-model")
    submit() ── offer ──▶ ┌───────────┐ ── poll ──▶ prepare, forward, finish
    cancel() ──────────▶  │ Scheduler │                        │
    futures ◀─────────────└───────────┘◀── finished ───────────┘  one call_soon_threadsafe per batch

One lock guards the scheduler; no model code runs while it is held. The model thread sleeps on a
condition, so an idle server wakes nobody. Whatever raises on the model thread, every item that it
had in hand is answered: a crash of the loop itself fails everything that waits and starts afresh.

Not here: which items run together (`scheduler.py`), what a model is (`models.py`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from serving_kit.errors import (
    DeadlineExceeded,
    ModelFailed,
    Overloaded,
    RequestTooLarge,
    ServingError,
    Unavailable,
)
from serving_kit.records import BatchRecord
from serving_kit.scheduler import Batch, Drop, Item, Scheduler, State
from serving_kit.settings import Settings

THREAD_NAME = "serving-kit-model"
# Crashes of the worker loop itself (not of the model) in a row, with no batch between them, after
# which it gives up: something is broken for good.
_MOST_CRASHES = 3


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
    output into what the client gets. Anything else that they raise is a `ModelFailed`.
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


class WrongNumberOfOutputs(RuntimeError):
    """The model did not return one output per input, so none can be trusted."""


@dataclass(eq=False)
class Batcher:
    """Runs one model on one thread, a batch at a time.

    Start, submit, cancel and stop belong to the loop thread; `tune` and the readers may be called
    from any thread. The two hooks are called on the model thread; if one raises, that counts as a
    crash of the worker.
    """

    model: Model | None  # None once it was let go
    scheduler: Scheduler
    on_batch: Callable[[BatchRecord], None]
    on_error: Callable[[ServingError, BaseException], None]  # keeps the details, sets error.incident
    clock: Callable[[], float] = time.monotonic
    failure: str | None = None  # why the worker has given up; None: it has not
    busy_since: float | None = None  # start of the running forward
    wakeups: int = 0  # times that the worker looked for work; an idle server adds none
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None
    _stopped: asyncio.Event | None = None
    _stopping: bool = False
    _crashes: int = 0
    _in_hand: list[Item] = field(default_factory=list)  # taken from the scheduler, not answered yet
    _wake: threading.Condition = field(default_factory=threading.Condition)

    # -- the loop thread's side ------------------------------------------------------------------

    def start(self) -> None:
        """Start the model thread. Results will be delivered to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
        self._thread.start()

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
            Unavailable: the server is stopping or broken.
        """
        assert self._loop is not None, "submit() before start(). This is a bug."
        model = self.model
        if model is None or self.scheduler.draining or self.failure is not None:
            raise Unavailable(self.failure or "the server is stopping")
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
        with self._wake:
            if self.failure is not None:  # since we looked
                raise Unavailable(self.failure)
            refusal = self.scheduler.offer(items, self.clock())
            if refusal is None:
                self._wake.notify()
        if refusal is not None:
            raise Overloaded(f"the server is overloaded: {refusal.reason}", retry_after=refusal.retry_after)
        return items

    def cancel(self, items: Sequence[Item]) -> None:
        """Give up on items: waiting ones leave the queue now, running ones end unheard."""
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
        if self._stopped is None:
            return True
        try:
            async with asyncio.timeout(drain_s):
                await self._stopped.wait()
        except (TimeoutError, asyncio.CancelledError) as impatience:
            with self._wake:
                left = self.scheduler.evict()
                self._wake.notify()
            self._resolve([(item, Result(error=Unavailable("the server has stopped"))) for item in left])
            if isinstance(impatience, asyncio.CancelledError):
                raise
            return False
        assert self._thread is not None
        self._thread.join(drain_s)  # it has said that it is done: this is the last microsecond
        return True

    def release(self) -> None:
        """Let the model go. After `stop`; a forward that is still stuck in it keeps it until it ends."""
        self.model = None

    @property
    def alive(self) -> bool:
        """Whether the model thread runs and has not given up."""
        return self._thread is not None and self._thread.is_alive() and self.failure is None

    # -- the model thread's side -----------------------------------------------------------------

    def _work(self) -> None:
        try:
            while True:
                try:
                    if not self._cycle():
                        break
                except BaseException as error:
                    if not self._survive(error):
                        break
        finally:
            self._answer_everybody(Unavailable(self.failure or "the server has stopped"))
            self._post(self._mark_stopped)

    def _cycle(self) -> bool:
        """Wait for something to do and do it. Returns False when there is no more to come."""
        with self._wake:
            while True:
                self.wakeups += 1
                fresh = self.scheduler.unprepared()
                if fresh:
                    break
                now = self.clock()
                decision = self.scheduler.poll(now)
                self._in_hand = [item for item, _ in decision.dropped]
                if decision.batch:
                    self._in_hand += decision.batch.items
                if self._in_hand:
                    break
                if self._stopping and not self.scheduler.queue_depth:
                    return False
                self._wake.wait(None if decision.wake_at is None else decision.wake_at - now)
        if fresh:
            self._prepare(fresh)
            return True
        self._deliver([(item, Result(error=_why(drop))) for item, drop in decision.dropped])
        if decision.batch:
            self._run(decision.batch)
        self._crashes = 0
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
                self._in_hand = [item]
                with self._wake:
                    self.scheduler.cancel(item)
                self._deliver([(item, Result(error=failed))])
            else:
                with self._wake:
                    job.prepared = prepared
                    self.scheduler.ready(item, max(1, prepared.tokens), prepared.group)

    def _run(self, batch: Batch) -> None:
        """One batch from start to answers."""
        model = self._model()
        jobs: list[Job] = [item.payload for item in batch.items]
        inputs = [job.prepared for job in jobs if job.prepared is not None]
        started = self.busy_since = self.clock()
        failed: ServingError | None = None
        try:
            outputs = model.forward(inputs)
            if len(outputs) != len(inputs):
                raise WrongNumberOfOutputs(f"{len(inputs)} inputs, {len(outputs)} outputs")
        except BaseException as error:
            failed = self._failure(error)
            answers: list[Any] = [failed] * len(inputs)
        else:
            answers = [self._finish(model, *pair) for pair in zip(outputs, inputs, strict=True)]
        now = self.clock()
        self.busy_since = None
        with self._wake:
            self.scheduler.finished(now, ok=failed is None, started=started)
        wasted = sum(item.abandoned or item.deadline < now for item in batch.items)
        self._deliver(
            [
                (item, _result(answer, started - item.arrived, now - started))
                for item, answer in zip(batch.items, answers, strict=True)
            ]
        )
        self.on_batch(
            BatchRecord(
                started=started,
                finished=now,
                size=len(inputs),
                tokens=batch.tokens,
                padded_tokens=batch.padded_tokens,
                reason=batch.reason,
                oldest_wait=started - batch.items[0].arrived,
                left_waiting=batch.left_waiting,
                wasted=wasted,
                ok=failed is None,
            )
        )

    def _finish(self, model: Model, output: Any, prepared: Prepared) -> Any:
        """One answer, or the `ServingError` that stands in for it. A bad one fails alone."""
        try:
            return model.finish(output, prepared)
        except BaseException as error:
            return self._failure(error)

    def _model(self) -> Model:
        """The model, held for one step: a forward may outlive `release`."""
        if self.model is None:
            raise Unavailable("the server has stopped")
        return self.model

    def _failure(self, error: BaseException) -> ServingError:
        """What the client is told about `error`; the owner is told everything."""
        if isinstance(error, ServingError) and error.__cause__ is None:
            return error  # a plain verdict on the input: nothing went wrong here
        failed = (
            error
            if isinstance(error, ServingError)
            else ModelFailed("the model failed on this request", detail=f"{type(error).__name__}: {error}")
        )
        self.on_error(failed, error)
        return failed

    def _deliver(self, results: list[tuple[Item, Result]]) -> None:
        """Hand results to the loop thread; only then are they no longer ours to lose."""
        if results:
            self._post(self._resolve, results)
            answered = {id(item) for item, _ in results}
            self._in_hand = [item for item in self._in_hand if id(item) not in answered]

    def _survive(self, error: BaseException) -> bool:
        """The worker loop itself raised: answer everybody. Returns whether to go on."""
        self._crashes += 1
        self.busy_since = None
        failed = ModelFailed("the server failed on this request", detail=f"{type(error).__name__}: {error}")
        try:
            self.on_error(failed, error)
        except BaseException:  # the hook may be what is broken; the clients still come first
            failed.incident = None
        if self._crashes >= _MOST_CRASHES:
            self.failure = f"the model thread has failed {_MOST_CRASHES} times in a row"
        self._answer_everybody(failed)
        return self.failure is None

    def _answer_everybody(self, error: ServingError) -> None:
        with self._wake:
            items, self._in_hand = self._in_hand, []
            items += self.scheduler.evict()
        self._post(self._resolve, [(item, Result(error=error)) for item in items])

    def _post(self, callback: Callable[..., None], *args: Any) -> None:
        """Run `callback` on the loop thread. A closed loop has no clients left."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _mark_stopped(self) -> None:
        assert self._stopped is not None
        self._stopped.set()

    @staticmethod
    def _resolve(results: Sequence[tuple[Item, Result]]) -> None:
        """On the loop thread: wake the clients."""
        for item, result in results:
            future: asyncio.Future[Result] = item.payload.future
            if not future.done():
                future.set_result(result)


def _why(drop: Drop) -> ServingError:
    if drop is Drop.EXPIRED:
        return DeadlineExceeded("the request's time was up before the model was free")
    return Overloaded("the server is overloaded: it could not be answered in time")


def _result(answer: Any, queue_wait: float, forward: float) -> Result:
    if isinstance(answer, ServingError):
        return Result(error=answer, queue_wait=queue_wait, forward=forward)
    return Result(value=answer, queue_wait=queue_wait, forward=forward)
