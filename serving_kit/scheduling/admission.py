"""Whether a request is admitted, and whether an admitted item can still be answered in time.

The learned cost prices the queue in the batches that it would really form. A share of the request's time
is kept in reserve, and adapted so that a small fixed share of the admitted items is dropped later.

Pure: every method takes `now`, in seconds on any monotonic clock. Not thread-safe: the scheduler owns it.

Not here: the queue (`scheduler.py`), the cost (`cost.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serving_kit.items import Item
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.watchdog import Watchdog
from serving_kit.settings import Settings

# `max_batch_tokens="auto"`: one step may take a third of the timeout, so that an item that just missed a
# step still makes the next one.
_AUTO_SHARE = 1 / 3
# The reserve covers others that grouping lets pass, and noise. It is adapted so that `_DROPPED_LATER` of the
# admitted items is dropped later. With too little reserve one in ten is dropped after it has waited under
# overload, most of them long texts.
_FIRST_RESERVE, _RESERVE_RANGE = 0.25, (0.05, 0.65)
_DROPPED_LATER = 0.0007
_RESERVE_RATE = 0.07  # per decision that dropped some
# Where the model packs nothing is passed, so that fewer have to be dropped. All of them count, and the late.
_PACKED_DROPPED_LATER = 0.0003
_PACKED_RATE = 4.0  # per item that was dropped or late, over the items of a timeout
_RESERVE_MEMORY = 30  # timeouts: then most of what was learned is forgotten
_ESTIMATE_FORGET = 0.98  # per item


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why a request was not admitted."""

    reason: str  # for people
    retry_after_s: float | None  # None: unknown
    expired: bool = False  # its own time is too short, whatever the load
    stopping: bool = False


class QueueState(NamedTuple):
    """What admission has to know about the queue."""

    depth: int  # items that wait
    tokens: int  # theirs, added up
    rest_s: float  # until the running step is expected to end
    stale: bool  # nothing has run for so long that the cost may not refuse anything


def step_limit_s(settings: Settings) -> float:
    """Seconds that one step may take."""
    return settings.timeout_s * _AUTO_SHARE


def token_limit(settings: Settings, cost: CostModel) -> float:
    """Tokens that one step may have because a person has set `max_batch_tokens`; infinite: none has.

    Of a model that packs. What padding takes of it depends on the lengths: there the cost learns it.
    """
    limit = settings.max_batch_tokens
    return math.inf if limit == "auto" or not cost.packed else limit


class Admission:
    """Decides by the learned cost, and learns from what follows."""

    def __init__(self, cost: CostModel, watchdog: Watchdog) -> None:
        self.cost = cost
        self.watchdog = watchdog
        self._reserve = _FIRST_RESERVE  # share of its time that an item must have to spare
        self._reserve_at = 0.0  # when it last changed
        self._answered = 0.0  # items in about the last timeout
        self._dropped_later = _PACKED_DROPPED_LATER if cost.packed else _DROPPED_LATER
        self._items = 0.0  # recent ones
        self._true_tokens = 0.0  # theirs, and what they were estimated at
        self._estimated_tokens = 0.0

    def reject(
        self,
        items: Sequence[Item],
        waiting: Sequence[Item],
        queue: QueueState,
        settings: Settings,
        now: float,
    ) -> Rejected | None:
        """Why `items` are not admitted; None: they are.

        The items' own lengths do not count: a rule that counts them refuses the long ones first.
        Admitted items get their corrected `tokens`.
        """
        first = items[0] if len(items) == 1 else min(items, key=_deadline)
        if self.is_too_short(first, queue, settings, now):
            return Rejected("its time is shorter than the model needs", None, expired=True)
        if queue.depth + len(items) > settings.max_queue_size:
            return Rejected("the queue is full", self.drain_s(queue, settings))
        # A language may have two characters to a token, and a text of long words seven.
        correction = self._true_tokens / self._estimated_tokens if self._estimated_tokens else 1.0
        priced = settings.drop_hopeless and self.cost.trusted and not queue.stale
        if priced:  # the last of them waits longest; its own length does not count
            tokens = correction * sum(item.tokens for item in items[:-1])
            if self.cost.packed:  # its own step holds it, too
                tokens += self._mean_tokens
            wait_s = self._shortest_wait_s(queue, len(items), tokens, settings)
            if wait_s > (first.deadline - now) * (1 - self._reserve):
                if waiting:
                    queued_s = self._shortest_wait_s(queue, 0, 0, settings)
                    self.watchdog.refused(waiting, queued_s, wait_s - queued_s, now)
                return Rejected("it could not be answered in time", self.drain_s(queue, settings))
        for item in items:
            item.priced, item.estimate = priced, item.tokens
            item.tokens = max(1, round(item.tokens * correction))
        return None

    def drain_s(self, queue: QueueState, settings: Settings) -> float | None:
        """Seconds that everything admitted so far is expected to take; None: unknown."""
        if not self.cost.observations:
            return None
        limit_s = step_limit_s(settings)
        return queue.rest_s + self.cost.drain(
            queue.depth,
            queue.tokens,
            settings.max_batch_size,
            limit_s,
            budget=token_limit(settings, self.cost),
        )

    def is_too_short(self, item: Item, queue: QueueState, settings: Settings, now: float) -> bool:
        """Whether the client gives an item less time, from `now`, than any step of the model takes."""
        left_s = item.deadline - now
        if left_s <= 0:
            return True
        # The server's own timeout may be too short for a model that has become slow: that is no mistake
        # of the client. The difference of two times may be a rounding error below it.
        asked = item.deadline - item.arrived < settings.timeout_s * (1 - 1e-6)
        sure = settings.drop_hopeless and self.cost.trusted and not queue.stale
        return asked and sure and left_s < self.cost.seconds(1)

    def cannot_finish(self, item: Item, end: float, queue: QueueState, settings: Settings) -> bool:
        """Whether an item cannot be answered in time by a step that ends at `end`."""
        return settings.drop_hopeless and item.deadline < end and not queue.stale

    def reserve_s(self, computed_tokens: float, settings: Settings) -> float:
        """Seconds to keep for a step: its 95th percentile.

        What that adds to the expected duration is bounded by the limit of a step. A model that takes long now
        and then must not have everything refused because of it.
        """
        high_s = self.cost.high(computed_tokens)
        return min(high_s, max(self.cost.seconds(computed_tokens), step_limit_s(settings))) if high_s else 0.0

    def prepared(self, item: Item) -> None:
        """The true length of an item is known: correct later estimates by it."""
        self._items = self._items * _ESTIMATE_FORGET + 1
        self._true_tokens = self._true_tokens * _ESTIMATE_FORGET + item.tokens
        self._estimated_tokens = self._estimated_tokens * _ESTIMATE_FORGET + item.estimate

    def adapt(self, items: int, dropped: int, settings: Settings, now: float) -> None:
        """Adapt the reserve to the outcome of `items` admitted items, of which `dropped` were hopeless.

        Stochastic gradient descent on the pinball loss, and exponential decay to the first value.
        """
        past = (now - self._reserve_at) / settings.timeout_s
        self._reserve += (_FIRST_RESERVE - self._reserve) * -math.expm1(-past / _RESERVE_MEMORY)
        self._reserve_at = now
        self._answered = self._answered * math.exp(-past) + items
        self._reserve += self._rate() * (dropped - self._dropped_later * items)
        self._reserve = min(max(self._reserve, _RESERVE_RANGE[0]), _RESERVE_RANGE[1])

    @property
    def _mean_tokens(self) -> float:
        """Of recent items; 0 while there are none."""
        return self._true_tokens / self._items if self._items else 0.0

    def _rate(self) -> float:
        """What one dropped item adds to the reserve.

        Where nothing is passed, all that waited together is dropped together. So the more items there are in
        a timeout, the less one says.
        """
        return min(_RESERVE_RATE, _PACKED_RATE / self._answered) if self.cost.packed else _RESERVE_RATE

    def _shortest_wait_s(self, queue: QueueState, items: int, tokens: float, settings: Settings) -> float:
        """Seconds until the queue and so many more items could be done, at least."""
        most, limit_s = settings.max_batch_size, step_limit_s(settings)
        ahead, tokens = queue.depth + items, queue.tokens + tokens
        if self.cost.packed:
            return queue.rest_s + self.cost.wait(
                ahead, tokens, most, limit_s, token_limit(settings, self.cost)
            )
        return queue.rest_s + self.cost.drain(ahead, tokens, most, limit_s, at_least=True)


def _deadline(item: Item) -> float:
    return item.deadline
