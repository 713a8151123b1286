"""What the client of one item gets, and in which order: `Chunk`s, then exactly one `Done` or `Failed`.

Not here: the results of a step, which the engine turns into these (`model.py`), their delivery (`jobs.py`).
"""

from __future__ import annotations

from typing import NamedTuple

from serving_kit.errors import ServingError


class Chunk(NamedTuple):
    """A piece of the answer; more follows."""

    value: object


class Done(NamedTuple):
    """The answer."""

    value: object
    queue_wait_s: float | None = None  # from arrival to the start of its first step
    model_time_s: float | None = None  # from there to the end of its last step


class Failed(NamedTuple):
    """There is no answer, or no more of it."""

    error: ServingError
    queue_wait_s: float | None = None  # None: it never started
    model_time_s: float | None = None


End = Done | Failed
Event = Chunk | Done | Failed
