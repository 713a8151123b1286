"""One request from arrival to outcome, without HTTP.

    with service.observe() as ticket:                 # exactly one RequestRecord, whatever happens
        answers = await service.predict(values, parameters, ticket)

Any front end (Starlette, the kernel, Ray Serve) drives these two lines. `observe` is the only place
that counts a request, and every way out of its body is an outcome.

Not here: bodies and statuses (`http/`), threads (`batching.py`).
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from prometheus_client.core import Metric

from serving_kit.batching import Batcher
from serving_kit.engine import Engine
from serving_kit.errors import (
    DeadlineExceeded,
    InputRejected,
    ModelFailed,
    Overloaded,
    ServingError,
    SettingError,
    Stopping,
    error_text,
)
from serving_kit.events import Chunk, Done, End, Failed
from serving_kit.model import Input, ServedModel
from serving_kit.records import Incident, Outcome, RequestRecord
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.scheduler import Scheduler
from serving_kit.settings import Settings
from serving_kit.status import CoreStatus, ServerStatus, State, Statistics
from serving_kit.status_reader import StatusReader
from serving_kit.submitting import Submitter, Waiting
from serving_kit.telemetry import Telemetry
from serving_kit.worker import ModelThread, WorkerFactory

_TEXT_BODY, _MEDIA_BODY = 2**20, 2**25
_MOST_HELD = 2**29  # bytes of all bodies together: max_queue_size bounds only how many there are
_TOO_LATE = Failed(DeadlineExceeded("the request's time was up"))  # from the timer of the deadline


@dataclass(slots=True)
class Ticket:
    """One request under way. The end of its `with` block is the one place where a request is counted."""

    service: Service
    arrived: float
    deadline: float
    request_id: str = ""
    shortened: bool = False  # by the client, who gives it less time than the server does
    limited_by: str = "timeout_ms"  # if not by the client
    items: int = 0
    queue_wait_s: float | None = None
    model_time_s: float | None = None
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
        if timeout_s is not None and self.arrived + timeout_s < self.deadline:
            self.deadline = self.arrived + timeout_s
            self.shortened = True

    def note(self, end: End) -> None:
        """Keep the times of the item that waited longest: they are those of the request."""
        if end.queue_wait_s is not None and end.queue_wait_s >= (self.queue_wait_s or 0.0):
            self.queue_wait_s, self.model_time_s = end.queue_wait_s, end.model_time_s

    def limit_text(self) -> str:
        """The time that it may take, and whose limit that is."""
        time_ms = f"{(self.deadline - self.arrived) * 1e3:,.6g} ms"
        return (
            f"the client's {time_ms} (X-Request-Timeout-Ms)"
            if self.shortened
            else f"{time_ms} ({self.limited_by})"
        )

    def expired(self, *, dropped: bool) -> DeadlineExceeded:
        """What to raise when the deadline has passed: it names the limit that applied."""
        error = DeadlineExceeded(f"the request was not answered within {self.limit_text()}")
        error.dropped = dropped
        return error

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        service, outcome = self.service, Outcome.OK
        service.held -= self.held
        told = error
        failed: ModelFailed | None = None
        if isinstance(error, ServingError):
            outcome = error.outcome
            if error.__cause__ is not None and error.incident is None:  # raised on the way out
                service.telemetry.incidents.keep(error, error.__cause__)
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):  # a stream in a cell is closed
            outcome = Outcome.CANCELLED
        elif error is not None:
            outcome = Outcome.FAILED
            if isinstance(error, Exception):
                detail = error_text(error)
                told = failed = ModelFailed("the server failed on this request", detail=detail)
                service.telemetry.incidents.keep(failed, error)
        incident = told.incident if isinstance(told, ServingError) else None
        ended = service.clock()
        record = RequestRecord(
            self.arrived,
            ended,
            outcome,
            self.items,
            self.queue_wait_s,
            self.model_time_s,
            self.request_id,
            incident,
        )
        service.telemetry.request_ended(record, told)
        if failed is not None:
            raise failed from error


class Service:
    """One model behind one queue. Without `retry`, a batch that raises fails whole.

    `start`, `predict` and `stop` belong to the loop thread; everything else may be called from any.

    Args:
        model: What answers.
        settings: The knobs at first; None: the defaults.
        given: The knobs that a person has set. The others are lowered to what the model can do.
        name: Shown to clients.
        retry: Whether a batch that raised may run again in parts.
        live_timeout_s: See `live`; None: never.
        clock: Seconds, monotonic.
        make_worker: Makes what runs the model; for the simulator.

    Attributes:
        telemetry: Metrics, incidents, log, and the observers of requests and steps.
        notes: What the owner should know about how this model is served.
        layout: Whether the model packs the items of a step, and why.

    Raises:
        SettingError: the settings in `given` ask this model for more than it can do, or `live_timeout_s` is
            not a positive number.
    """

    def __init__(
        self,
        model: ServedModel,
        settings: Settings | None = None,
        *,
        given: Container[str] = (),
        name: str = "default",
        retry: bool = True,
        live_timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        make_worker: WorkerFactory = ModelThread,
    ) -> None:
        settings = settings or Settings()
        check_live_timeout(live_timeout_s)
        self.notes = list(model.notes)
        most = model.limits.max_batch_size
        if most is not None and settings.max_batch_size > most.value and "max_batch_size" not in given:
            settings = settings.replace(max_batch_size=most.value)
            self.notes.append(f"max_batch_size is {most.value}: {most.reason}")
        _refuse_what_it_cannot(model, settings)
        self.name = name
        self.model_name, self.task, self.device = model.name, model.task_name, model.device
        self.precision = model.precision
        self.model: ServedModel | None = model
        self.clock = clock
        self.live_timeout_s = live_timeout_s
        self.started_at: float | None = None
        self.leaving = False  # it will stop soon: /health answers 503
        self.draining_since: float | None = None
        self.stopped = False
        self.held = 0  # bytes of the bodies of all requests under way
        self.telemetry = Telemetry(name, clock)
        self.metrics, self.log = self.telemetry.metrics, self.telemetry.log
        self._reader = StatusReader(self)
        self.layout = model.limits.layout
        cost = CostModel(packed=self.layout.packed)
        for timing in model.timings:
            cost.observe(*timing)
        scheduler = Scheduler(settings, cost, self.layout, model.limits.cache)
        engine = Engine(scheduler, canary=model.example, retry=retry)
        self.batcher = Batcher(model, engine, self.telemetry.report, clock=clock, make_worker=make_worker)
        self._submitter = Submitter(self.batcher)
        self._tuning = threading.Lock()

    # -- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the model thread; requests are admitted once this has returned."""
        self.batcher.start()
        self.started_at = self.clock()

    def announce_stop(self) -> None:
        """Report not ready (`/health`) from now on, while requests are still admitted. Any thread."""
        self.leaving = True

    def drain(self) -> None:
        """Refuse new requests from now on; the admitted ones are finished. Any thread."""
        if self.draining_since is None:
            self.draining_since = self.clock()
        self.batcher.drain()

    async def stop(self, drain_s: float = 5.0) -> bool:
        """Refuse new requests, finish the admitted ones, release the model.

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
            self.release()
            self.log.close()

    def release(self) -> None:
        """Release the model at once, without waiting. Any thread; for a server whose loop has died."""
        self.stopped = True
        self.model = None
        self.batcher.release()

    def join(self, timeout: float) -> bool:
        """Wait for the model thread's end, after `stop` or `release`. Returns whether it has ended."""
        return self.batcher.join(timeout)

    # -- one request -----------------------------------------------------------------------------

    def observe(self, request_id: str = "") -> Ticket:
        """Count one request, from now to the end of the ticket's `with` block.

        Args:
            request_id: Its id in the response and in the log.

        Raises:
            ServingError: as the block did; any other exception becomes a `ModelFailed`.
        """
        now = self.clock()
        self.metrics.add_arrival(now, *self.batcher.load())
        return Ticket(self, now, now + self.settings.timeout_s, request_id)

    async def predict(
        self, values: Sequence[object], parameters: Mapping[str, object], ticket: Ticket
    ) -> list[object]:
        """Answers to `values`, in order. Each is a queue item of its own; the first error ends all.

        With `share_equal_inputs` an input that is equal to one in flight joins its item, also of another
        request. Cancelling the caller cancels the items that no other request waits for: waiting ones leave
        the queue at once.

        Raises:
            MalformedRequest: parameters or values that this task does not take.
            RequestTooLarge: more values than the queue can hold, or one that does not fit into memory.
            InputRejected: the model cannot take a value; the text says which of several.
            Overloaded: not admitted, or dropped while waiting.
            Unavailable: the server is stopping, or the model is broken.
            DeadlineExceeded: the ticket's deadline passed, also while the model runs.
            ModelFailed: the model raised.
        """
        inputs = [Input(value, parameters) for value in values]
        share = False
        if self.model is not None:
            self.model.check(values, parameters)
            share = self.settings.share_equal_inputs and not self.model.samples(parameters)
        try:
            items, shared = self._submitter.submit(
                inputs, arrived=ticket.arrived, deadline=ticket.deadline, share=share
            )
        except DeadlineExceeded:  # less time than any call of the model takes
            raise ticket.expired(dropped=False) from None
        ticket.items = len(items)
        if shared:
            self.metrics.add_shared(shared)
        loop = asyncio.get_running_loop()
        alarm = loop.call_later(
            ticket.deadline - self.clock(), _time_is_up, items
        )  # costs half of a timeout()
        answers = []
        try:
            for index, item in enumerate(items):
                end: End = await item.payload.ended
                ticket.note(end)
                if isinstance(end, Failed):
                    if isinstance(end.error, DeadlineExceeded):
                        raise ticket.expired(dropped=True)
                    raise _located(end.error, index, len(items))
                answers.append(end.value)
        except BaseException:
            unanswered = [item for item in items if not _has_ended(item.payload.ended)]
            if unanswered:
                self._submitter.cancel(unanswered, expired=any(map(_is_too_late, unanswered)))
            raise
        finally:
            alarm.cancel()
        return answers

    async def stream(
        self, value: object, parameters: Mapping[str, object], ticket: Ticket, stream_timeout_s: float
    ) -> AsyncGenerator[Chunk | Done, None]:
        """The answer to one input in pieces: `Chunk`s as they come, then `Done`.

        Closing the iterator cancels the item. Raises as `predict` does, also after some chunks.

        Args:
            value: One input.
            parameters: Of the call.
            ticket: Of the request; its deadline is that of the first chunk.
            stream_timeout_s: Seconds from arrival to the last chunk.
        """
        if self.model is not None:
            self.model.check([value], parameters)
        ends = max(ticket.arrived + stream_timeout_s, ticket.deadline)
        try:
            (item,) = self.batcher.submit(
                [Input(value, parameters)],
                arrived=ticket.arrived,
                deadline=ticket.deadline,
                stream_deadline=ends,
            )
        except DeadlineExceeded:
            raise ticket.expired(dropped=False) from None
        ticket.items = 1
        loop = asyncio.get_running_loop()
        alarm = loop.call_later(ticket.deadline - self.clock(), _time_is_up, [item])
        try:
            async for event in item.payload.events():
                if isinstance(event, Failed):
                    ticket.note(event)
                    if isinstance(event.error, DeadlineExceeded):
                        raise ticket.expired(dropped=True)
                    raise event.error.with_traceback(None)  # others may share it
                if isinstance(event, Done):
                    ticket.note(event)
                elif ticket.deadline != ends:
                    ticket.deadline, ticket.shortened, ticket.limited_by = ends, False, "stream_timeout_s"
                    alarm.cancel()
                    alarm = loop.call_later(ends - self.clock(), _time_is_up, [item])
                yield event
        finally:
            alarm.cancel()
            if not _has_ended(item.payload.ended):
                self.batcher.cancel([item], expired=_is_too_late(item))

    # -- knobs -----------------------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The knobs in force."""
        return self.batcher.settings

    def tune(self, by: str = "code", /, **changes: Any) -> Settings:
        """Change some knobs, all or none; they count from the next decision.

        Args:
            by: Who asks for it, for the log.
            changes: Knobs and their new values.

        Raises:
            SettingError: an unknown knob or a bad value; nothing was changed.
            Unavailable: the server has stopped.
        """
        if self.stopped:
            raise Stopping("the server has stopped")
        with self._tuning:
            before = self.settings
            settings = before.replace(**changes)
            if self.model is not None:
                _refuse_what_it_cannot(self.model, settings)
            self.batcher.tune(settings)
            if changes:
                values = {name: getattr(settings, name) for name in changes}
                self.metrics.add_change(self.clock(), values)
                self.log.settings(by, {name: getattr(before, name) for name in changes}, values)
        return settings

    @property
    def max_body_bytes(self) -> int:
        """Longest request body, with "auto" resolved for this task."""
        limit = self.settings.max_body_bytes
        if limit != "auto":
            return limit
        return _MEDIA_BODY if self.model is not None and self.model.media else _TEXT_BODY

    # -- reading ---------------------------------------------------------------------------------

    def state(self) -> tuple[State, str]:
        """The state, and the reason for it; empty: there is none."""
        return self._reader.state()

    def live(self) -> tuple[bool, str]:
        """Whether the process can recover without a restart, and why not; see `StatusReader.live`."""
        return self._reader.live()

    def status(self) -> ServerStatus:
        """The server now."""
        return self._reader.status()

    def statistics(self, series: int = 0) -> Statistics:
        """The numbers now; with `series`, also one entry for each of the last so many seconds."""
        return self._reader.statistics(series)

    def families(self) -> Iterator[Metric]:
        """The metric families of this server, for Prometheus."""
        return self._reader.families()

    def incidents(self) -> list[Incident]:
        """The latest failures, newest first. For the owner only."""
        return self.telemetry.incidents.latest()

    def core_status(self) -> CoreStatus:
        """What the engine reports."""
        return self.batcher.status()

    def model_changes(self) -> str:
        """What was done to the model that answers do not show, and the remedy; empty: nothing."""
        return "" if self.model is None else self.model.changed()


def check_live_timeout(seconds: object) -> None:
    """Raise `SettingError` unless it is None or a positive number of seconds."""
    if seconds is None:
        return
    if isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds < math.inf:
        return
    raise SettingError(
        f"live_timeout_s must be a number of seconds above 0, or None for never; got {seconds!r}"
    )


def _refuse_what_it_cannot(model: ServedModel, settings: Settings) -> None:
    most = model.limits.max_batch_size
    if most is not None and settings.max_batch_size > most.value:
        raise SettingError(
            f"max_batch_size must be {most.value} for {model.name}, got {settings.max_batch_size}: "
            f"{most.reason}"
        )
    if settings.share_equal_inputs and model.limits.sharing_obstacle:
        raise SettingError(
            f"share_equal_inputs must be False for {model.name}: {model.limits.sharing_obstacle}"
        )


def _time_is_up(items: Sequence[Waiting]) -> None:
    """End the request that waits for these items."""
    for item in items:
        item.payload.emit(_TOO_LATE)


def _has_ended(ended: asyncio.Future[End]) -> bool:
    """Whether the engine has ended it. A future whose waiter was cancelled is `done` as well."""
    return ended.done() and not ended.cancelled() and ended.result() is not _TOO_LATE


def _is_too_late(item: Waiting) -> bool:
    """Whether the timer of its request has ended it."""
    ended: asyncio.Future[End] = item.payload.ended
    return ended.done() and not ended.cancelled() and ended.result() is _TOO_LATE


def _located(error: ServingError, index: int, items: int) -> ServingError:
    """The error to raise for one item. Items of one batch may share it, so its traceback is removed."""
    if items > 1 and isinstance(error, InputRejected):
        located = InputRejected(f"inputs[{index}]: {error}", detail=error.detail)
        located.incident = error.incident
        return located
    return error.with_traceback(None)
