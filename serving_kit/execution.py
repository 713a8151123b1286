"""The model's side: performs one action of the engine on a model, and makes its exceptions values.

Called on the model thread. Nothing here waits or locks, and nothing that the model raises gets past it.

Not here: which action (`engine.py`), the thread (`worker.py`), models (`models/`).
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Sequence

from serving_kit.actions import Action, Answered, Canary, Executed, Free, ItemResult, Prepare, Release, Step
from serving_kit.errors import error_text
from serving_kit.failures.classify import Failure, WrongNumberOfOutputs
from serving_kit.items import Item, ItemState
from serving_kit.model import AnyPrepared, Done, FailureKind, Input, Model, More, Part, StepResult

_repr = reprlib.Repr()  # bounded, and raises nothing
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 100
_repr.maxstring = _repr.maxother = 1000


def perform(model: Model, action: Action, clock: Callable[[], float]) -> object:
    """Do what the engine asks for. Returns the result that belongs to the action (`actions.py`)."""
    if isinstance(action, Step):
        return step(model, action.items, clock)
    if isinstance(action, Prepare):
        return [_prepare_waiting(model, item) for item in action.items]
    if isinstance(action, Canary):
        return run_canary(model, action.example)
    if isinstance(action, Free):
        return _free_memory(model, action)
    if isinstance(action, Release):
        return release(model, action.prepared)
    return None


def prepare(model: Model, item: Item) -> AnyPrepared | Failure:
    """One input, ready for the model."""
    try:
        return model.prepare(item.input.value, item.input.parameters)
    except BaseException as error:
        return _failure(model, error, [item])


def step(model: Model, items: Sequence[Item], clock: Callable[[], float]) -> Executed:
    """Run the model once on prepared items of one key."""
    parts = [Part(_prepared(item), item.tokens, item.stream_deadline is not None) for item in items]
    started = clock()
    try:
        results = model.step(parts)
        if len(results) != len(parts):
            raise WrongNumberOfOutputs(
                f"inputs given to the model: {len(parts)}; outputs that it returned: {len(results)}"
            )
    except BaseException as error:
        return Executed(started, clock(), failure=_failure(model, error, items))
    finished = [_finish(model, item, result) for item, result in zip(items, results, strict=True)]
    over = [
        part.prepared for part, result in zip(parts, finished, strict=True) if not isinstance(result, More)
    ]
    # Making the answers is part of what a step costs, and the next one waits for it.
    return Executed(started, clock(), finished, unreleased=release(model, over))


def run_canary(model: Model, example: Input) -> bool:
    """Whether the model answers its own example, alone and from scratch; of a long answer the first step."""
    try:
        prepared = model.prepare(example.value, example.parameters)
        try:
            (result,) = model.step([Part(prepared, prepared.work.tokens)])
            if isinstance(result, Done):
                model.finish(prepared, result.output)
            return isinstance(result, Done | More)
        finally:
            model.release(prepared)
    except BaseException:
        return False


def release(model: Model, prepared: Iterable[AnyPrepared]) -> list[Failure]:
    """Release what items hold. Returns what that raised."""
    failures = []
    for each in prepared:
        try:
            model.release(each)
        except BaseException as error:
            failures.append(_failure(model, error, ()))
    return failures


def _free_memory(model: Model, action: Free) -> list[Failure]:
    try:
        model.free_memory(action.failure.error, thorough=action.thorough)
    except BaseException as error:
        return [_failure(model, error, ())]
    return []


def _prepare_waiting(model: Model, item: Item) -> AnyPrepared | Failure | None:
    """Prepare an item unless its client has left since; its state is read without the lock."""
    return prepare(model, item) if item.state is ItemState.WAITING else None


def _finish(model: Model, item: Item, result: StepResult) -> ItemResult:
    """The client's answer, what goes on, or a failure of this item alone."""
    if isinstance(result, More):
        return result
    try:
        if isinstance(result, Done):
            answer = model.finish(_prepared(item), result.output)
            return Answered(answer, result.chunk, result.generated)
        return _failure(model, result.error, [item])
    except BaseException as error:
        return _failure(model, error, [item])


def _failure(model: Model, error: BaseException, items: Iterable[Item]) -> Failure:
    """An exception as a value. What runs code of the model or of an input is done here, without a lock."""
    for item in items:
        item.fingerprint = _fingerprint(item.input)
    try:
        kind = model.classify(error)
    except Exception:
        kind = FailureKind.ERROR
    return Failure(error, kind, error_text(error))


def _fingerprint(given: Input) -> int:
    """A number that is equal for equal inputs. Long arrays that differ may share one."""
    try:
        value = hash(given.value)
    except Exception:  # a list, or an object whose own `__hash__` raises
        value = hash(_repr.repr(given.value))
    return hash((value, _repr.repr(given.parameters)))


def _prepared(item: Item) -> AnyPrepared:
    assert item.prepared is not None, "an item ran before it was prepared. This is a bug."
    return item.prepared
