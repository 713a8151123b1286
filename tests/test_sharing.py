"""The table of shared computations: every member ends exactly once, and no computation runs without one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.errors import ModelFailed
from serving_kit.events import Done, Failed
from serving_kit.items import Item
from serving_kit.sharing import Left, Member, SharingTable, seen_from

pytestmark = pytest.mark.light


def member(deadline: float = 10.0) -> Member[str]:
    return Member("", 0.0, deadline)


def opened(*members: Member[str]) -> tuple[SharingTable[str], Item]:
    """A table with one computation."""
    table, item = SharingTable[str](), Item(0.0, 10.0, 1)
    table.open("key", item)
    for each in members:
        table.join("key", each)
    return table, item


def test_goes_on_until_the_latest_deadline_left() -> None:
    first, second, third = member(30.0), member(10.0), member(20.0)
    table, item = opened(first, second, third)
    assert table.leave(first) == Left(item, 20.0)
    assert table.leave(third) == Left(item, 10.0)
    assert table.find("key") is item
    assert table.leave(second) == Left(item, None)
    assert table.find("key") is None


def test_a_member_leaves_once() -> None:
    first, second = member(), member()
    table, item = opened(first, second)
    assert table.end(item) == [first, second]
    assert table.leave(first) is None
    assert table.end(item) == []


def test_superseded_computation_keeps_its_members() -> None:
    """It can no longer be joined, and its end does not touch the newer one of its key."""
    old, new, newer = member(), Item(0.0, 10.0, 1), member()
    table, item = opened(old)
    table.open("key", new)
    table.join("key", newer)
    assert table.end(item) == [old]
    assert table.find("key") is new
    assert table.end(new) == [newer]


@given(
    st.lists(st.tuples(st.sampled_from(["ask", "again", "leave", "end"]), st.integers(0, 99)), max_size=60)
)
def test_every_member_ends_exactly_once(steps: list[tuple[str, int]]) -> None:
    """Whatever the order of requests, departures and ends: checked against sets of members."""
    table = SharingTable[str]()
    waiting: dict[Item, list[Member[str]]] = {}
    asked: list[Member[str]] = []
    ends: list[Member[str]] = []
    for what, number in steps:
        key = number % 3
        if what in ("ask", "again"):
            asked.append(member(float(number)))
            if what == "again" or table.find(key) is None:
                item = Item(0.0, float(number), 1)
                table.open(key, item)
                waiting[item] = []
            joined = table.find(key)
            assert joined is not None
            table.join(key, asked[-1])
            waiting[joined].append(asked[-1])
        elif what == "leave" and asked:
            each = asked[number % len(asked)]
            left = table.leave(each)
            assert (left is None) == (each in ends)
            if left is not None:
                ends.append(each)
                waiting[left.item].remove(each)
                rest = waiting[left.item]
                assert left.deadline == (max(other.deadline for other in rest) if rest else None)
        elif what == "end" and waiting:
            item = list(waiting)[number % len(waiting)]
            assert table.end(item) == waiting[item]
            ends += waiting.pop(item)
        waiting = {item: members for item, members in waiting.items() if members}
        assert table.followers == sum(len(members) - 1 for members in waiting.values())
    for item, members in waiting.items():
        assert table.end(item) == members
        ends += members
    assert len(ends) == len(asked) == len({*ends})
    assert table.followers == 0
    assert [table.find(key) for key in range(3)] == [None] * 3


@pytest.mark.parametrize(
    ("arrived", "times"),
    [(100.0, (2.0, 3.0)), (101.0, (1.0, 3.0)), (104.0, (0.0, 1.0)), (106.0, (0.0, 0.0))],
)
def test_times_count_from_ones_own_arrival(arrived: float, times: tuple[float, float]) -> None:
    """The item arrived at 100, ran from 102 to 105."""
    error = ModelFailed("no")
    assert seen_from(arrived, Done("answer", 2.0, 3.0), 100.0) == Done("answer", *times)
    assert seen_from(arrived, Failed(error, 2.0, 3.0), 100.0) == Failed(error, *times)


def test_an_item_that_never_ran_has_no_times() -> None:
    end = Failed(ModelFailed("no"))
    assert seen_from(101.0, end, 100.0) is end
