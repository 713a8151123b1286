"""Items: what they have waited, whether they are still wanted, and what they cost together."""

from __future__ import annotations

import pytest

from serving_kit.items import Item, ItemState, computed, longest
from serving_kit.model import Work

pytestmark = pytest.mark.light


def test_waited() -> None:
    item = Item(1.0, 10.0, 5)
    assert item.waited_s(9.0) == (None, None), "it has not started"
    item.started = 3.0
    assert item.waited_s(9.0) == (2.0, 6.0)


@pytest.mark.parametrize(
    ("state", "cancelled", "deadline", "wanted"),
    [
        (ItemState.RUNNING, False, 5.0, True),
        (ItemState.RUNNING, True, 5.0, False),
        (ItemState.RUNNING, False, 4.0, False),
        (ItemState.WAITING, False, 5.0, False),
        (ItemState.DONE, False, 5.0, False),
    ],
)
def test_wanted(state: ItemState, cancelled: bool, deadline: float, wanted: bool) -> None:
    item = Item(0.0, deadline, 1, state=state, cancelled=cancelled)
    assert item.is_wanted(4.0) is wanted


def test_tokens_of_a_step() -> None:
    items = [Item(0.0, 1.0, tokens) for tokens in (3, 10, 1)]
    assert (computed(items, packed=False), computed(items, packed=True), longest(items)) == (30, 14, 10)
    assert computed([], packed=False) == computed([], packed=True) == 0


def test_work_of_several_sequences() -> None:
    assert Work(sequences=3, longest=7).tokens == 21
    assert Work().tokens == 1


def test_equal_items_are_different() -> None:
    """They are told apart by identity: two clients may ask the same."""
    assert Item(0.0, 1.0, 1) != Item(0.0, 1.0, 1)
    assert len({Item(0.0, 1.0, 1), Item(0.0, 1.0, 1)}) == 2
