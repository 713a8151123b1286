"""JSON in and out."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.errors import MalformedRequest, ModelFailed
from serving_kit.http.strict_json import dump_json, parse_json

pytestmark = pytest.mark.light


_documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(document=_documents)
def test_reads_what_json_reads(document: Any) -> None:
    assert parse_json(json.dumps(document).encode()) == document


@pytest.mark.parametrize(
    "answer", [None, [None, 1.5], {"é": "\u2028"}, {1: 2}, 2**70, [0.1, 1e300, -0.0], "null", (1, 2)]
)
def test_writes_what_json_writes(answer: Any) -> None:
    assert json.loads(dump_json(answer)) == json.loads(json.dumps(answer))


@pytest.mark.parametrize("answer", [math.nan, [math.inf], object(), {1, 2}, b"bytes", "\ud800"])
def test_values_that_json_has_not(answer: Any) -> None:
    with pytest.raises(ModelFailed, match="cannot be written as JSON"):
        dump_json(answer)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (b"{", "not JSON: .* at line 1, column 2"),
        (b'"\xff"', "not UTF-8"),
        (b'{"a": 1, "a": 2}', "the same member twice"),
        (b"NaN", "JSON has no NaN"),
        (b"-Infinity", "JSON has no -Infinity"),
        (b"1e999", "a number that is too large"),
        (b'"\\ud800"', "half of a surrogate pair"),
        (b"9" * 5000, "too many digits"),
        (b"[" * 100 + b"]" * 100, "nested deeper than 32"),
        (b"[" * 100_000 + b"]" * 100_000, "nested deeper than 32"),
    ],
)
def test_malformed_json(body: bytes, complaint: str) -> None:
    with pytest.raises(MalformedRequest, match=complaint):
        parse_json(body)


def test_nesting_within_the_bound() -> None:
    body = b"[" * 32 + b"]" * 32 + b" " * 10
    assert parse_json(b"[" + b"[]," * 100 + b"[]]") == [[]] * 101
    assert parse_json(body)
