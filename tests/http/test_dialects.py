"""What a body means, and what is wrong with a bad one."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_kit.http.formats import Call, decode, dump_json, encode, parse_json

from serving_kit.errors import MalformedRequest, ModelFailed

pytestmark = pytest.mark.light
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"  # what `curl -d` says


@pytest.mark.parametrize("content_type", ["", FORM, "text/plain; charset=utf-8", "text/html"])
def test_a_text_is_the_input_whatever_it_is_called(content_type: str) -> None:
    assert decode(b"test [MASK]", content_type, "fill-mask") == Call(["test [MASK]"], {})


@pytest.mark.parametrize("text", ["{not json", '{"a": 1}', "[1, 2]", "42", '"quoted"', " spaces ", "\0"])
def test_a_text_that_looks_like_json_is_still_a_text(text: str) -> None:
    assert decode(text.encode(), FORM, "fill-mask").values == [text]


@pytest.mark.parametrize("content_type", [JSON, "application/json; charset=utf-8", FORM, ""])
def test_an_object_with_inputs_is_a_call_even_if_it_does_not_say_that_it_is_json(content_type: str) -> None:
    body = b'{"inputs": "a", "parameters": {"top_k": 2}}'
    assert decode(body, content_type, "fill-mask") == Call(["a"], {"top_k": 2}, widget=True)


def test_each_element_of_a_list_is_an_item() -> None:
    call = decode(b'{"inputs": ["a", "b"]}', JSON, "fill-mask")
    assert (call.values, call.many) == (["a", "b"], True)
    assert b"".join(encode(call, [1, 2], "fill-mask")) == b"[1,2]"


def test_a_json_string_is_the_text_in_it() -> None:
    assert decode(b'"a \\u00e9"', JSON, "fill-mask").values == ["a é"]


@pytest.mark.parametrize(
    ("body", "content_type", "complaint"),
    [
        (b"", "", "the body is empty"),
        (b'""', JSON, "the text is empty"),
        (b"\xff\xfe", "", r"not UTF-8 \(byte 0\)"),
        (b'{"inputs": "\xff"}', JSON, "not UTF-8"),
        (b"{", JSON, "not JSON: .* at line 1, column 2"),
        (b"[1]", JSON, 'must be an object with "inputs"'),
        (b"7", JSON, 'must be an object with "inputs"'),
        (b"null", JSON, 'must be an object with "inputs"'),
        (b'{"input": "a"}', JSON, 'must be an object with "inputs"'),
        (b'{"inputs": ""}', JSON, "inputs is empty"),
        (b'{"inputs": []}', JSON, "inputs is empty"),
        (b'{"inputs": null}', JSON, "inputs is empty"),
        (b'{"inputs": "a", "parameters": [1]}', JSON, "parameters must be an object, got list"),
        (b'{"inputs": "a", "parameters": "x"}', JSON, "parameters must be an object, got str"),
        (b'{"inputs": "a", "extra": 1}', JSON, "unknown member 'extra'"),
        (b'{"inputs": "a", "inputs": "b"}', JSON, "the same member twice"),
        (b'{"inputs": NaN}', JSON, "JSON has no NaN"),
        (b'{"inputs": -Infinity}', JSON, "JSON has no -Infinity"),
        (b'{"inputs": "\\ud800"}', JSON, "half of a surrogate pair"),
        (b'{"inputs": ' + b"9" * 5000 + b"}", JSON, "too many digits"),
        (b'{"inputs": ' + b"[" * 100 + b"]" * 100 + b"}", JSON, "nested deeper than 32"),
        (b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", JSON, "nested deeper than 32"),
        (b'{"inputs": ' + b'{"a":' * 50 + b"1" + b"}" * 50 + b"}", FORM, "nested deeper than 32"),
    ],
)
def test_a_bad_body_is_refused_with_what_is_wrong(body: bytes, content_type: str, complaint: str) -> None:
    with pytest.raises(MalformedRequest, match=complaint):
        decode(body, content_type, "fill-mask")


@given(
    body=st.binary(max_size=200) | st.text(max_size=100).map(str.encode), kind=st.sampled_from([JSON, FORM])
)
def test_any_bytes_are_a_call_or_a_complaint(body: bytes, kind: str) -> None:
    try:
        call = decode(body, kind, "fill-mask")
    except MalformedRequest as error:
        assert 0 < len(str(error)) < 300
    else:
        assert call.values


_documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(document=_documents)
def test_json_is_read_as_json_reads_it(document: Any) -> None:
    assert parse_json(json.dumps(document).encode()) == document


@pytest.mark.parametrize(
    ("task", "answer", "one", "raw"),
    [
        ("text-classification", [{"label": "a"}], [[{"label": "a"}]], [{"label": "a"}]),
        (
            "zero-shot-classification",
            {"sequence": "s", "labels": ["a", "b"], "scores": [0.9, 0.1]},
            [{"label": "a", "score": 0.9}, {"label": "b", "score": 0.1}],
            {"sequence": "s", "labels": ["a", "b"], "scores": [0.9, 0.1]},
        ),
        ("fill-mask", [{"score": 1.0}], [{"score": 1.0}], [{"score": 1.0}]),
    ],
)
def test_hugging_face_clients_get_their_shape_and_curl_the_pipelines(
    task: str, answer: Any, one: Any, raw: Any
) -> None:
    def encoded(body: bytes, content_type: str) -> Any:
        return json.loads(b"".join(encode(decode(body, content_type, task), [answer], task)))

    assert encoded(b'{"inputs": "a"}', JSON) == one
    assert encoded(b"a", "") == raw


def test_hugging_face_clients_get_grouped_entities() -> None:
    body = b'{"inputs": "a", "parameters": null, "options": {"wait_for_model": true}}'
    assert decode(body, JSON, "token-classification").parameters == {"aggregation_strategy": "simple"}
    own = b'{"inputs": "a", "parameters": {"aggregation_strategy": "max"}}'
    assert decode(own, JSON, "token-classification").parameters == {"aggregation_strategy": "max"}
    assert decode(b"a", "", "token-classification").parameters == {}


@pytest.mark.parametrize(
    "answer", [None, [None, 1.5], {"é": "\u2028"}, {1: 2}, 2**70, [0.1, 1e300, -0.0], "null", (1, 2)]
)
def test_an_answer_is_written_as_plain_json_would(answer: Any) -> None:
    assert json.loads(dump_json(answer)) == json.loads(json.dumps(answer))


@pytest.mark.parametrize("answer", [math.nan, [math.inf], object(), {1, 2}, b"bytes", "\ud800"])
def test_an_answer_that_json_cannot_carry_is_the_models_failure(answer: Any) -> None:
    with pytest.raises(ModelFailed, match="cannot be written as JSON"):
        dump_json(answer)
