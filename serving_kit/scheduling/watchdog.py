"""When the learned cost is released: it is compared with what happens.

Budget, admission, dropping and Retry-After all rely on one learned cost. If it is wrong, what follows can
keep it wrong: requests that are refused run no batch that would correct it, and a server that answers
everything too late looks busy. So two things are counted that do not depend on the cost itself:

- batches that were expected to end in time and ended after the deadlines of most of their items;
- refusals that were wrong: the items that waited at the time were done so soon that the refused request
  would have been answered in less than half of the predicted time. One refusal is followed at a time.

If most of the latest ones are bad, the scheduler forgets the cost and learns it again.

Pure: every method takes what it needs. Not thread-safe: the scheduler owns it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

_BATCHES, _REFUSALS = 16, 8  # that are remembered
_WRONG_BY = 2.0
_SHOWN_S = 30.0  # how long `reason` is given


class Watchdog:
    """Counts wrong predictions of one cost model."""

    def __init__(self) -> None:
        self._late: deque[bool] = deque(maxlen=_BATCHES)
        self._wrong: deque[bool] = deque(maxlen=_REFUSALS)
        self._ahead: set[int] = set()  # ids of the items that waited at a refusal and still do
        self._refused_at = self._soon = 0.0
        self._distrusted_at: float | None = None
        self._why = ""

    def refused(self, ahead: Iterable[object], queued_s: float, own_s: float, now: float) -> None:
        """A request was refused by the cost.

        Args:
            ahead: The items that wait.
            queued_s: Seconds that were predicted until all of them would be done.
            own_s: Seconds more that the request itself would have taken.
            now: When.
        """
        if not self._ahead:
            self._ahead, self._refused_at = set(map(id, ahead)), now
            self._soon = (queued_s + own_s) / _WRONG_BY - own_s

    def item_done(self, item: object, now: float) -> None:
        """An item was answered."""
        if id(item) in self._ahead:
            self._ahead.discard(id(item))
            if not self._ahead:
                self._wrong.append(now - self._refused_at < self._soon)

    def item_gone(self, item: object) -> None:
        """An item has ended otherwise than by a step that teaches the cost: no prediction is judged by it."""
        if id(item) in self._ahead:
            self._ahead.clear()

    def batch_done(self, *, late: bool) -> None:
        """A batch that was expected to end in time has ended; `late`: most of its items were too late."""
        self._late.append(late)

    def assess(self, now: float) -> str:
        """Why the cost cannot be trusted; empty if it can. Starts to count anew if it cannot."""
        for seen, why in (
            (self._late, "most batches ended after the deadlines that they were expected to meet"),
            (self._wrong, "most refused requests could have been answered in time"),
        ):
            if len(seen) == seen.maxlen and 2 * sum(seen) > len(seen):
                self.__init__()  # type: ignore[misc]
                self._why, self._distrusted_at = why, now
                return why
        return ""

    def reason(self, now: float) -> str:
        """Why the cost was released; empty 30 s later."""
        if self._distrusted_at is None or now - self._distrusted_at > _SHOWN_S:
            return ""
        return f"the learned cost was wrong and is learned again: {self._why}"
