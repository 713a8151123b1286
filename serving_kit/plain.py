"""Values as JSON has them: which are plain, a canonical form to compare them by, and copies.

Not here: the types of settings and parameters (`values.py`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Hashable, Mapping
from typing import Any

_JSON_ATOMS = (str, int, float, bool, type(None))
_ATOMS = frozenset({*_JSON_ATOMS, complex, bytes})


def is_json(value: Any) -> bool:
    """Whether its JSON differs from that of every other value: no tuples, no subclasses, string keys only."""
    kind = type(value)
    if kind is dict:
        return all(type(name) is str and is_json(each) for name, each in value.items())
    if kind is list:
        return all(map(is_json, value))
    return kind in _JSON_ATOMS


def canonical(value: object, parameters: Mapping[str, object]) -> Hashable | None:
    """What is equal for an equal value with equal parameters, and for no other; None: not known.

    The order of the members of an object does not count. 1, 1.0 and true differ.
    """
    try:
        if parameters and not is_json(dict(parameters)):
            return None
        called = json.dumps(parameters, sort_keys=True) if parameters else ""
        if type(value) in (str, bytes):
            return type(value), value, called
        return (json.dumps(value, sort_keys=True), called) if is_json(value) else None
    except (RecursionError, ValueError):  # too deep, or an integer with too many digits
        return None


def copied(value: Any) -> Any:  # of the same type
    """A copy, as deep as lists, tuples, dicts, dataclasses, arrays and tensors go."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind is list or kind is tuple:  # most are long and flat: embeddings, scores
        return kind(value if _ATOMS.issuperset(map(type, value)) else map(copied, value))
    if kind is dict:
        return {name: copied(each) for name, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(map(copied, value))
    if isinstance(value, (list, tuple)):  # a subclass is a list in JSON
        return list(map(copied, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        record: Any = copy.copy(value)
        for each in dataclasses.fields(value):
            object.__setattr__(record, each.name, copied(getattr(value, each.name)))  # also if it is frozen
        return record
    if isinstance(value, dict):  # such as an OrderedDict, or what transformers' models return
        own = copy.copy(value)
        for name, each in value.items():
            own[name] = copied(each)
        return own
    if hasattr(value, "tolist"):  # numpy, torch and others that become JSON by their `tolist`
        for name in ("clone", "copy", "__copy__"):
            if (duplicate := getattr(value, name, None)) is not None:
                return duplicate()
    return value
