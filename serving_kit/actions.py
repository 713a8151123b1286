"""What the engine asks the worker to do, and what comes of it.

Not here: when (`engine.py`), how (`execution.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serving_kit.failures.classify import Failure
from serving_kit.items import Item
from serving_kit.model import AnyPrepared, Input, More
from serving_kit.records import BatchReason


class Prepare(NamedTuple):
    """Prepare these items. Result: for each a `Prepared`, a `Failure`, or None if it had ended before."""

    items: Sequence[Item]


class Step(NamedTuple):
    """Run the model once on these items. Result: `Executed`."""

    items: Sequence[Item]
    reason: BatchReason
    left_waiting: int
    expected_s: float  # 95 of 100 such steps take less; 0: not known


class Canary(NamedTuple):
    """Run the model's example. Result: whether it was answered."""

    example: Input


class Free(NamedTuple):
    """Give back the memory that a failed step holds. Result: the `Failure`s of that."""

    failure: Failure
    thorough: bool


class Release(NamedTuple):
    """Release what these hold in the model: they have ended, or others need the memory first.

    Result: the `Failure`s of that.
    """

    prepared: Sequence[AnyPrepared]


class Sleep(NamedTuple):
    """Nothing to do until then, or if that is None until something happens. Not performed."""

    until: float | None


class Exit(NamedTuple):
    """There will be nothing more to do. Not performed."""


Action = Prepare | Step | Canary | Free | Release | Sleep | Exit


class Answered(NamedTuple):
    """An item has ended with this answer."""

    answer: object
    chunk: object = None  # the last of its stream; None: none
    generated: int = 0  # tokens that this step has added to a text


ItemResult = Answered | More | Failure


@dataclass(frozen=True, slots=True)
class Executed:
    """What came of a step."""

    started: float
    ended: float
    results: Sequence[ItemResult] = ()  # one for each item
    failure: Failure | None = None  # the step has raised instead
    unreleased: Sequence[Failure] = ()  # of `Model.release`, which no client is told of
