"""WHAT runs next: admit, group, drop, wait. Pure decisions of explicit time.

No threads, no clock, no asyncio: every method takes `now`, in seconds on any monotonic clock. The
same object runs in production, in property tests and in a simulator.

    offer(items, now)  ->  None, or a Refusal            the door
    ready(item, ...)                                      its length and group are known now
    poll(now)          ->  Decision: a batch | wake me at | nothing to do; and who was dropped
    finished(now)                                         the batch has ended
    cancel(item, now)                                     its client has gone

The rules, in the order in which they decide:

1. An idle model starts at once, unless `max_wait_ms` asks to wait; that wait counts from the oldest
   item's arrival and nothing restarts it. While the model is busy no batch is cut, so it keeps growing.
   After a batch, clients that are seen to come back at once are given that moment (`closed_loop.py`),
   and when everybody is back nothing is waited for.
2. The oldest live item is in every batch: nothing starves. Items of another group (other call
   parameters) never join it.
3. Company is chosen by length: of all ways to cut the waiting items, sorted by length, into batches,
   take the one with the least total time under the learned cost (dynamic programming, as in
   TurboTransformers, PPoPP'21), and run the part that holds the oldest item.
4. An item that is expired, or cannot be answered in time by its own batch, never starts.

Not here: sleeping and threads (`batching.py`), the cost (`cost.py`).
"""

from __future__ import annotations

import bisect
import math
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from serving_kit.failures.memory_limit import Ceiling
from serving_kit.records import BatchReason
from serving_kit.scheduling.closed_loop import Returning
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.watchdog import Watchdog
from serving_kit.settings import Settings

# The DP looks at the oldest items only: 0.4 ms for 96, and the gain beyond is small (a window of two
# full batches on a GPU, where batches are large).
_WINDOW = 96
_LONGEST_LOOK_AHEAD = 256  # items beyond `max_batch_size`, however large that is
# `max_batch_tokens="auto"`: one forward may take a third of the deadline, so that an item that just
# missed a batch still makes the next one.
_AUTO_SHARE = 1 / 3
# Admission keeps a share of an item's time in reserve, for others that grouping lets pass and for noise.
# It is adapted so that this share of the admitted items is dropped later. With too little reserve one in ten
# is dropped after it has waited under overload, most of them long texts.
_FIRST_RESERVE, _RESERVE_RANGE = 0.25, (0.05, 0.65)
_DROPPED_LATER = 0.0007
_RESERVE_RATE = 0.07  # per decision that dropped some
_RESERVE_MEMORY = 30  # timeouts: then most of what was learned is forgotten
_ESTIMATE_FORGET = 0.98  # per item


class State(Enum):
    """Where an item is. It only moves forward."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"  # answered, dropped or cancelled


@dataclass(eq=False, slots=True)
class Item:
    """One input on its way through the scheduler. `payload` is the caller's own."""

    arrived: float
    deadline: float  # absolute
    tokens: int  # an estimate until `ready` tells the truth; `offer` corrects it by past ones
    payload: Any = None
    group: Hashable | None = None  # None until `ready`
    state: State = State.WAITING
    started: float | None = None
    abandoned: bool = False  # running, but nobody waits for it any more
    estimate: int = 0  # what `tokens` was when it was offered
    priced: bool = False  # admitted because the cost said that there is time for it


class Drop(Enum):
    """Why an admitted item left the queue without running."""

    EXPIRED = "expired"  # its deadline passed
    HOPELESS = "hopeless"  # it could not be answered before its deadline


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request was not admitted."""

    reason: str  # for people
    retry_after: float | None  # seconds; None: unknown
    expired: bool = False  # its own time is too short, whatever the load


@dataclass(frozen=True, slots=True)
class Batch:
    """Items to run together, now."""

    items: tuple[Item, ...]
    reason: BatchReason
    left_waiting: int

    @property
    def tokens(self) -> int:
        """Useful tokens: the items' lengths, added up."""
        return sum(item.tokens for item in self.items)

    @property
    def padded_tokens(self) -> int:
        """Tokens that the model computes: items x longest."""
        return len(self.items) * max(item.tokens for item in self.items)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now. Without a batch: sleep until `wake_at`, or for ever if that is None."""

    batch: Batch | None = None
    wake_at: float | None = None
    dropped: tuple[tuple[Item, Drop], ...] = ()
    retry_after: float | None = None  # seconds, for the hopeless among the dropped; None: unknown


@dataclass(slots=True)
class Scheduler:
    """One queue in front of one model. Not thread-safe; the owner holds a lock around every call.

    `settings` may be replaced at any time and counts from the next call.
    """

    settings: Settings
    cost: CostModel = field(default_factory=CostModel)
    ceiling: Ceiling = field(default_factory=Ceiling)  # what has turned out not to fit into memory
    draining: bool = False
    _queue: list[Item] = field(default_factory=list)  # waiting, in order of arrival
    _queued_tokens: int = 0
    watchdog: Watchdog = field(default_factory=Watchdog)  # says when the cost is not to be trusted
    _running: Batch | None = None
    _reserve: float = _FIRST_RESERVE  # share of its time that an item must have to spare on admission
    _reserve_at: float = 0.0  # when it last changed
    _in_time: bool = False  # whether the running batch was expected to end in time
    _busy_until: float = 0.0  # predicted end of the running batch
    _last_finished: float | None = None
    _returning: Returning = field(default_factory=Returning)
    _expected: int = 0  # items present at once if everybody who was answered comes back
    _true_tokens: float = 0.0  # of recent items, and what they were estimated at
    _estimated_tokens: float = 0.0

    @property
    def queue_depth(self) -> int:
        """Items that wait."""
        return len(self._queue)

    @property
    def in_flight(self) -> int:
        """Items admitted and not yet answered: waiting and running."""
        return len(self._queue) + (len(self._running.items) if self._running else 0)

    # -- the door ------------------------------------------------------------------------------

    def offer(self, items: Sequence[Item], now: float) -> Refusal | None:
        """Admit all items, or none of them.

        The door does not look at the items' own lengths: a rule that does refuses the long ones
        first, which makes the counts pretty and the owners of long texts unhappy.
        """
        if self.draining:
            return Refusal("the server is stopping", None)
        first = items[0] if len(items) == 1 else min(items, key=_deadline)
        if self._is_too_short(first, now):
            return Refusal("its time is shorter than the model needs", None, expired=True)
        if len(self._queue) + len(items) > self.settings.max_queue_size:
            return Refusal("the queue is full", self.drain_time(now))
        # A language may have two characters to a token, and a text of long words seven.
        correction = self._true_tokens / self._estimated_tokens if self._estimated_tokens else 1.0
        priced = self.settings.drop_hopeless and self.cost.trusted and not self._may_probe(now)
        if priced:  # the last of them waits longest; its own length does not count
            tokens = correction * sum(map(_tokens, items[:-1]))
            wait = self._shortest_wait(now, len(items), tokens)
            if wait > (first.deadline - now) * (1 - self._reserve):
                self._follow_refusal(wait, now)
                return Refusal("it could not be answered in time", self.drain_time(now))
        self._returning.arrived(now, len(items))
        for item in items:
            bisect.insort(self._queue, item, key=_arrival)
            item.priced, item.estimate = priced, item.tokens
            item.tokens = max(1, round(item.tokens * correction))
            self._queued_tokens += item.tokens
        return None

    def drain_time(self, now: float) -> float | None:
        """Seconds that everything admitted so far is expected to take; None: unknown."""
        if not self.cost.observations:
            return None
        queued = self.cost.drain(
            len(self._queue), self._queued_tokens, self.settings.max_batch_size, self._limit_s
        )
        return self._rest(now) + queued

    def ready(self, item: Item, tokens: int, group: Hashable) -> None:
        """Tell the true length of a waiting item, and which items it may run with."""
        if item.state is State.WAITING:
            self._queued_tokens += tokens - item.tokens
            item.tokens, item.group = tokens, group
            self._true_tokens = self._true_tokens * _ESTIMATE_FORGET + tokens
            self._estimated_tokens = self._estimated_tokens * _ESTIMATE_FORGET + item.estimate

    def cancel(self, item: Item) -> bool:
        """Forget a waiting item; mark a running one. Returns whether it had not ended yet."""
        if item.state is State.WAITING:
            self._remove([item])
            item.state = State.DONE
            self.watchdog.item_gone(item)
            return True
        item.abandoned = item.abandoned or item.state is State.RUNNING
        return item.state is State.RUNNING

    # -- the decision ----------------------------------------------------------------------------

    def poll(self, now: float) -> Decision:
        """Decide what to do at `now`. Items that it drops are done when it returns."""
        if self._running:
            return Decision()
        expired = [item for item in self._queue if item.deadline <= now]
        self._remove(expired)
        hopeless: list[Item] = []
        decision = Decision()
        while anchor := self._next_anchor(now, hopeless):
            items, reason = self._choose(anchor, now)
            cost = self._reserve_s(_padded(items))
            if self._cannot_make_it(anchor, now + cost, now):
                self._remove([anchor])
                hopeless.append(anchor)
                continue
            # A companion in a greater hurry than the anchor stays behind rather than start in vain.
            items = [i for i in items if i is anchor or not self._cannot_make_it(i, now + cost, now)]
            wake_at = self._wait_until(items, reason, cost)
            if now < wake_at:
                decision = Decision(wake_at=wake_at)
            else:
                if self.draining:
                    reason = BatchReason.DRAIN
                elif reason is BatchReason.IDLE and self._everybody_is_back():
                    reason = BatchReason.ALL_PRESENT
                elif reason is BatchReason.IDLE and self.settings.max_wait_ms > 0:
                    reason = BatchReason.DEADLINE
                decision = Decision(batch=self._start(items, reason, now))
            break
        if not (expired or hopeless):
            return decision
        for item in (*expired, *hopeless):
            item.state = State.DONE
            self.watchdog.item_gone(item)
        if any(item.priced for item in hopeless):
            self._adapt_reserve(1, 1, now)
        # Less time than any call takes is the client's own limit, not the load.
        dropped = [(item, Drop.EXPIRED) for item in expired]
        for item in hopeless:
            too_short = self._is_too_short(item, item.arrived)
            dropped.append((item, Drop.EXPIRED if too_short else Drop.HOPELESS))
        return Decision(decision.batch, decision.wake_at, tuple(dropped), self.drain_time(now))

    def finished(self, now: float, *, ok: bool, started: float | None = None) -> str:
        """The running batch has ended. No effect if `evict` took it out meanwhile.

        Args:
            now: When it ended.
            ok: Whether the model answered; only such batches teach the cost model.
            started: When the forward itself began, if later than the decision.

        Returns:
            Why the learned cost was given up because of this batch; empty if it was not.
        """
        batch, self._running = self._running, None
        if batch is None:
            return ""
        for item in batch.items:
            item.state = State.DONE
            if not ok:
                self.watchdog.item_gone(item)
        self._last_finished = now
        self._expected = len(self._queue) + len(batch.items)
        self._returning.batch_ended(now, len(batch.items))
        begun = batch.items[0].started if started is None else started
        if ok and begun is not None:
            return self._learn(batch, now - begun, now)
        return ""

    def _learn(self, batch: Batch, seconds: float, now: float) -> str:
        """Let a batch that was answered correct the cost, or end the trust in it. Returns why it did."""
        self.cost.observe(batch.padded_tokens, seconds)
        # A batch that was kept small to try out its size says nothing about how fast the queue drains.
        tried = batch.reason is BatchReason.BUDGET and self.cost.grows(self._limit_s)
        if batch.left_waiting and not tried:
            sizes = len(batch.items), batch.tokens, batch.padded_tokens
            self.cost.observe_drain(*sizes, seconds, self.settings.max_batch_size, self._limit_s)
        for item in batch.items:
            self.watchdog.item_done(item, now)
        self._adapt_reserve(len(batch.items), 0, now)
        if self._in_time:
            self.watchdog.batch_done(late=2 * sum(i.deadline < now for i in batch.items) > len(batch.items))
        if why := self.watchdog.verdict(now):
            self.cost.relearn()
        return why

    def evict(self) -> list[Item]:
        """Take out everything that is waiting or running, oldest first. For crashes and for stop."""
        running = list(self._running.items) if self._running else []
        items = running + self._queue
        self._queue, self._queued_tokens, self._running = [], 0, None
        for item in items:
            item.state = State.DONE
            self.watchdog.item_gone(item)
        return items

    def unprepared(self) -> list[Item]:
        """The items to prepare before the next `poll`, oldest first.

        Only those that the next batch could hold: under a flood of arrivals, preparing them all
        would keep the model from ever running.
        """
        return [item for item in self._queue[: self._window()] if item.group is None]

    def token_budget(self) -> int:
        """Most padded tokens in one forward (`max_batch_tokens`, or what "auto" means now)."""
        limit = self.settings.max_batch_tokens
        return self.cost.budget(self._limit_s) if limit == "auto" else limit

    def doubt(self, now: float) -> str:
        """Why the learned cost is not used at present, in words for people; empty if it is."""
        return self.watchdog.reason(now)

    # -- inside ----------------------------------------------------------------------------------

    def _next_anchor(self, now: float, hopeless: list[Item]) -> Item | None:
        """The oldest item that alone could still be answered in time; those before it leave the queue."""
        anchor, gone = None, []
        for item in self._queue:
            if item.group is None:
                continue
            if not self._cannot_make_it(item, now + self._reserve_s(item.tokens), now):
                anchor = item
                break
            gone.append(item)
        self._remove(gone)
        hopeless += gone
        return anchor

    def _choose(self, anchor: Item, now: float) -> tuple[list[Item], BatchReason]:
        """The anchor and its company."""
        most, budget = self.settings.max_batch_size, self.token_budget()
        peers = [item for item in self._queue if item.group == anchor.group][: self._window()]
        if self.settings.group_by_length:
            items = group_by_length(peers, most, budget, self.cost.a, self.cost.b)
        else:
            items = fifo_prefix(peers, most, budget)
        chosen = len(items)
        while len(items) > 1 and _padded(items) > self.ceiling.limit(max(map(_tokens, items)), now):
            items.remove(max((item for item in reversed(items) if item is not anchor), key=_tokens))
        if len(items) < chosen:
            return items, BatchReason.BUDGET
        if len(items) == most:
            return items, BatchReason.FULL
        if (len(items) + 1) * max(item.tokens for item in items) > budget:
            return items, BatchReason.BUDGET
        return items, BatchReason.IDLE

    def _window(self) -> int:
        most = self.settings.max_batch_size
        return max(_WINDOW, most + min(most, _LONGEST_LOOK_AHEAD))

    @property
    def _limit_s(self) -> float:
        """Seconds that one forward may take."""
        return self.settings.timeout_s * _AUTO_SHARE

    def _rest(self, now: float) -> float:
        """Seconds until the running batch is expected to end."""
        return max(0.0, self._busy_until - now) if self._running else 0.0

    def _shortest_wait(self, now: float, items: int, tokens: float) -> float:
        """Seconds until the queue and so many more items could be done, at least."""
        most = self.settings.max_batch_size
        queued = self.cost.drain(
            len(self._queue) + items, self._queued_tokens + tokens, most, self._limit_s, at_least=True
        )
        return self._rest(now) + queued

    def _reserve_s(self, padded_tokens: float) -> float:
        """Seconds to keep for a forward: its 95th percentile.

        What that adds to the expected duration is bounded by the limit of a forward. A model that takes
        long now and then must not have everything refused because of it.
        """
        high = self.cost.high(padded_tokens)
        return min(high, max(self.cost.seconds(padded_tokens), self._limit_s)) if high else 0.0

    def _adapt_reserve(self, items: int, dropped: int, now: float) -> None:
        """Adapt the reserve to the outcome of `items` admitted items, of which `dropped` were hopeless.

        Stochastic gradient descent on the pinball loss, and exponential decay to the first value.
        """
        past = (now - self._reserve_at) / (_RESERVE_MEMORY * self.settings.timeout_s)
        self._reserve += (_FIRST_RESERVE - self._reserve) * -math.expm1(-past)
        self._reserve_at = now
        self._reserve += _RESERVE_RATE * (dropped - _DROPPED_LATER * items)
        self._reserve = min(max(self._reserve, _RESERVE_RANGE[0]), _RESERVE_RANGE[1])

    def _is_too_short(self, item: Item, now: float) -> bool:
        """Whether its client gives an item less time, from `now`, than any model call takes."""
        left = item.deadline - now
        if left <= 0:
            return True
        # The server's own timeout is too short for a model that has become slow: that is no mistake of the
        # client. The difference of two times may be a rounding error below it.
        asked = item.deadline - item.arrived < self.settings.timeout_s * (1 - 1e-6)
        sure = self.settings.drop_hopeless and self.cost.trusted and not self._may_probe(now)
        return asked and sure and left < self.cost.seconds(1)

    def _follow_refusal(self, wait: float, now: float) -> None:
        """Let the watchdog find out whether the wait would have been so long."""
        if self._queue:
            queued = self._shortest_wait(now, 0, 0)
            self.watchdog.refused(self._queue, queued, wait - queued, now)

    def _cannot_make_it(self, item: Item, end: float, now: float) -> bool:
        return self.settings.drop_hopeless and item.deadline < end and not self._may_probe(now)

    def _may_probe(self, now: float) -> bool:
        """Whether the cost is too old to refuse anybody by it.

        A server that believes itself too slow for every deadline would refuse everybody, run
        nothing, and so never learn that it has become fast again. One try per timeout finds out.
        """
        if self._running:
            return False
        return self._last_finished is None or now - self._last_finished > self.settings.timeout_s

    def _wait_until(self, items: list[Item], reason: BatchReason, cost: float) -> float:
        """When this batch has to start at the latest."""
        if reason is not BatchReason.IDLE or self.draining or self._everybody_is_back():
            return 0.0
        due = items[0].arrived + self.settings.max_wait_s
        # Where the cut by length leaves some behind anyway, more company saves no call.
        if self._last_finished is not None and self._lingers() and len(items) == len(self._queue):
            due = max(due, self._last_finished + self._returning.gap)
        for item in items:  # somebody with less time than max_wait_ms must not wait himself to death
            reserve = cost or (item.deadline - item.arrived) / 2
            due = min(due, max(item.arrived, item.deadline - reserve))
        return due

    def _lingers(self) -> bool:
        """Whether clients come back so soon after a batch that it pays to wait for them."""
        return self.cost.known and self._returning.worth_waiting(self.cost.a)

    def _everybody_is_back(self) -> bool:
        return self._lingers() and 0 < self._expected <= len(self._queue)

    def _start(self, items: list[Item], reason: BatchReason, now: float) -> Batch:
        self._remove(items)
        for item in items:
            item.state, item.started = State.RUNNING, now
        self._running = Batch(tuple(items), reason, len(self._queue))
        end = now + self.cost.seconds(self._running.padded_tokens)
        self._in_time = self.cost.known and all(item.deadline >= end for item in items)
        self._busy_until = end
        return self._running

    def _remove(self, items: Sequence[Item]) -> None:
        if items:
            gone = set(map(id, items))
            self._queued_tokens -= sum(item.tokens for item in items)
            self._queue = [item for item in self._queue if id(item) not in gone]


def fifo_prefix(items: Sequence[Item], most: int, budget: int) -> list[Item]:
    """The oldest items that fit together: at most `most`, at most `budget` padded tokens.

    A single item always fits.
    """
    batch: list[Item] = []
    longest = 0
    for item in items[:most]:
        longest = max(longest, item.tokens)
        if batch and longest * (len(batch) + 1) > budget:
            break
        batch.append(item)
    return batch


def group_by_length(items: Sequence[Item], most: int, budget: int, a: float, b: float) -> list[Item]:
    """The company of `items[0]` in the cheapest cut of `items` into batches.

    With a cost a + b * n * longest that grows with both, some cheapest cut is contiguous in the
    items sorted by length. While nothing is known about the cost
    (a = b = 0), or a token costs nothing, this is plain FIFO.

    Args:
        items: Waiting items in order of arrival, all of one group; not empty.
        most: Items per batch.
        budget: Padded tokens per batch; a single item always fits.
        a: Seconds per batch.
        b: Seconds per padded token.
    """
    if b <= 0:
        return fifo_prefix(items, most, budget)
    by_length = sorted(items, key=_tokens)  # stable: equal lengths stay in order of arrival
    if by_length[0].tokens == by_length[-1].tokens:
        return fifo_prefix(items, most, budget)  # the fuller, the cheaper
    cuts = cheapest_cuts([item.tokens for item in by_length], most, budget, a, b)
    anchor = by_length.index(items[0])
    end = len(by_length)
    while end - cuts[end] > anchor:
        end -= cuts[end]
    part = by_length[end - cuts[end] : end]
    # A cut may fall between items of equal length and take the younger ones. Swap: same cost, fair.
    wanted = Counter(item.tokens for item in part)
    batch = []
    for item in items:
        if wanted[item.tokens]:
            wanted[item.tokens] -= 1
            batch.append(item)
    return batch


def cheapest_cuts(lengths: Sequence[int], most: int, budget: int, a: float, b: float) -> list[int]:
    """For every prefix of ascending `lengths`, the size of the last batch in its cheapest cut.

    The cost of a batch from `start` to `end` satisfies the quadrangle inequality, because lengths
    ascend: the best start never moves back as the end moves on. So each start is the best one for a
    range of ends, and O(n log n) steps find the ranges (Hirschberg and Larmore 1987, the least weight
    subsequence). A start that is too far back for `most` or `budget` stays so for all later ends.
    """
    totals, cuts = [0.0], [0]

    def total(start: int, end: int) -> float:
        size = end - start
        if size > most or (size > 1 and size * lengths[end - 1] > budget):
            return math.inf
        return totals[start] + a + b * size * lengths[end - 1]

    best: deque[tuple[int, int]] = deque([(0, 1)])  # starts, and the first end for which each is the best
    for end in range(1, len(lengths) + 1):
        while len(best) > 1 and best[1][1] <= end:
            best.popleft()
        start = best[0][0]
        totals.append(total(start, end))
        cuts.append(end - start)
        # A batch that starts here is the best from some end on: ranges are taken over from the back.
        high = len(lengths) + 1
        while best[-1][1] > end and total(end, best[-1][1]) <= total(best[-1][0], best[-1][1]):
            high = best.pop()[1]
        low = max(best[-1][1], end + 1)
        while low < high:
            middle = (low + high) // 2
            if total(end, middle) <= total(best[-1][0], middle):
                high = middle
            else:
                low = middle + 1
        if low <= len(lengths):
            best.append((end, low))
    return cuts


def _arrival(item: Item) -> float:
    return item.arrived


def _deadline(item: Item) -> float:
    return item.deadline


def _tokens(item: Item) -> int:
    return item.tokens


def _padded(items: Sequence[Item]) -> int:
    return len(items) * max(item.tokens for item in items)
