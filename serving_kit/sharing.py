"""Which requests wait for which computation: equal inputs in flight share one. Pure: no clock, no asyncio.

    open(key, item) ──▶ join(key, member) ... leave(member) ... ──▶ end(item) ──▶ the members that are left

A computation belongs to all its members alike. The one that began it has no special part: when it leaves, the
computation goes on for the others, until the latest of their deadlines. When the last one leaves, it is
cancelled.

Not here: the queue (`batching.py`), what is equal (`plain.py`), who may share (`submitting.py`).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from serving_kit.events import Done, End, Failed
from serving_kit.items import Item

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class Member(Generic[T]):
    """One input of one request, which waits for a computation."""

    payload: T  # the owner's own
    arrived: float
    deadline: float  # absolute


class Left(NamedTuple):
    """What a member has left behind."""

    item: Item
    deadline: float | None  # the latest of those that still wait; None: there are none


@dataclass(eq=False, slots=True)
class _Computation(Generic[T]):
    """One item, and those who wait for its end."""

    key: Hashable
    item: Item
    members: dict[Member[T], None] = field(default_factory=dict)  # in the order in which they joined


class SharingTable(Generic[T]):
    """The computations that have not ended.

    A key leads to the latest computation of it. One that can no longer be joined keeps its members until its
    end.
    """

    def __init__(self) -> None:
        self._by_key: dict[Hashable, _Computation[T]] = {}
        self._by_item: dict[Item, _Computation[T]] = {}
        self._by_member: dict[Member[T], _Computation[T]] = {}

    @property
    def followers(self) -> int:
        """Members beyond the first of each computation."""
        return len(self._by_member) - len(self._by_item)

    def find(self, key: Hashable) -> Item | None:
        """The item that answers this key; None: there is none."""
        computation = self._by_key.get(key)
        return None if computation is None else computation.item

    def open(self, key: Hashable, item: Item) -> None:
        """Begin a computation, which new members of its key join from now on."""
        self._by_key[key] = self._by_item[item] = _Computation(key, item)

    def join(self, key: Hashable, member: Member[T]) -> None:
        """Let a new member wait for the computation that `find` returns."""
        computation = self._by_key[key]
        computation.members[member] = None
        self._by_member[member] = computation

    def leave(self, member: Member[T]) -> Left | None:
        """A member waits no more. Returns what follows for the item; None: it has ended before."""
        computation = self._by_member.pop(member, None)
        if computation is None:
            return None
        del computation.members[member]
        if computation.members:
            return Left(computation.item, max(each.deadline for each in computation.members))
        self._forget(computation)
        return Left(computation.item, None)

    def end(self, item: Item) -> list[Member[T]]:
        """The item has ended. Returns the members that get its end, which are members no more."""
        computation = self._by_item.get(item)
        if computation is None:
            return []
        self._forget(computation)
        for member in computation.members:
            del self._by_member[member]
        return list(computation.members)

    def _forget(self, computation: _Computation[T]) -> None:
        del self._by_item[computation.item]
        if self._by_key.get(computation.key) is computation:
            del self._by_key[computation.key]


def seen_from(arrived: float, end: End, began: float) -> End:
    """An end with the times of a member.

    Args:
        arrived: When the member did.
        end: Of the item.
        began: When the item arrived: its times count from there.
    """
    if end.queue_wait_s is None or end.model_time_s is None:
        return end
    started = began + end.queue_wait_s
    ended = started + end.model_time_s
    times = max(0.0, started - arrived), max(0.0, ended - max(started, arrived))
    return Done(end.value, *times) if isinstance(end, Done) else Failed(end.error, *times)
