"""Observers of records: any number, in order, and one that raises is removed."""

from __future__ import annotations

import pytest

from serving_kit.observers import Observers
from serving_kit.records import BreakerRecord, Record

pytestmark = pytest.mark.light

RECORD = BreakerRecord("open", "the model has failed")


def test_order_of_adding() -> None:
    seen: list[str] = []
    observers = Observers(lambda error: None)
    observers.add(lambda record: seen.append("first"))
    observers.add(lambda record: seen.append("second"))
    observers.report(RECORD)
    assert seen == ["first", "second"]


def test_removed() -> None:
    seen: list[Record] = []
    observers = Observers(lambda error: None)
    observers.add(seen.append)
    observers.report(RECORD)
    observers.remove(seen.append)
    observers.report(RECORD)
    assert seen == [RECORD]


def test_removing_an_unknown_one() -> None:
    Observers(lambda error: None).remove(print)


def test_one_that_raises() -> None:
    """It is removed and named once; the others are told."""
    error, seen, removed, calls = RuntimeError("a bug"), list[Record](), list[Exception](), list[int]()

    def broken(record: Record) -> None:
        calls.append(1)
        raise error

    observers = Observers(removed.append)
    observers.add(broken)
    observers.add(seen.append)
    observers.report(RECORD)
    observers.report(RECORD)
    assert (removed, len(calls)) == ([error], 1)
    assert seen == [RECORD, RECORD]


def test_interrupts_pass() -> None:
    """What is not an Exception ends the thread, as everywhere."""

    def interrupted(record: Record) -> None:
        raise KeyboardInterrupt

    observers = Observers(lambda error: None)
    observers.add(interrupted)
    with pytest.raises(KeyboardInterrupt):
        observers.report(RECORD)


def test_changes_during_a_report() -> None:
    """They count from the next record."""
    seen: list[Record] = []
    observers = Observers(lambda error: None)

    def once(record: Record) -> None:
        observers.remove(once)
        observers.add(seen.append)

    observers.add(once)
    observers.report(RECORD)
    assert seen == []
    observers.report(RECORD)
    assert seen == [RECORD]
