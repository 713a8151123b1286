"""Any function from a list to a list as a model: what it is called with, and what clients may set.

    server("a")            f(["a"])              one input
    server(["a", "b"])     f(["a", "b"])         a list is always several inputs, which may share a call
    server([[1, 2, 3]])    f([[1, 2, 3]])        one input that is itself a list
    server(np.zeros(3))    f([np.zeros(3)])      an array is one input

Over HTTP the same holds for `{"inputs": ...}`.

Not here: when it is called (`batching.py`), what follows an exception (`failures/recovery.py`).
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence, Set
from typing import TypeGuard

from serving_kit.errors import MalformedRequest
from serving_kit.failures import classify
from serving_kit.failures.classify import WrongNumberOfOutputs
from serving_kit.model import EXACT, Done, FailureKind, Input, Limits, Part, Prepared, Timing, Work
from serving_kit.models import memory
from serving_kit.plain import copied, is_json

_ONE_TOKEN = Work()
_MAY_VARY = "a function may answer an equal input with something else: it may sample, count, or read a clock"


class CallableModel:
    """Any `list -> list` function: one output for each input, in order. Implements `model.ServedModel`.

    Clients may set its keyword-only parameters, and with `**kwargs` also names that it does not declare.
    Never a parameter that can be passed by position (`def f(texts, model=model)` is a notebook's way to
    hold an object), nor what a `functools.partial` holds. Inputs share a call only if their parameters are
    equal. Every input counts as one token.

    Inputs are copied before a call, as deep as lists, tuples, dicts, arrays and tensors go, and outputs
    after it: a function may change its inputs, and is called again with parts of a list on which it has
    raised; and it may return views of a buffer that it uses again.

    There is no example: a function is not called with inputs that no client has sent.
    """

    task_name = "function"
    device = "python"
    media = False
    limits = Limits(sharing_obstacle=_MAY_VARY)
    notes: Sequence[str] = ()
    timings: Sequence[Timing] = ()
    precision = EXACT
    example: Input | None = None

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function
        self.name = str(getattr(function, "__name__", type(function).__name__))
        self._settable, self._reserved = _parameters(function)

    def check(self, values: Sequence[object], parameters: Mapping[str, object]) -> None:
        """Raise `MalformedRequest` for a parameter that clients may not set. Loop thread."""
        for name in parameters:
            if name in self._settable or (self._reserved is not None and name not in self._reserved):
                continue
            known = ", ".join(sorted(self._settable)) or "none"
            if self._reserved is not None:
                raise MalformedRequest(f"parameter {name[:60]!r} cannot be set by clients")
            raise MalformedRequest(f"unknown parameter {name[:60]!r}; this model takes {known}")

    def samples(self, parameters: Mapping[str, object]) -> bool:
        """Not known, so it may: see `limits`. Loop thread."""
        return True

    def changed(self) -> str:
        """Empty: a function is called as it is now."""
        return ""

    def estimate(self, value: object) -> Work:
        """One token: nothing is known about what an input costs. Loop thread."""
        return _ONE_TOKEN

    def prepare(self, value: object, parameters: Mapping[str, object]) -> Prepared[Input]:
        """Keep the value as it is. Model thread."""
        return Prepared(Input(value, parameters), _ONE_TOKEN, _key(parameters))

    def step(self, parts: Sequence[Part]) -> list[Done]:
        """Call the function with the list of values: all parts are done. Model thread.

        Raises:
            TypeError: it returned something other than a list, tuple or array.
            WrongNumberOfOutputs: not one output for each input.
        """
        inputs = [copied(part.prepared.payload.value) for part in parts]
        parameters = parts[0].prepared.payload.parameters
        outputs = self.function(inputs, **{name: copied(each) for name, each in parameters.items()})
        if not _is_list_like(outputs):
            if inspect.iscoroutine(outputs):
                outputs.close()
            raise TypeError(
                f"{self.name} must return a list with one output for each input, in their order; "
                f"it returned {type(outputs).__name__}"
            )
        if len(outputs) != len(parts):
            raise WrongNumberOfOutputs(
                f"{self.name} was called with a list of {_count(len(parts), 'input')} and returned "
                f"{_count(len(outputs), 'output')}; it must return one output for each input, in their "
                "order. A list that is sent to the server is several inputs: one input that is itself a "
                "list, such as one row of numbers, is sent as [[1, 2, 3]] or as an array"
            )
        return [Done(output) for output in outputs]

    def finish(self, prepared: Prepared[Input], output: object) -> object:
        """A copy of the output that shares no memory with what the function may use again. Model thread."""
        return copied(output)

    def release(self, prepared: Prepared[Input]) -> None:
        """Nothing is held between steps."""

    def classify(self, error: BaseException) -> FailureKind:
        """See `classify.kind`. Any thread."""
        return classify.kind(error)

    def free_memory(self, error: BaseException, *, thorough: bool) -> None:
        """See `memory.free_memory`. Model thread."""
        memory.free_memory(error, thorough=thorough)


def _is_list_like(outputs: object) -> TypeGuard[Collection[object]]:
    """Whether iterating gives one output after the other, in a fixed order."""
    # A set has no order, and iterating a DataFrame gives the names of its columns.
    if isinstance(outputs, (str, bytes, Mapping, Set)) or hasattr(outputs, "columns"):
        return False
    return hasattr(outputs, "__len__")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# -- parameters -----------------------------------------------------------------------------------------


def _parameters(function: Callable[..., object]) -> tuple[frozenset[str], frozenset[str] | None]:
    """The names that clients may set, and with `**kwargs` those that they may not; else None."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return frozenset(), None
    held = _held(function)
    settable = {each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY} - held
    if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return frozenset(settable), None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return frozenset(settable), held | {"self"} | {
        each.name for each in parameters if each.kind in positional
    }


def _held(function: object) -> frozenset[str]:
    """Keywords of a `functools.partial`, also below decorators."""
    held: set[str] = set()
    while function is not None:
        if isinstance(function, functools.partial):
            held |= function.keywords.keys()
            function = function.func
        else:
            function = getattr(function, "__wrapped__", None)
    return frozenset(held)


class _Identity:
    """Equal to itself only."""

    __slots__ = ("_value",)

    def __init__(self, value: object) -> None:
        self._value = value  # kept, so that no other object gets its id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)


def _key(parameters: Mapping[str, object]) -> Hashable:
    """Equal for inputs that may share a call: those with equal JSON parameters, else those of one request."""
    if not parameters:
        return ""
    try:
        if is_json(dict(parameters)):
            return json.dumps(parameters, sort_keys=True)
    except (RecursionError, ValueError):  # too deep, or an integer with too many digits
        pass
    return _Identity(parameters)
