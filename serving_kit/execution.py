"""One forward: what a model is to its thread, what goes in, and what comes of it.

    job.value ── prepare ──▶ job.prepared ──┐
    job.value ── prepare ──▶ job.prepared ──┴── run() ──▶ Call: one answer for each item, or the error

Called on the model thread; nothing here waits or locks.

Not here: when to run (`batching.py`), what to do about an error (`recovery.py`), the models themselves
(`pipeline.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from serving_kit.errors import DeadlineExceeded, Overloaded, ServingError
from serving_kit.failures.classify import WrongNumberOfOutputs
from serving_kit.records import BatchReason, BatchRecord
from serving_kit.scheduling.scheduler import Drop, Item


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

    A batch on which `forward` has raised is run again in parts, and so is `example`, to see whether the
    model still works.
    """

    @property
    def example(self) -> tuple[Any, Mapping[str, Any]] | None:
        """An input that it has answered well, and its parameters; None: none that may be used."""

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
            padded_tokens=len(tokens) * max(tokens),
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
    inputs: list[Prepared] = [item.payload.prepared for item in items]
    started = clock()
    try:
        outputs = model.forward(inputs)
        if len(outputs) != len(inputs):
            raise WrongNumberOfOutputs(
                f"inputs given to the model: {len(inputs)}; outputs that it returned: {len(outputs)}"
            )
    except BaseException as error:
        return Call(items, started, clock(), error=error)
    answers = [_finish(model, *pair, told) for pair in zip(outputs, inputs, strict=True)]
    return Call(items, started, clock(), answers)


def probe(model: Model, value: Any, parameters: Mapping[str, Any]) -> bool:
    """Whether the model answers one input, alone and from scratch."""
    try:
        prepared = model.prepare(value, parameters)
        (output,) = model.forward([prepared])
        model.finish(output, prepared)
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
    model: Model, output: Any, prepared: Prepared, told: Callable[[BaseException], ServingError]
) -> Any:
    """One answer, or the `ServingError` that stands in for it. A bad one fails alone."""
    try:
        return model.finish(output, prepared)
    except BaseException as error:
        return told(error)


def _result(answer: Any, queue_wait: float, forward: float) -> Result:
    if isinstance(answer, ServingError):
        return Result(error=answer, queue_wait=queue_wait, forward=forward)
    return Result(value=answer, queue_wait=queue_wait, forward=forward)
