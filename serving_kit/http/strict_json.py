"""JSON, read strictly from clients and written strictly for them.

Not here: what a document means (`dialects/`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import NoReturn

import orjson

from serving_kit.errors import MalformedRequest, ModelFailed

_DEEPEST = 32  # levels of nesting


def parse_json(body: bytes) -> object:
    """Strict JSON: UTF-8, no NaN, no duplicate members, no lone surrogates, at most 32 levels.

    Raises:
        MalformedRequest: naming the first error.
    """
    try:
        document: object = json.loads(
            decode_text(body),
            parse_constant=_reject_constant,
            parse_float=_finite,
            object_pairs_hook=_without_duplicates,
        )
    except json.JSONDecodeError as error:
        raise MalformedRequest(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise MalformedRequest(f"the JSON is nested deeper than {_DEEPEST} levels") from None
    except ValueError:
        raise MalformedRequest("the JSON holds a number with too many digits") from None
    if body.count(b"[") + body.count(b"{") > _DEEPEST:
        _check_depth(document)
    if b"\\ud" in body.lower():
        _check_surrogates(document)
    return document


def dump_json(document: object) -> bytes:
    """Compact UTF-8 JSON; numpy and torch values become numbers and lists.

    Raises:
        ModelFailed: JSON has no such value.
    """
    # orjson takes a twentieth of the time of `json`, during which the GIL is held. It writes NaN as null,
    # and rejects integers above 64 bits: where that may have happened, `json` decides.
    try:
        body = orjson.dumps(document, default=_plain, option=orjson.OPT_NON_STR_KEYS)
        if b"null" not in body:
            return body
    except TypeError:
        pass
    try:
        text = json.dumps(
            document, default=_plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")
        )
        return text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelFailed(
            "the model's answer cannot be written as JSON", detail=f"{type(error).__name__}: {error}"
        ) from error


def decode_text(body: bytes) -> str:
    """UTF-8 as a string.

    Raises:
        MalformedRequest: it is not UTF-8.
    """
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise MalformedRequest(f"the body is not UTF-8 (byte {error.start})") from None


def _reject_constant(name: str) -> NoReturn:
    raise MalformedRequest(f"JSON has no {name}")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise MalformedRequest("the JSON holds a number that is too large")
    return number


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise MalformedRequest("the JSON has an object with the same member twice")
    return members


def _check_depth(document: object) -> None:
    level: list[object] = [document]
    for _ in range(_DEEPEST + 1):
        level = [below for each in level for below in _members(each)]
        if not level:
            return
    raise MalformedRequest(f"the JSON is nested deeper than {_DEEPEST} levels")


def _members(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_surrogates(document: object) -> None:
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise MalformedRequest("the JSON holds half of a surrogate pair") from None


def _plain(value: object) -> object:
    """What neither writer knows: numpy scalars and arrays, torch tensors."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")
