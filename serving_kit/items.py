"""One input of a request, as the scheduler, the recovery and the engine see it.

Not here: what its client gets (`events.py`), what the model makes of it (`model.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from serving_kit.model import AnyPrepared, Input, computed_tokens

_NO_INPUT = Input(None)


class ItemState(Enum):
    """Where an item is. It only moves forward."""

    WAITING = "waiting"
    RUNNING = "running"  # in a step, or between two of its steps
    DONE = "done"  # answered, failed, dropped or cancelled


@dataclass(eq=False, slots=True)
class Item:
    """One input on its way through the engine."""

    arrived: float
    deadline: float  # absolute; of a stream until its first chunk
    tokens: int  # of its next step, in a step its share; an estimate until it is prepared
    input: Input = _NO_INPUT
    payload: Any = None  # the owner's own
    key: Hashable | None = None  # items share a step only if their keys are equal; None until prepared
    prepared: AnyPrepared | None = None
    divisible: bool = False  # whether a step may compute only the first of its tokens
    context_tokens: int = 0  # in its cache; before its first step, what it is expected to copy from another
    stream_deadline: float | None = None  # absolute, from the first chunk on; None: not a stream
    state: ItemState = ItemState.WAITING
    started: float | None = None  # when its first step was chosen
    token_at: float | None = None  # when its last token was generated; None: none was
    cancelled: bool = False  # its client has left while it was running
    estimate: int = 0  # what `tokens` was when it was offered
    fingerprint: int = 0  # of its input, once it has failed; equal for equal inputs
    priced: bool = False  # admitted because the learned cost said that there is time for it

    def waited_s(self, ended: float) -> tuple[float | None, float | None]:
        """Seconds from its arrival to the start of its first step, and from there to `ended`."""
        if self.started is None:
            return None, None
        return self.started - self.arrived, ended - self.started

    def is_wanted(self, now: float) -> bool:
        """Whether it runs, its client still waits, and there is time left."""
        return self.state is ItemState.RUNNING and not self.cancelled and self.deadline > now


def computed(items: Sequence[Item], *, packed: bool) -> int:
    """Tokens that a model computes in a step of these items."""
    return computed_tokens((item.tokens for item in items), packed=packed)


def longest(items: Sequence[Item]) -> int:
    """Tokens of the longest of these items."""
    return max(item.tokens for item in items)
