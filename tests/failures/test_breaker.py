"""The circuit breaker: when it opens, for how long, and what closes it."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.failures.breaker import Breaker, Gate

pytestmark = pytest.mark.light

EVENTS = st.lists(
    st.tuples(st.floats(0, 100), st.sampled_from(["failed", "succeeded", "nothing"])), max_size=60
)


def fail_inconclusively(breaker: Breaker, now: float, *inputs: int) -> bool:
    return breaker.failed_inconclusively(now, "ValueError", set(inputs))


@given(EVENTS)
def test_any_history(events: list[tuple[float, str]]) -> None:
    """It opens after five failures in a row, for a minute at most, and an answer closes it."""
    breaker, now, in_a_row, was_open_until = Breaker(), 0.0, 0, -1.0
    for wait, event in events:
        now += wait
        gate = breaker.gate(now)
        assert breaker.admits(now, 0) == (gate is not Gate.OPEN)
        assert breaker.admits(now, 1) == (gate is Gate.CLOSED), "half open: one at a time"
        assert breaker.refuses_admitted(now) == (gate is Gate.OPEN)
        assert 0 <= breaker.pause_s(now) <= 60
        assert (breaker.pause_s(now) > 0) == (gate is Gate.OPEN)
        assert bool(breaker.reason) == (gate is not Gate.CLOSED) == bool(breaker.degraded_reason)
        if event == "succeeded":
            assert breaker.succeeded() == (gate is not Gate.CLOSED)
            in_a_row = 0
            assert breaker.gate(now) is Gate.CLOSED
            assert not breaker.has_failures
        elif event == "failed":
            opened = breaker.failed(now, "ValueError")
            assert breaker.has_failures
            if gate is Gate.CLOSED:
                in_a_row += 1
                assert breaker.gate(now) is (Gate.OPEN if in_a_row >= 5 else Gate.CLOSED)
                assert opened == (in_a_row >= 5)
            else:
                assert breaker.gate(now) is Gate.OPEN
                assert opened == (gate is Gate.HALF_OPEN)
                if gate is Gate.OPEN:
                    assert now + breaker.pause_s(now) == pytest.approx(was_open_until), "nothing new"
        if breaker.gate(now) is Gate.OPEN:
            was_open_until = now + breaker.pause_s(now)


def test_the_pause_doubles() -> None:
    breaker, now, pauses = Breaker(), 0.0, []
    for _ in range(5):
        breaker.failed(now, "ValueError")
    for _ in range(6):
        pauses.append(breaker.pause_s(now))
        now += breaker.pause_s(now)
        breaker.failed(now, "ValueError")
    assert pauses == [5, 10, 20, 40, 60, 60]
    assert breaker.reason == "the model has failed 11 times in a row, last with ValueError"
    assert "one request at a time is let in" in breaker.degraded_reason


def test_inconclusive_failures_for_ten_seconds() -> None:
    """Of different inputs, without one answer."""
    breaker = Breaker()
    for second in range(10):
        fail_inconclusively(breaker, float(second), second)
        assert breaker.gate(second) is Gate.CLOSED, "others may still be answered"
    assert fail_inconclusively(breaker, 10.0, 10)
    assert breaker.gate(10.0) is Gate.OPEN
    assert breaker.pause_s(10.0) == 1
    assert breaker.reason == "no request was answered for 10 s, and the last failed with ValueError"
    assert "requests are let in to try again" in breaker.degraded_reason
    assert not breaker.refuses_admitted(10.0), "what was admitted still runs"


def test_one_bad_input_over_and_over() -> None:
    breaker = Breaker()
    for second in range(1000):
        fail_inconclusively(breaker, float(second), 1, 2)
        fail_inconclusively(breaker, float(second), 3, 4)
    assert breaker.gate(1000.0) is Gate.CLOSED


@given(st.lists(st.floats(0, 3), max_size=60), st.floats(0, 9.9))
def test_an_answer_every_ten_seconds(waits: list[float], phase: float) -> None:
    """It stays closed however many inconclusive failures there are."""
    breaker, now, answered = Breaker(), 0.0, -phase
    for number, wait in enumerate(waits):
        now += wait
        while answered + 9.9 <= now:
            answered += 9.9
            breaker.succeeded()
        fail_inconclusively(breaker, now, number)
        assert breaker.gate(now) is Gate.CLOSED


def test_inconclusive_pauses() -> None:
    """A client that comes back after its pause is admitted, whatever fails first."""
    breaker, now, pauses = Breaker(), 0.0, []
    for number in range(1000):  # bad inputs alone, all the time
        now += 0.1
        was = breaker.gate(now)
        fail_inconclusively(breaker, now, number)
        if breaker.gate(now) is Gate.OPEN and was is not Gate.OPEN:
            pause = breaker.pause_s(now)
            pauses.append(pause)
            for later in (pause, pause + 1.9):
                assert breaker.admits(now + later, 100), "also beside others"
                fail_inconclusively(trial := copy.deepcopy(breaker), now + later, 1000 + number)
                assert trial.admits(now + later, 100)
    assert pauses == pytest.approx([1, 2, 4, *[8] * 8])
    assert breaker.succeeded()
    assert breaker.gate(now) is Gate.CLOSED
    assert not breaker.has_failures


def test_crashes_after_inconclusive_failures() -> None:
    """They count, and then one request at a time is admitted."""
    breaker = Breaker()
    for second in (*range(5), 10):
        fail_inconclusively(breaker, float(second), second)
    assert breaker.inconclusive
    for _ in range(5):
        breaker.failed(10.5, "a crash of its thread")
    assert not breaker.inconclusive
    assert breaker.pause_s(10.5) == 5
    assert breaker.refuses_admitted(10.5)
    assert not breaker.admits(16.0, 1)
    fail_inconclusively(breaker, 16.0, 99)
    assert breaker.admits(16.0, 0), "a bad input is no crash"


@given(EVENTS)
def test_a_lost_device_stays_lost(events: list[tuple[float, str]]) -> None:
    breaker, now = Breaker(), 0.0
    assert breaker.latch("the device is lost")
    for wait, event in events:
        now += wait
        if event == "succeeded":
            assert not breaker.succeeded()
        elif event == "failed":
            breaker.failed(now, "ValueError")
        assert breaker.gate(now) is Gate.LATCHED
        assert not breaker.admits(now, 0)
        assert breaker.refuses_admitted(now)
        assert breaker.pause_s(now) == float("inf")
        assert breaker.reason == "the device is lost"
        assert not breaker.latch("the device is lost")
