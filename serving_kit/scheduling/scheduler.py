"""What runs next: pure decisions of explicit time.

No threads, no clock, no asyncio: every method takes `now`, in seconds on any monotonic clock. The same
object runs in production, in property tests and in the simulator.

    offer(items, now)  ->  None, or Rejected             admission
    ready(item, ...)                                      its length and key are known now
    poll(now)          ->  Decision: a batch, or when to look again; and what was dropped
    finished(now)                                         the step has ended
    cancel(item)                                          its client has left

The rules, in the order in which they decide:

1. An idle model starts at once, unless `max_wait_ms` asks to wait; that wait counts from the oldest item's
   arrival and nothing restarts it. While the model is busy no batch is chosen, so it keeps growing. After a
   batch, clients that were seen to come back at once get that moment (`closed_loop.py`); once all are back,
   nothing is waited for.
2. The oldest live item is in every batch, so none starves. Items of another key never join it.
3. The other items are chosen by length: the cheapest cut of the waiting items into batches (`grouping.py`).
   Where the model packs they are the next oldest, and fewer where one more would make another late.
4. An item that is expired, or cannot be answered in time by its own batch, never starts. Of an item that
   takes many steps only the deadline counts.
5. Items that go on after a step are in every following step that has room for them, the oldest first. Waiting
   ones join them where sequences and tokens allow it, the oldest first, and without making the step too long
   for one that has joined. If the oldest has another key, none joins until it can start. Items of which a
   step may compute a part are chosen by `sequences.py`.

Not here: sleeping and threads (`batching.py`), what follows from a failure (`engine.py`).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from serving_kit.failures.memory_limit import MemoryLimit
from serving_kit.items import Item, ItemState, computed, longest
from serving_kit.model import PADDED, Layout, Limit
from serving_kit.records import BatchReason, Drop
from serving_kit.scheduling.admission import Admission, QueueState, Rejected, step_limit_s, token_limit
from serving_kit.scheduling.closed_loop import ClosedLoop
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.grouping import fifo_prefix, group_by_length
from serving_kit.scheduling.pace import LEAST, Pace
from serving_kit.scheduling.sequences import Share, advance, decodes
from serving_kit.scheduling.watchdog import Watchdog
from serving_kit.settings import Settings

# Grouping looks at the oldest items only: 0.4 ms for 96, and the gain beyond is small (a window of two full
# batches on a GPU, where batches are large).
_WINDOW = 96
_CACHE_KEPT, _CACHE_BOUND_S = 0.75, 300.0  # share of the cached tokens, and how long that is a bound
_MOST_TOKENS = 1 << 30  # in a step, where nothing else bounds it
_LONGEST_LOOK_AHEAD = 256  # items beyond `max_batch_size`, however large that is


@dataclass(frozen=True, slots=True)
class Batch:
    """Items of one step."""

    items: tuple[Item, ...]
    reason: BatchReason
    left_waiting: int
    tokens: int  # useful ones: the items' lengths, added up
    computed_tokens: int
    decoded: int = 0  # items that get their next token without a part of their prompt
    divisible: bool = False  # whether items could be in it with a part of their tokens


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now. Without a batch: look again at `wake_at`, or if that is None when something happens."""

    batch: Batch | None = None
    wake_at: float | None = None
    dropped: tuple[tuple[Item, Drop], ...] = ()
    retry_after_s: float | None = None  # for the hopeless among the dropped; None: unknown
    evicted: tuple[Item, ...] = ()  # that give their caches back before anything else runs


@dataclass(frozen=True, slots=True)
class _Choice:
    """Items that may start, when, and why then."""

    items: list[Item]
    reason: BatchReason
    at: float = 0.0
    shares: Sequence[Share] = ()  # of items of which a step may compute a part
    evicted: Sequence[Item] = ()  # that give their caches back first


class Scheduler:
    """One queue in front of one model. Not thread-safe: the owner holds a lock around every call.

    Args:
        settings: May be replaced at any time; counts from the next call.
        cost: The learned cost at first, of a model of this layout.
        layout: Whether the model packs the items of a step.
        cache: What "auto" means for `max_cache_tokens`; None: the model has no caches.

    Attributes:
        draining: Whether new items are refused, and nothing is waited for.
        memory_limit: What has turned out not to fit into memory.
    """

    def __init__(
        self,
        settings: Settings,
        cost: CostModel | None = None,
        layout: Layout = PADDED,
        cache: Limit | None = None,
    ) -> None:
        self.settings = settings
        self.layout = layout
        self.pace = Pace()
        self._cache = cache
        self._cache_bound, self._cache_bound_until = math.inf, 0.0  # tokens of caches that did fit lately
        self.cost = cost or CostModel(packed=layout.packed)
        assert self.cost.packed is layout.packed, "a cost of another layout. This is a bug."
        self.memory_limit = MemoryLimit(packed=layout.packed)
        self.draining = False
        self._watchdog = Watchdog()
        self._admission = Admission(self.cost, self._watchdog)
        self._closed_loop = ClosedLoop()
        self._queue: list[Item] = []  # waiting, in order of arrival
        self._queued_tokens = 0
        self._continuing: list[Item] = []  # between two of their steps and not in this one, by arrival
        self._running: Batch | None = None
        self._in_time = False  # whether the running step was expected to end in time
        self._busy_until = 0.0  # expected end of the running step
        self._last_finished: float | None = None
        self._expected = 0  # items present at once if all clients that were answered come back

    @property
    def queue_depth(self) -> int:
        """Items that wait."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Items that have begun and not ended."""
        return (len(self._running.items) if self._running else 0) + len(self._continuing)

    @property
    def in_flight(self) -> int:
        """Items admitted and not yet ended: waiting and running."""
        return len(self._queue) + self.running

    # -- admission ---------------------------------------------------------------------------------

    def offer(self, items: Sequence[Item], now: float) -> Rejected | None:
        """Admit all items, or none of them."""
        if self.draining:
            return Rejected("the server is stopping", None, stopping=True)
        rejected = self._admission.reject(items, self._queue, self._queue_state(now), self.settings, now)
        if rejected is not None:
            return rejected
        self._closed_loop.arrived(now, len(items))
        for item in items:
            bisect.insort(self._queue, item, key=_arrival)
            self._queued_tokens += item.tokens
        return None

    def drain_s(self, now: float) -> float | None:
        """Seconds that everything admitted so far is expected to take; None: unknown."""
        return self._admission.drain_s(self._queue_state(now), self.settings)

    def ready(
        self, item: Item, tokens: int, key: Hashable, *, divisible: bool = False, context_tokens: int = 0
    ) -> None:
        """Tell what is now known of a waiting item.

        Args:
            item: The item.
            tokens: Of its first step.
            key: Items share a step only if theirs are equal.
            divisible: Whether a step may compute only the first of its tokens.
            context_tokens: That its cache takes over from another one in its first step.
        """
        if item.state is ItemState.WAITING:
            self._queued_tokens += tokens - item.tokens
            item.tokens, item.key, item.divisible = tokens, key, divisible
            item.context_tokens = context_tokens
            self._admission.prepared(item)

    def cancel(self, item: Item) -> bool:
        """End a waiting item, or one between two steps; mark one in the running step.

        Returns:
            Whether it had not ended yet.
        """
        if item.state is ItemState.DONE:
            return False
        if item.state is ItemState.WAITING:
            self._remove([item])
        elif self._running is not None and item in self._running.items:
            item.cancelled = True
            return True
        item.cancelled = item.state is ItemState.RUNNING
        self._end([item])
        return True

    def evict(self) -> list[Item]:
        """End everything that is waiting or running, oldest first. For crashes and for stop."""
        running = self._running.items if self._running else ()
        items = sorted([*self._continuing, *running], key=_arrival) + self._queue
        self._queue, self._queued_tokens, self._running, self._continuing = [], 0, None, []
        self._end(items)
        return items

    def unprepared(self) -> list[Item]:
        """The items to prepare before the next `poll`, oldest first.

        Only those that the next batch could hold: under a flood of arrivals, preparing them all would keep
        the model from running.
        """
        window = self._window()
        if self._continuing and self._continuing[0].divisible:  # their next tokens wait meanwhile
            window = max(1, self.settings.max_batch_size - len(self._continuing))
        return [item for item in self._queue[:window] if item.key is None]

    # -- the decision --------------------------------------------------------------------------------

    def poll(self, now: float) -> Decision:
        """Decide what to do at `now`. Items that it drops are done when it returns."""
        if self._running:
            return Decision()
        expired = [item for item in (*self._continuing, *self._queue) if item.deadline <= now]
        self._remove(expired)
        self._end(expired)
        hopeless: list[Item] = []
        choice = self._go_on(now, hopeless) if self._continuing else self._choose_first(now, hopeless)
        decision = Decision()
        if choice is not None and choice.evicted:
            decision = Decision(evicted=self._evict(choice.evicted))
        elif choice is not None:
            due = now >= choice.at
            decision = Decision(self._start(choice, now)) if due else Decision(wake_at=choice.at)
        if not (expired or hopeless):
            return decision
        dropped = [(item, Drop.EXPIRED) for item in expired] + self._drop(hopeless, now)
        return dataclasses.replace(decision, dropped=tuple(dropped), retry_after_s=self.drain_s(now))

    def finished(
        self, now: float, *, ok: bool, started: float | None = None, continuing: Iterable[Item] = ()
    ) -> str:
        """The running step has ended. No effect if `evict` took it out meanwhile.

        Args:
            now: When it ended.
            ok: Whether the model answered; only such steps teach the cost model.
            started: When the model call itself began, if later than the decision.
            continuing: Its items that go on in the next step, with the `tokens` of that.

        Returns:
            Why the learned cost was released because of this step; empty if it was not.
        """
        batch, self._running = self._running, None
        if batch is None:
            return ""
        continuing = list(continuing)
        go_on = [item for item in continuing if not item.cancelled and item.state is ItemState.RUNNING]
        ended = list(batch.items)
        if go_on:
            alive = set(go_on)
            ended = [item for item in batch.items if item not in alive]
            self._continuing = sorted([*self._continuing, *go_on], key=_arrival)
        begun = batch.items[0].started if started is None else started
        if ok and started is not None and batch.divisible:
            self.pace.observe(batch.decoded, batch.tokens - batch.decoded, now - started)
        # One step says little about what takes many: `pace` learns from those.
        many = bool(continuing) or batch.divisible or batch.reason is BatchReason.CONTINUED
        teaches = ok and begun is not None and not many
        for item in ended:
            item.state = ItemState.DONE
            if not teaches:
                self._watchdog.item_gone(item)
        self._last_finished = now
        if ended:
            self._expected = len(self._queue) + len(ended)
            self._closed_loop.batch_ended(now, len(ended))
        if not teaches or begun is None:
            return ""
        return self._learn(batch, now - begun, now)

    def token_budget(self) -> int:
        """Most computed tokens in one step (`max_batch_tokens`, or what "auto" means now)."""
        limit = self.settings.max_batch_tokens
        return self.cost.budget(step_limit_s(self.settings)) if limit == "auto" else limit

    def cache_limit(self) -> Limit | None:
        """Most tokens in all caches (`max_cache_tokens`, or what "auto" means); None: there are no caches."""
        limit = self.settings.max_cache_tokens
        if self._cache is None or limit == "auto":
            return self._cache
        return Limit(limit, "max_cache_tokens")

    def caches_exceeded(self, now: float) -> None:
        """A step of sequences did not fit into memory: for a while the caches hold less than they do now."""
        self._cache_bound = max(1.0, _CACHE_KEPT * self.cached_tokens())
        self._cache_bound_until = now + _CACHE_BOUND_S

    def cached_tokens(self) -> int:
        """Tokens that the caches of all sequences hold, as of their last steps."""
        running = self._running.items if self._running else ()
        return sum(item.context_tokens for item in (*self._continuing, *running))

    def degraded_reason(self, now: float) -> str:
        """Why the learned cost is not used at present; empty if it is."""
        return self._watchdog.reason(now)

    # -- inside ----------------------------------------------------------------------------------

    def _choose_first(self, now: float, hopeless: list[Item]) -> _Choice | None:
        """The next batch of an idle model, when it starts and why; None: nothing can start."""
        queue = self._queue_state(now)
        while anchor := self._next_anchor(now, hopeless):
            if anchor.divisible:
                return self._advance(anchor, now)
            items, reason = self._group(anchor, now)
            cost_s = self._admission.reserve_s(self._computed(items), self.settings)
            if self._admission.cannot_finish(anchor, now + cost_s, queue, self.settings):
                self._remove([anchor])
                hopeless.append(anchor)
                continue
            # An item whose deadline is before the end of this step waits for another one.
            items = [
                item
                for item in items
                if item is anchor
                or not self._admission.cannot_finish(item, now + cost_s, queue, self.settings)
            ]
            at = self._wait_until(items, reason, cost_s)
            return _Choice(items, self._reason(reason), at)
        return None

    def _go_on(self, now: float, hopeless: list[Item]) -> _Choice:
        """The next step of the items that go on, with those that join them."""
        if self._continuing[0].divisible:
            return self._advance(self._next_anchor(now, hopeless), now)
        most, queue, budget = self.settings.max_batch_size, self._queue_state(now), self.token_budget()
        items = self._continuing[:most]
        while len(items) > 1 and (self._computed(items) > budget or not self._fits(items, now)):
            items = items[:-1]  # the newest waits for the next step
        going_on = items
        # What goes on comes before what is new.
        complete = len(items) == len(self._continuing) < most
        anchor = self._next_anchor(now, hopeless) if complete else None
        if anchor is None or anchor.key != items[0].key:
            return _Choice(items, BatchReason.CONTINUED)
        for item in self._queue[: self._window()]:
            joined = [*items, item]
            if len(items) == most or item.key != anchor.key or self._computed(joined) > budget:
                break
            if not self._fits(joined, now):
                break
            end = now + self._admission.reserve_s(self._computed(joined), self.settings)
            new = joined[len(going_on) :]  # one that joins must not make the step too long for another
            if not any(self._admission.cannot_finish(each, end, queue, self.settings) for each in new):
                items = joined
        return _Choice(items, BatchReason.CONTINUED)

    def _advance(self, anchor: Item | None, now: float) -> _Choice:
        """The next step of sequences, of whose prompts it may compute a part.

        Args:
            anchor: The oldest that waits; None: there is none.
            now: The time.
        """
        running, limit = self._continuing, self.settings.max_batch_tokens
        waiting: list[Item] = []
        if anchor is not None:
            first = self._queue.index(anchor)
            key = running[0].key if running else anchor.key
            prepared = self._queue[first : first + self._window()]
            waiting = list(itertools.takewhile(lambda item: item.key == key, prepared))
        most, cache = self.settings.max_batch_size, self.cache_limit()
        chunk = self.pace.chunk(
            self.settings.inter_token_target_s, decoding=any(decodes(item) for item in running)
        )
        bound = self._cache_bound if now < self._cache_bound_until else math.inf
        plan = advance(
            running,
            waiting,
            most=most,
            budget=_MOST_TOKENS if limit == "auto" else limit,
            # What did not fit bounds prompts only: the next tokens of all sequences are few.
            chunk=int(min(chunk, max(LEAST, self.memory_limit.limit(0, now)))),
            cache=min(bound, math.inf if cache is None else cache.value),
        )
        items = [share.item for share in plan.shares]
        if running:
            return _Choice(items, BatchReason.CONTINUED, 0.0, plan.shares, plan.evicted)
        reason = BatchReason.FULL if len(items) == most else BatchReason.IDLE
        return _Choice(items, self._reason(reason), self._wait_until(items, reason, 0.0), plan.shares)

    def _evict(self, items: Sequence[Item]) -> tuple[Item, ...]:
        """Note that these sequences give their caches back, and are computed again."""
        for item in items:
            item.tokens, item.context_tokens = item.context_tokens + item.tokens, 0
        return tuple(items)

    def _next_anchor(self, now: float, hopeless: list[Item]) -> Item | None:
        """The oldest item that alone could still be answered in time; those before it leave the queue."""
        anchor, gone, queue = None, [], self._queue_state(now)
        for item in self._queue:
            if item.key is None:
                continue
            # Of what takes many steps it is not known how long they take.
            reserve_s = 0.0 if item.divisible else self._admission.reserve_s(item.tokens, self.settings)
            if not self._admission.cannot_finish(item, now + reserve_s, queue, self.settings):
                anchor = item
                break
            gone.append(item)
        self._remove(gone)
        hopeless += gone
        return anchor

    def _group(self, anchor: Item, now: float) -> tuple[list[Item], BatchReason]:
        """The anchor, the items to run with it, and what bounds their number."""
        most, budget = self.settings.max_batch_size, self.token_budget()
        peers = [item for item in self._queue if item.key == anchor.key][: self._window()]
        if self.layout.packed:
            return self._pack(peers, most, budget, now)
        if self.settings.group_by_length:
            items = group_by_length(peers, most, budget, self.cost.a, self.cost.b)
        else:
            items = fifo_prefix(peers, most, budget)
        chosen = len(items)
        while len(items) > 1 and not self._fits(items, now):
            items.remove(max((item for item in reversed(items) if item is not anchor), key=_tokens))
        if len(items) < chosen:
            return items, BatchReason.BUDGET
        if len(items) == most:
            return items, BatchReason.FULL
        if (len(items) + 1) * longest(items) > budget:
            return items, BatchReason.BUDGET
        return items, BatchReason.IDLE

    def _pack(
        self, peers: Sequence[Item], most: int, budget: int, now: float
    ) -> tuple[list[Item], BatchReason]:
        """The oldest of `peers` that fit together, and what bounds their number.

        Fewer where one more would make one of them late. What would be late itself is passed over.
        """
        queue, bound = self._queue_state(now), min(budget, self.memory_limit.limit(0, now))
        items, tokens = [peers[0]], peers[0].tokens
        urgent = peers[0]  # which of them has the earliest deadline
        for item in peers[1:]:
            if len(items) == most:
                return items, BatchReason.FULL
            if tokens + item.tokens > bound:
                return items, BatchReason.BUDGET
            end = now + self._admission.reserve_s(tokens + item.tokens, self.settings)
            if self._admission.cannot_finish(item, end, queue, self.settings):
                continue
            if self._admission.cannot_finish(urgent, end, queue, self.settings):
                return items, BatchReason.BUDGET
            items.append(item)
            tokens += item.tokens
            urgent = min(urgent, item, key=_deadline)
        if len(items) == most:
            return items, BatchReason.FULL
        is_full = tokens + tokens / len(items) > bound  # one more of their mean length
        return items, BatchReason.BUDGET if is_full else BatchReason.IDLE

    def _computed(self, items: Sequence[Item]) -> int:
        return computed(items, packed=self.layout.packed)

    def _fits(self, items: Sequence[Item], now: float) -> bool:
        """Whether these items together are known to fit into memory, or nothing is known."""
        return self._computed(items) <= self.memory_limit.limit(longest(items), now)

    def _reason(self, bound: BatchReason) -> BatchReason:
        """Why a batch is sent that `bound` limits."""
        if self.draining:
            return BatchReason.DRAIN
        if bound is BatchReason.IDLE and self._all_clients_back():
            return BatchReason.ALL_PRESENT
        if bound is BatchReason.IDLE and self.settings.max_wait_ms > 0:
            return BatchReason.DEADLINE
        return bound

    def _wait_until(self, items: list[Item], reason: BatchReason, cost_s: float) -> float:
        """When this batch has to start at the latest."""
        if reason is not BatchReason.IDLE or self.draining or self._all_clients_back():
            return 0.0
        due = items[0].arrived + self.settings.max_wait_s
        # Where the cut by length leaves some behind anyway, more items save no call.
        if self._last_finished is not None and self._lingers() and len(items) == len(self._queue):
            due = max(due, self._last_finished + self._closed_loop.gap)
        for item in items:  # an item with less time than max_wait_ms must not expire while it waits
            reserve_s = cost_s or (item.deadline - item.arrived) / 2
            due = min(due, max(item.arrived, item.deadline - reserve_s))
        return due

    def _lingers(self) -> bool:
        """Whether clients come back so soon after a batch that it pays to wait for them."""
        return self.cost.known and self._closed_loop.worth_waiting(self.cost.a)

    def _all_clients_back(self) -> bool:
        return self._lingers() and 0 < self._expected <= len(self._queue)

    def _start(self, choice: _Choice, now: float) -> Batch:
        self._remove(choice.items)
        if self._continuing:
            chosen = set(choice.items)
            self._continuing = [item for item in self._continuing if item not in chosen]
        for item in choice.items:
            if item.state is ItemState.WAITING:
                item.state, item.started = ItemState.RUNNING, now
        decoded = sum(item.token_at is not None and item.tokens == 1 for item in choice.items)
        for item, tokens in choice.shares:
            item.tokens = tokens
        self._running = batch = Batch(
            tuple(choice.items),
            choice.reason,
            len(self._queue),
            sum(item.tokens for item in choice.items),
            self._computed(choice.items),
            decoded,
            bool(choice.shares),
        )
        end = now + self.cost.seconds(batch.computed_tokens)
        self._in_time = self.cost.known and all(item.deadline >= end for item in batch.items)
        self._busy_until = end
        return batch

    def _drop(self, hopeless: list[Item], now: float) -> list[tuple[Item, Drop]]:
        """End the items that cannot be answered in time, with what that says about each."""
        self._end(hopeless)
        if priced := sum(item.priced for item in hopeless):
            counted = priced if self.layout.packed else 1
            self._admission.adapt(counted, counted, self.settings, now)
        queue, dropped = self._queue_state(now), []
        for item in hopeless:  # less time than any step takes is the client's own limit, not the load
            too_short = self._admission.is_too_short(item, queue, self.settings, item.arrived)
            dropped.append((item, Drop.EXPIRED if too_short else Drop.HOPELESS))
        return dropped

    def _learn(self, batch: Batch, seconds: float, now: float) -> str:
        """Let an answered batch correct the cost, or release it. Returns why it was released."""
        limit_s, most = step_limit_s(self.settings), self.settings.max_batch_size
        tokens, computed_tokens = batch.tokens, batch.computed_tokens
        self.cost.observe(computed_tokens, seconds)
        # A batch that was kept small to try out its size says nothing about how fast the queue drains.
        tried = batch.reason is BatchReason.BUDGET and self.cost.grows(limit_s)
        if batch.left_waiting and not tried:
            budget = token_limit(self.settings, self.cost)
            self.cost.observe_drain(len(batch.items), tokens, computed_tokens, seconds, most, limit_s, budget)
        for item in batch.items:
            self._watchdog.item_done(item, now)
        late = sum(item.deadline < now for item in batch.items)
        lost = sum(item.priced and item.deadline < now for item in batch.items) if self.layout.packed else 0
        self._admission.adapt(len(batch.items), lost, self.settings, now)
        if self._in_time:
            self._watchdog.batch_done(late=2 * late > len(batch.items))
        if why := self._watchdog.assess(now):
            self.cost.relearn()
        return why

    def _queue_state(self, now: float) -> QueueState:
        running, last = self._running, self._last_finished
        rest_s = max(0.0, self._busy_until - now) if running else 0.0
        # With a learned cost that is too high everything would be rejected, nothing would run, and the cost
        # would never be corrected. So one request for each timeout is admitted all the same.
        stale = not running and (last is None or now - last > self.settings.timeout_s)
        return QueueState(len(self._queue), self._queued_tokens, rest_s, stale)

    def _window(self) -> int:
        most = self.settings.max_batch_size
        return max(_WINDOW, most + min(most, _LONGEST_LOOK_AHEAD))

    def _end(self, items: Iterable[Item]) -> None:
        """They are done without an answer of the model."""
        for item in items:
            if item.state is ItemState.RUNNING and item in self._continuing:
                self._continuing.remove(item)
            item.state = ItemState.DONE
            self._watchdog.item_gone(item)

    def _remove(self, items: Sequence[Item]) -> None:
        """Take items out of the queue."""
        gone = {id(item) for item in items if item.state is ItemState.WAITING}
        if gone:
            self._queued_tokens -= sum(item.tokens for item in items if id(item) in gone)
            self._queue = [item for item in self._queue if id(item) not in gone]


def _arrival(item: Item) -> float:
    return item.arrived


def _deadline(item: Item) -> float:
    return item.deadline


def _tokens(item: Item) -> int:
    return item.tokens
