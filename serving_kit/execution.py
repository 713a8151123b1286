"""One forward: what a model is to its thread, what goes in, and what comes of it.

    job.value ── prepare ──▶ job.prepared ──┐
    job.value ── prepare ──▶ job.prepared ──┴── run() ──▶ Call: one answer for each item, or the error

Called on the model thread; nothing here waits or locks.

Not here: when to run (`batching.py`), what to do about an error (`recovery.py`), the models themselves
(`pipeline.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from serving_kit.errors import DeadlineExceeded, Overloaded, ServingError
from serving_kit.failures.classify import WrongNumberOfOutputs
from serving_kit.model import Done, Failed, Model, Part, Prepared, StepResult, padded_tokens
from serving_kit.records import BatchReason, BatchRecord
from serving_kit.scheduling.scheduler import Drop, Item


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
    prepared: Prepared[Any] | None = None


class Call(NamedTuple):
    """One forward and what came of it."""

    items: Sequence[Item]
    started: float
    ended: float
    answers: Sequence[Any] = ()  # one for each item: what its client gets, or a `ServingError`
    error: BaseException | None = None  # what the model raised instead

    def results(self, started: float) -> list[tuple[Item, Result]]:
        """How its items ended, if the batch that they were in was `started` then."""
        took = self.ended - started
        return [
            (item, _result(answer, started - item.arrived, took))
            for item, answer in zip(self.items, self.answers, strict=True)
        ]

    def record(self, reason: BatchReason, left_waiting: int) -> BatchRecord:
        """The fact that remains of it."""
        tokens = [item.tokens for item in self.items]
        return BatchRecord(
            started=self.started,
            finished=self.ended,
            size=len(tokens),
            tokens=sum(tokens),
            padded_tokens=padded_tokens(tokens),
            reason=reason,
            oldest_wait=self.started - self.items[0].arrived,
            left_waiting=left_waiting,
            wasted=sum(item.abandoned or item.deadline < self.ended for item in self.items),
            ok=self.error is None,
        )


def run(
    model: Model,
    items: Sequence[Item],
    clock: Callable[[], float],
    told: Callable[[BaseException], ServingError],
) -> Call:
    """Run the model once on prepared items.

    Args:
        model: Whatever it raises ends up in the result.
        items: With a `Job` each, all of one group.
        clock: For when it began and ended.
        told: Makes an error of `finish` into what its client is told.
    """
    inputs: list[Prepared[Any]] = [item.payload.prepared for item in items]
    started = clock()
    try:
        results = model.step([Part(each, each.work.tokens) for each in inputs])
        if len(results) != len(inputs):
            raise WrongNumberOfOutputs(
                f"inputs given to the model: {len(inputs)}; outputs that it returned: {len(results)}"
            )
    except BaseException as error:
        return Call(items, started, clock(), error=error)
    answers = [_finish(model, *pair, told) for pair in zip(results, inputs, strict=True)]
    return Call(items, started, clock(), answers)


def probe(model: Model, value: Any, parameters: Mapping[str, Any]) -> bool:
    """Whether the model answers one input, alone and from scratch."""
    try:
        prepared = model.prepare(value, parameters)
        (result,) = model.step([Part(prepared, prepared.work.tokens)])
        if not isinstance(result, Done):
            return False
        model.finish(prepared, result.output)
    except BaseException:
        return False
    return True


def dropped(drop: Drop, retry_after: float | None = None) -> Result:
    """How an item ended that never ran; `retry_after` in seconds, if that is known."""
    if drop is Drop.EXPIRED:
        return Result(error=DeadlineExceeded("the request's time was up before the model was free"))
    text = "the server is overloaded: it could not be answered in time"
    return Result(error=Overloaded(text, retry_after=retry_after))


def _finish(
    model: Model, result: StepResult, prepared: Prepared[Any], told: Callable[[BaseException], ServingError]
) -> Any:
    """One answer, or the `ServingError` that stands in for it. A bad one fails alone."""
    if isinstance(result, Failed):
        return told(result.error)
    try:
        if not isinstance(result, Done):
            raise TypeError("this model needs several steps, which are not supported yet")
        return model.finish(prepared, result.output)
    except BaseException as error:
        return told(error)


def _result(answer: Any, queue_wait: float, forward: float) -> Result:
    if isinstance(answer, ServingError):
        return Result(error=answer, queue_wait=queue_wait, forward=forward)
    return Result(value=answer, queue_wait=queue_wait, forward=forward)
