"""The bisection: every failing item is found within the bound, and no answered item runs again."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.failures.bisection import Bisection

pytestmark = pytest.mark.light


def bisect(size: int, failing: set[int], *, known_healthy: bool) -> tuple[int, set[int], set[int]]:
    """Further steps, positions that were answered, positions that failed alone."""
    steps, answered, found = 0, set[int](), set[int]()
    bisection = Bisection(size, known_healthy=known_healthy)
    while (part := bisection.next()) is not None:
        steps += 1
        assert answered.isdisjoint(part), "an answered item ran again"
        if failing.isdisjoint(part):
            answered.update(part)
            bisection.passed()
        else:
            bisection.failed(part)
            if len(part) == 1:
                found.update(part)
    return steps, answered, found


def depth(size: int) -> int:
    return math.ceil(math.log2(size))


@given(st.data(), st.integers(1, 300), st.booleans())
def test_one_failing_item(data: st.DataObject, size: int, known_healthy: bool) -> None:
    failing = data.draw(st.integers(0, size - 1))
    steps, answered, found = bisect(size, {failing}, known_healthy=known_healthy)
    assert steps <= 2 * depth(size)
    assert answered == set(range(size)) - {failing}
    assert found == ({failing} if size > 1 else set()), "a batch of one is isolated already"


@given(st.integers(2, 200), st.sets(st.integers(0, 199), min_size=1))
def test_several_with_a_healthy_model(size: int, failing: set[int]) -> None:
    failing = {each for each in failing if each < size} or {size - 1}
    steps, answered, found = bisect(size, failing, known_healthy=True)
    assert (answered, found) == (set(range(size)) - failing, failing)
    assert steps <= min(2 * depth(size) * len(failing), 2 * size - 2)


@given(st.integers(2, 200), st.sets(st.integers(0, 199), min_size=1))
def test_few_with_an_unknown_model(size: int, failing: set[int]) -> None:
    failing = set(sorted(each for each in failing if each < size)[: depth(size)]) or {0}
    _, answered, found = bisect(size, failing, known_healthy=False)
    assert (answered, found) == (set(range(size)) - failing, failing)


@given(st.integers(2, 5000))
def test_broken_model_ends_it_early(size: int) -> None:
    steps, answered, _ = bisect(size, set(range(size)), known_healthy=False)
    assert steps <= 2 * depth(size)
    assert not answered


@given(st.integers(2, 60), st.data())
def test_alone_halves_nothing_more(size: int, data: st.DataObject) -> None:
    """After a wrong number of outputs, what is left runs one by one."""
    bisection = Bisection(size, known_healthy=True)
    for _ in range(data.draw(st.integers(0, 3))):
        if (part := bisection.next()) is None:
            return
        bisection.failed(part)
    if (part := bisection.next()) is None:
        return
    bisection.failed(part, alone=True)
    rest = []
    while (part := bisection.next()) is not None:
        rest.append(part)
        bisection.passed()
    assert all(len(part) == 1 for part in rest)


def test_alone_from_the_start() -> None:
    bisection = Bisection(3, known_healthy=False, alone=True)
    parts = []
    while (part := bisection.next()) is not None:
        parts.append(list(part))
        bisection.passed()
    assert parts == [[0], [1], [2]]
