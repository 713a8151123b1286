"""Plain values: what is equal, and copies that share nothing that can change."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.plain import canonical, copied, is_json

pytestmark = pytest.mark.light

ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
JSON = st.recursive(ATOMS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@given(JSON)
def test_copies_are_equal_and_canonical_alike(value: Any) -> None:
    assert copied(value) == value
    assert canonical(copied(value), {}) == canonical(value, {})


def test_a_copy_can_be_changed_alone() -> None:
    answer = [{"score": [1.0, 2.0], "label": "a"}, OrderedDict(more=[1])]
    own = copied(answer)
    own[0]["score"].append(3.0)
    own[1]["more"].append(2)
    assert answer == [{"score": [1.0, 2.0], "label": "a"}, OrderedDict(more=[1])]
    assert type(own[1]) is OrderedDict


def test_order_of_members_does_not_count() -> None:
    assert canonical({"a": 1, "b": 2}, {"x": 1, "y": 2}) == canonical({"b": 2, "a": 1}, {"y": 2, "x": 1})


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, 1.0), (1, True), (1, "1"), ("1", b"1"), (["a"], '["a"]'), (None, "null"), ({}, []), ("a", "A")],
)
def test_what_differs_is_told_apart(one: Any, other: Any) -> None:
    assert canonical(one, {}) != canonical(other, {})
    assert canonical("x", {"p": one} if is_json(one) else {}) != canonical("x", {"p": "else"})


def test_parameters_count() -> None:
    assert canonical("x", {"top_k": 1}) != canonical("x", {"top_k": 2})
    assert canonical("x", {"top_k": 1}) != canonical("x", {})


@pytest.mark.parametrize("value", [object(), (1, 2), {1: 2}, [object()], bytearray(b"x")])
def test_what_is_not_plain_is_not_known(value: Any) -> None:
    assert canonical(value, {}) is None
    assert canonical("x", {"p": value}) is None


def test_too_many_digits() -> None:
    assert canonical(10**5000, {}) is None


def test_nested_too_deep() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    assert canonical(value, {}) is None
