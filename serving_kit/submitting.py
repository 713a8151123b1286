"""From the inputs of a request to what it waits for: items of its own, or the item of an equal input.

    inputs ──▶ equal to one in flight ── join ──▶ Member ─┐
           └─▶ the first of its kind ── submit ─▶ Item ───┴─ one end ──▶ every member's own job

Followers (members beyond the first) take no room in the queue. There are at most `max_queue_size` of them: a
request that could exceed that is queued like any other. A stream never shares its item.

Loop thread only. Not here: the table (`sharing.py`), the queue (`batching.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from serving_kit.batching import Batcher
from serving_kit.errors import ModelFailed, error_text
from serving_kit.events import Chunk, Done, End, Event, Failed
from serving_kit.items import Item
from serving_kit.jobs import Job
from serving_kit.model import Input
from serving_kit.plain import canonical, copied
from serving_kit.sharing import Member, SharingTable, seen_from

Waiting = Item | Member[Job]  # the `payload` of each is a job


class Submitted(NamedTuple):
    """What one request waits for."""

    waiting: Sequence[Waiting]  # one for each input, in order
    shared: int = 0  # inputs that were not queued, because they joined an equal one


class Submitter:
    """Submits inputs to a batcher; equal ones share an item where the caller allows it."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._table = SharingTable[Job]()

    def submit(
        self, inputs: Sequence[Input], *, arrived: float, deadline: float, share: bool = False
    ) -> Submitted:
        """Queue every input, or let it join an equal one in flight: all or none.

        Args:
            inputs: What to run.
            arrived: When the request did, in seconds on the clock.
            deadline: When an answer is no longer of use.
            share: Whether equal inputs have the same answer, and may share it.

        Raises:
            ServingError: as `Batcher.submit` does.
        """
        room = self._batcher.settings.max_queue_size - self._table.followers
        if not share or room < len(inputs):
            return Submitted(self._batcher.submit(inputs, arrived=arrived, deadline=deadline))
        self._batcher.open_model()  # what joins is refused as well
        loop = asyncio.get_running_loop()
        members = [Member(Job(loop.create_future()), arrived, deadline) for _ in inputs]
        try:
            fresh = self._join_all(inputs, members)
            self._queue(fresh, inputs, members)
        except BaseException:
            self.cancel(members)
            raise
        return Submitted(members, len(inputs) - len(fresh))

    def cancel(self, waiting: Sequence[Waiting]) -> None:
        """Their client has left: an item that no other client waits for is cancelled."""
        items = []
        for each in waiting:
            if isinstance(each, Item):
                items.append(each)
            elif (left := self._table.leave(each)) is None:
                continue
            elif left.deadline is None:
                items.append(left.item)
            else:
                self._batcher.shorten(left.item, left.deadline)
        if items:
            self._batcher.cancel(items)

    def _join_all(self, inputs: Sequence[Input], members: Sequence[Member[Job]]) -> dict[Hashable, list[int]]:
        """Let inputs join equal ones in flight. Returns the indices of the others by their keys."""
        fresh: dict[Hashable, list[int]] = {}
        for index, (given, member) in enumerate(zip(inputs, members, strict=True)):
            key = canonical(*given)
            if key is None:
                fresh[object()] = [index]
            elif key in fresh or not self._joined(key, member):
                fresh.setdefault(key, []).append(index)
        return fresh

    def _joined(self, key: Hashable, member: Member[Job]) -> bool:
        item = self._table.find(key)
        if item is None or not self._batcher.prolong(item, member.deadline):
            return False
        self._table.join(key, member)
        return True

    def _queue(
        self, fresh: dict[Hashable, list[int]], inputs: Sequence[Input], members: Sequence[Member[Job]]
    ) -> None:
        """Queue one item for each key, and let its members wait for it."""
        if not fresh:
            return
        first = members[0]
        own = [inputs[indices[0]] for indices in fresh.values()]
        items = self._batcher.submit(own, arrived=first.arrived, deadline=first.deadline)
        for (key, indices), item in zip(fresh.items(), items, strict=True):
            item.payload = _Fan(self._table, item)  # no event can have come: they come on this thread
            self._table.open(key, item)
            for index in indices:
                self._table.join(key, members[index])


class _Fan:
    """In the place of the job of a shared item: passes its end on to every member's own job."""

    __slots__ = ("_item", "_table")

    def __init__(self, table: SharingTable[Job], item: Item) -> None:
        self._table, self._item = table, item

    def emit(self, event: Event) -> None:
        """Pass an end on. A chunk has no reader: whoever shares waits for the whole answer."""
        if isinstance(event, Chunk):
            return
        for number, member in enumerate(self._table.end(self._item)):
            own = seen_from(member.arrived, event, self._item.arrived)
            member.payload.emit(own if number == 0 else _with_own_answer(own))


def _with_own_answer(end: End) -> End:
    """An end whose answer can be changed without changing that of another client."""
    if isinstance(end, Failed):
        return end
    try:
        return Done(copied(end.value), end.queue_wait_s, end.model_time_s)
    except Exception as error:
        failed = ModelFailed("the answer cannot be copied", detail=error_text(error))
        return Failed(failed, end.queue_wait_s, end.model_time_s)
