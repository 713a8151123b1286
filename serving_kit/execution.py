"""The model's side: performs one action of the engine on a model, and makes its exceptions values.

Called on the model thread. Nothing here waits or locks.

Not here: which action (`engine.py`), the thread (`batching.py`), models (`models/`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serving_kit.actions import Action, Answered, Canary, Executed, Free, ItemResult, Prepare, Release, Step
from serving_kit.failures.classify import Failure, WrongNumberOfOutputs
from serving_kit.items import Item, ItemState
from serving_kit.model import AnyPrepared, Done, Input, Model, More, Part, StepResult


def perform(model: Model, action: Action, clock: Callable[[], float]) -> object:
    """Do what the engine asks for. Returns the result that belongs to the action (`actions.py`)."""
    if isinstance(action, Step):
        return step(model, action.items, clock)
    if isinstance(action, Prepare):
        return [_prepare_waiting(model, item) for item in action.items]
    if isinstance(action, Canary):
        return run_canary(model, action.example)
    if isinstance(action, Free):
        model.free_memory(action.failure.error, thorough=action.thorough)
    elif isinstance(action, Release):
        for prepared in action.prepared:
            model.release(prepared)
    return None


def prepare(model: Model, given: Input) -> AnyPrepared | Failure:
    """One input, ready for the model."""
    try:
        return model.prepare(given.value, given.parameters)
    except BaseException as error:
        return _failure(model, error)


def step(model: Model, items: Sequence[Item], clock: Callable[[], float]) -> Executed:
    """Run the model once on prepared items of one key."""
    parts = [Part(_prepared(item), item.tokens) for item in items]
    started = clock()
    try:
        results = model.step(parts)
        if len(results) != len(parts):
            raise WrongNumberOfOutputs(
                f"inputs given to the model: {len(parts)}; outputs that it returned: {len(results)}"
            )
    except BaseException as error:
        return Executed(started, clock(), failure=_failure(model, error))
    ended = clock()
    return Executed(
        started,
        ended,
        [_finish(model, part.prepared, result) for part, result in zip(parts, results, strict=True)],
    )


def run_canary(model: Model, example: Input) -> bool:
    """Whether the model answers its own example, alone and from scratch."""
    try:
        prepared = model.prepare(example.value, example.parameters)
        try:
            work = prepared.work
            while True:
                (result,) = model.step([Part(prepared, work.tokens)])
                if isinstance(result, Done):
                    model.finish(prepared, result.output)
                if not isinstance(result, More):
                    return isinstance(result, Done)
                work = result.work
        finally:
            model.release(prepared)
    except BaseException:
        return False


def _prepare_waiting(model: Model, item: Item) -> AnyPrepared | Failure | None:
    """Prepare an item unless its client has left since; its state is read without the lock."""
    return prepare(model, item.input) if item.state is ItemState.WAITING else None


def _finish(model: Model, prepared: AnyPrepared, result: StepResult) -> ItemResult:
    """The client's answer, what goes on, or a failure of this item alone."""
    if isinstance(result, More):
        return result
    try:
        if isinstance(result, Done):
            return Answered(model.finish(prepared, result.output))
        return _failure(model, result.error)
    except BaseException as error:
        return _failure(model, error)
    finally:
        model.release(prepared)


def _failure(model: Model, error: BaseException) -> Failure:
    return Failure(error, model.classify(error))


def _prepared(item: Item) -> AnyPrepared:
    assert item.prepared is not None, "an item ran before it was prepared. This is a bug."
    return item.prepared
