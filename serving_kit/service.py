"""One request from arrival to outcome, without HTTP.

    with service.observe() as ticket:                 # exactly one RequestRecord, whatever happens
        answers = await service.predict(values, parameters, ticket)

Any front end (Starlette, the kernel, Ray Serve) drives these two lines. `observe` is the only place
that counts a request, and every way out of its body is an outcome.

Not here: bodies and statuses (`app.py`, `formats.py`), threads (`batching.py`).
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from serving_kit import faults
from serving_kit.batching import Batcher
from serving_kit.errors import (
    DeadlineExceeded,
    InputRejected,
    ModelFailed,
    Overloaded,
    ServingError,
    SettingError,
    Stopping,
)
from serving_kit.forward import Model, Result
from serving_kit.metrics import Metrics
from serving_kit.records import Incident, Outcome, RequestRecord
from serving_kit.scheduler import Item, Scheduler
from serving_kit.settings import Settings

_KEPT_INCIDENTS = 100
_KEPT_CHANGES = 200
# A forward that runs this much longer than any client would wait is called stuck.
_STUCK_FACTOR, _STUCK_AT_LEAST_S = 2, 30.0
_TEXT_BODY, _MEDIA_BODY = 2**20, 2**25
_MOST_HELD = 2**29  # bytes of all bodies together: a queue of long ones is not a queue of short ones
_TOO_LATE = Result()  # what the alarm puts in place of an answer


class ServedModel(Model, Protocol):
    """A model with what people want to know about it."""

    name: str
    max_batch_size: int | None  # None: any

    @property
    def task_name(self) -> str:
        """What it does."""

    @property
    def device(self) -> str:
        """Where it runs."""

    @property
    def media(self) -> bool:
        """Whether its inputs are images or sound."""

    @property
    def timings(self) -> Sequence[tuple[int, int, float]]:
        """Batches that it has run already: padded tokens, tokens, seconds."""

    def check(self, values: Sequence[Any], parameters: Mapping[str, Any]) -> None:
        """Raise `MalformedRequest` for what no model state could make right. Loop thread; cheap."""


@dataclass(slots=True)
class Ticket:
    """One request under way. The end of its `with` block is the one place where a request is counted."""

    service: Service
    arrived: float
    deadline: float
    items: int = 0
    queue_wait: float | None = None
    forward: float | None = None
    held: int = 0  # bytes of its body that have been read

    def hold(self, size: int) -> None:
        """Note that so many more bytes of the body are in memory, until the request ends.

        Raises:
            Overloaded: all bodies together would be too much.
        """
        if self.service.held + size > max(_MOST_HELD, self.service.max_body_bytes):
            raise Overloaded("the server is overloaded: it holds too many bytes of requests")
        self.held += size
        self.service.held += size

    def limit(self, timeout_s: float | None) -> None:
        """Give up after `timeout_s` seconds from arrival: sooner than the server would, never later."""
        if timeout_s is not None:
            self.deadline = min(self.deadline, self.arrived + timeout_s)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        service, outcome = self.service, Outcome.OK
        service.held -= self.held
        failed: ModelFailed | None = None
        if isinstance(error, ServingError):
            outcome = error.outcome
            if error.__cause__ is not None and error.incident is None:  # raised on the way out
                service.keep_incident(error, error.__cause__)
        elif isinstance(error, asyncio.CancelledError):
            outcome = Outcome.CANCELLED
        elif error is not None:
            outcome = Outcome.FAILED
            if isinstance(error, Exception):
                detail = f"{type(error).__name__}: {error}"
                failed = ModelFailed("the server failed on this request", detail=detail)
                service.keep_incident(failed, error)
        service.metrics.add_request(
            RequestRecord(self.arrived, service.clock(), outcome, self.items, self.queue_wait, self.forward)
        )
        if failed is not None:
            raise failed from error


@dataclass(frozen=True, slots=True)
class Change:
    """A knob that was moved."""

    at: float  # on the service's clock
    knobs: Mapping[str, Any]  # name: new value


class Service:
    """One model behind one queue.

    `start`, `predict` and `stop` belong to the loop thread; everything else may be called from any.

    Raises:
        SettingError: the settings ask this model for more than it can do.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: Settings | None = None,
        *,
        name: str = "default",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        settings = settings or Settings()
        _refuse_what_it_cannot(model, settings)
        self.name = name
        self.model_name, self.task, self.device = model.name, model.task_name, model.device
        self.model: ServedModel | None = model
        self.clock = clock
        self.started_at: float | None = None
        self.leaving = False  # it will stop soon, and says so on /health
        self.draining_since: float | None = None
        self.stopped = False
        self.held = 0  # bytes of the bodies of all requests under way
        self.metrics = Metrics()
        self.changes: deque[Change] = deque(maxlen=_KEPT_CHANGES)
        self.batcher = Batcher(
            model,
            Scheduler(settings),
            on_batch=self.metrics.add_batch,
            on_error=self._keep_fault,
            clock=clock,
        )
        for timing in model.timings:
            self.batcher.scheduler.cost.observe(*timing)
        self._incidents: deque[Incident] = deque(maxlen=_KEPT_INCIDENTS)
        self._tuning = threading.Lock()

    # -- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the model thread; requests are welcome when this returns."""
        self.batcher.start()
        self.started_at = self.clock()

    def announce_stop(self) -> None:
        """Be not ready (`/health`) from now on, while requests are still admitted. Any thread."""
        self.leaving = True

    def drain(self) -> None:
        """Refuse new requests from now on; the admitted ones are finished. Any thread."""
        if self.draining_since is None:
            self.draining_since = self.clock()
        self.batcher.drain()

    async def stop(self, drain_s: float = 5.0) -> bool:
        """Refuse new requests, finish the admitted ones, let the model go.

        Args:
            drain_s: Seconds for the admitted ones, counted from the first call of `drain()`.

        Returns:
            Whether everything was finished in time; what was not has been answered with 503.
        """
        self.drain()
        waited = self.clock() - (self.draining_since or 0.0)
        try:
            return await self.batcher.stop(max(0.0, drain_s - waited))
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let the model go at once, waiting for nothing. Any thread; for a server whose loop has died."""
        self.stopped = True
        self.model = None
        self.batcher.abandon()

    def join(self, timeout: float) -> bool:
        """Wait for the model thread's end, after `stop` or `abandon`. Returns whether it has ended."""
        return self.batcher.join(timeout)

    # -- one request -----------------------------------------------------------------------------

    def observe(self) -> Ticket:
        """Count one request, from now to the end of the ticket's `with` block.

        Raises:
            ServingError: as the block did; any other exception becomes a `ModelFailed`.
        """
        now = self.clock()
        scheduler = self.batcher.scheduler
        self.metrics.add_arrival(now, scheduler.queue_depth, scheduler.in_flight)
        return Ticket(self, now, now + self.settings.timeout_s)

    async def predict(
        self, values: Sequence[Any], parameters: Mapping[str, Any], ticket: Ticket
    ) -> list[Any]:
        """Answers to `values`, in order. Each is a queue item of its own; the first error ends all.

        Cancelling the caller gives up the items: waiting ones leave the queue at once.

        Raises:
            MalformedRequest: parameters or values that this task does not take.
            RequestTooLarge: more values than the queue can hold, or one that does not fit into memory.
            InputRejected: the model cannot take a value; the text says which of several.
            Overloaded: refused at the door, or dropped while waiting.
            Unavailable: the server is stopping, or the model is broken.
            DeadlineExceeded: the ticket's deadline passed, also while the forward runs.
            ModelFailed: the model raised.
        """
        if self.model is not None:
            self.model.check(values, parameters)
        items = self.batcher.submit(values, parameters, arrived=ticket.arrived, deadline=ticket.deadline)
        ticket.items = len(items)
        loop = asyncio.get_running_loop()
        alarm = loop.call_later(ticket.deadline - self.clock(), _time_is_up, items)  # half of a timeout()
        answers = []
        try:
            for index, item in enumerate(items):
                result: Result = await item.payload.future
                if result is _TOO_LATE:
                    raise DeadlineExceeded("the request's time was up before the model had answered")
                _note(ticket, result)
                if result.error is not None:
                    raise _located(result.error, index, len(items))
                answers.append(result.value)
        except BaseException:
            unheard = [item for item in items if not _answered(item.payload.future)]
            if unheard:
                self.batcher.cancel(unheard)
            raise
        finally:
            alarm.cancel()
        return answers

    # -- knobs -----------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The knobs in force."""
        return self.batcher.scheduler.settings

    def tune(self, **changes: Any) -> Settings:
        """Change some knobs, all or none; they count from the next decision.

        Raises:
            SettingError: an unknown knob or a bad value; nothing was changed.
            Unavailable: the server has stopped.
        """
        if self.stopped:
            raise Stopping("the server has stopped")
        with self._tuning:
            settings = self.settings.replace(**changes)
            if self.model is not None:
                _refuse_what_it_cannot(self.model, settings)
            self.batcher.tune(settings)
            if changes:
                values = {name: getattr(settings, name) for name in changes}
                self.changes.append(Change(self.clock(), values))
        return settings

    @property
    def max_body_bytes(self) -> int:
        """Longest request body, with "auto" resolved for this task."""
        limit = self.settings.max_body_bytes
        if limit != "auto":
            return limit
        return _MEDIA_BODY if self.model is not None and self.model.media else _TEXT_BODY

    # -- what people ask -------------------------------------------------------------------------

    def state(self) -> tuple[str, str]:
        """One word and a reason: ready, starting, draining, stopped, stuck or failed."""
        if self.stopped:
            return "stopped", "the server has stopped"
        if self.started_at is None:
            return "starting", "the model is not ready yet"
        if self.leaving or self.batcher.scheduler.draining:
            return "draining", "the server is stopping"
        if trouble := self.batcher.trouble():
            return "failed", trouble
        busy_since = self.batcher.busy_since
        bound = max(_STUCK_AT_LEAST_S, _STUCK_FACTOR * self.settings.timeout_s)
        if busy_since is not None and self.clock() - busy_since > bound:
            return "stuck", f"one forward has been running for more than {bound:.0f} s"
        return "ready", self.batcher.doubt()

    def snapshot(self, series: int = 0) -> dict[str, Any]:
        """Everything that there is to see now, as a JSON object. Durations are in milliseconds.

        Args:
            series: Add `series`, one entry for each of the last so many seconds, and `changes`, the
                knobs that moved.
        """
        state, reason = self.state()
        scheduler = self.batcher.scheduler
        now = self.clock()
        history: dict[str, Any] = {}
        if series:
            changes = [{"ago_s": round(now - c.at, 3), "knobs": dict(c.knobs)} for c in self.changes]
            points = self.metrics.series(now, series)
            points[-1]["queue_depth"] = max(points[-1]["queue_depth"], scheduler.queue_depth)
            points[-1]["in_flight"] = max(points[-1]["in_flight"], scheduler.in_flight)
            history = {"series": points, "changes": changes}
        return {
            "name": self.name,
            "model": self.model_name,
            "task": self.task,
            "device": self.device,
            "state": state,
            "reason": reason,
            "uptime_s": 0.0 if self.started_at is None else round(now - self.started_at, 3),
            "queue_depth": scheduler.queue_depth,
            "in_flight": scheduler.in_flight,
            "settings": self.settings.to_dict(),
            "cost": {
                "known": scheduler.cost.known,
                "call_ms": scheduler.cost.a * 1e3,
                "token_us": scheduler.cost.b * 1e6,
                "max_batch_tokens": scheduler.token_budget(),
                "memory_limit_tokens": scheduler.ceiling.lowest(now),
            },
            **self.metrics.snapshot(now),
            **history,
        }

    def incidents(self) -> list[Incident]:
        """The latest failures, newest first. For the owner only."""
        return list(self._incidents)[::-1]

    def keep_incident(self, failed: ServingError, error: BaseException) -> None:
        """Remember what really happened, under an id that the client may be told."""
        failed.incident = secrets.token_hex(4)
        text = "".join(traceback.format_exception(error))
        self._incidents.append(
            Incident(failed.incident, time.time(), failed.outcome, f"{type(error).__name__}: {error}", text)
        )

    def _keep_fault(self, failed: ServingError, error: BaseException) -> None:
        """Count and remember what went wrong on the model thread."""
        if not isinstance(failed, InputRejected):
            self.metrics.add_fault(faults.kind(error))
        self.keep_incident(failed, error)


def _refuse_what_it_cannot(model: ServedModel, settings: Settings) -> None:
    most = model.max_batch_size
    if most is not None and settings.max_batch_size > most:
        why = getattr(model, "batch_obstacle", "") or "this model takes fewer items at a time"
        raise SettingError(
            f"max_batch_size must be {most} for {model.name}, got {settings.max_batch_size}: {why}"
        )


def _time_is_up(items: Sequence[Item]) -> None:
    """Wake the request that waits for these items."""
    for item in items:
        if not item.payload.future.done():
            item.payload.future.set_result(_TOO_LATE)


def _answered(future: asyncio.Future[Result]) -> bool:
    """Whether the model thread is done with it. Giving up on a future cancels it, which is `done` too."""
    return future.done() and not future.cancelled() and future.result() is not _TOO_LATE


def _note(ticket: Ticket, result: Result) -> None:
    """A request has waited as long as its last item has."""
    if result.queue_wait is not None and result.queue_wait >= (ticket.queue_wait or 0.0):
        ticket.queue_wait, ticket.forward = result.queue_wait, result.forward


def _located(error: ServingError, index: int, items: int) -> ServingError:
    """The error to raise for one item. Batch mates may share it, so no traceback sticks to it."""
    if items > 1 and isinstance(error, InputRejected):
        located = InputRejected(f"inputs[{index}]: {error}", detail=error.detail)
        located.incident = error.incident
        return located
    return error.with_traceback(None)
