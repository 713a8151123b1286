"""Each action of the engine has the result that its docstring names."""

from __future__ import annotations

import time
from typing import get_args

import pytest

from serving_kit.actions import (
    Action,
    Answered,
    Canary,
    Executed,
    Exit,
    Free,
    Prepare,
    Release,
    Sleep,
    Step,
)
from serving_kit.execution import perform
from serving_kit.failures.classify import Failure
from serving_kit.items import Item
from serving_kit.model import FailureKind, Input, Prepared
from serving_kit.records import BatchReason
from tests.support_core import Echo, Payload, running

pytestmark = pytest.mark.light

PERFORMED: list[tuple[Action, type]] = [
    (Prepare([Item(0.0, 1e6, 1, Input("a"))]), list),
    (Step([running("a")], BatchReason.IDLE, 0, 0.0), Executed),
    (Canary(Input("example")), bool),
    (Free(Failure(ValueError(), FailureKind.ERROR), thorough=False), list),
    (Release([Prepared(Payload("a"))]), list),
]


def name(value: object) -> str:
    return value.__name__ if isinstance(value, type) else type(value).__name__


@pytest.mark.parametrize(("action", "result"), PERFORMED, ids=name)
def test_result(action: Action, result: type) -> None:
    assert isinstance(perform(Echo(), action, time.monotonic), result)


def test_every_action_is_performed_or_waits() -> None:
    """All but `Sleep` and `Exit` reach the model."""
    assert {type(action) for action, _ in PERFORMED} | {Sleep, Exit} == set(get_args(Action))


def test_a_step_ends_in_results_or_a_failure() -> None:
    """Never in both: one result for each item, or none of them."""
    items = [running("a"), running("b")]
    answered = perform(Echo(), Step(items, BatchReason.IDLE, 0, 0.0), time.monotonic)
    assert isinstance(answered, Executed)
    assert (answered.results, answered.failure) == ([Answered("A"), Answered("B")], None)
    model = Echo()
    model.raises["step"] = ValueError("no")
    failed = perform(model, Step([running("a")], BatchReason.IDLE, 0, 0.0), time.monotonic)
    assert isinstance(failed, Executed)
    assert failed.failure is not None
    assert (failed.results, failed.failure.kind) == ((), FailureKind.ERROR)
