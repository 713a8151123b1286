"""The shapes of Hugging Face's clients. Forms are in test_forms.py."""

import asyncio
import json
from typing import Any

import pytest

from serving_kit.errors import MalformedRequest, ModelFailed
from serving_kit.http.dialects.base import DecodedRequest
from serving_kit.http.dialects.huggingface import decode, encode

pytestmark = pytest.mark.light
JSON = {b"content-type": b"application/json"}
FORM = {b"content-type": b"application/x-www-form-urlencoded"}  # what `curl -d` says


def written(request: DecodedRequest, answers: list[Any], task: str) -> bytes:
    return asyncio.run(encode(request, answers, task))


@pytest.mark.parametrize("headers", [JSON, {b"content-type": b"application/json; charset=utf-8"}, FORM, {}])
def test_object_with_inputs(headers: dict[bytes, bytes]) -> None:
    body = b'{"inputs": "a", "parameters": {"top_k": 2}}'
    assert decode(body, headers, "fill-mask") == DecodedRequest(["a"], {"top_k": 2})


def test_list_of_inputs() -> None:
    request = decode(b'{"inputs": ["a", "b"]}', JSON, "fill-mask")
    assert request == DecodedRequest(["a", "b"], {}, many=True)
    assert written(request, [1, {"é": None}], "fill-mask") == '[1,{"é":null}]'.encode()


@pytest.mark.parametrize("text", ["{not json", '{"a": 1}', "[1, 2]", "42", '"quoted"', " spaces ", "\0"])
def test_texts_are_left_to_the_next_dialect(text: str) -> None:
    assert decode(text.encode(), FORM, "fill-mask") is None
    assert decode(b"", JSON, "fill-mask") is None
    assert decode(b'"a"', JSON, "fill-mask") is None


@pytest.mark.parametrize(
    ("body", "headers", "complaint"),
    [
        (b'{"inputs": "\xff"}', JSON, "not UTF-8"),
        (b"{", JSON, "not JSON: .* at line 1, column 2"),
        (b'{"input": "a"}', JSON, 'must be an object with "inputs"'),
        (b'{"inputs": ""}', JSON, "inputs is empty"),
        (b'{"inputs": []}', JSON, "inputs is empty"),
        (b'{"inputs": null}', JSON, "inputs is empty"),
        (b'{"inputs": "a", "parameters": [1]}', JSON, "parameters must be an object, got list"),
        (b'{"inputs": "a", "parameters": "x"}', JSON, "parameters must be an object, got str"),
        (b'{"inputs": "a", "extra": 1}', JSON, "unknown member 'extra'"),
        (b'{"inputs": ' + b'{"a":' * 50 + b"1" + b"}" * 50 + b"}", FORM, "nested deeper than 32"),
    ],
)
def test_malformed_bodies(body: bytes, headers: dict[bytes, bytes], complaint: str) -> None:
    with pytest.raises(MalformedRequest, match=complaint):
        decode(body, headers, "fill-mask")


@pytest.mark.parametrize(
    ("task", "answer", "shape"),
    [
        ("text-classification", [{"label": "a"}], [[{"label": "a"}]]),
        (
            "zero-shot-classification",
            {"sequence": "s", "labels": ["a", "b"], "scores": [0.9, 0.1]},
            [{"label": "a", "score": 0.9}, {"label": "b", "score": 0.1}],
        ),
        ("fill-mask", [{"score": 1.0}], [{"score": 1.0}]),
    ],
)
def test_shape_of_answers(task: str, answer: Any, shape: Any) -> None:
    assert json.loads(written(DecodedRequest(["a"], {}), [answer], task)) == shape


def test_grouped_entities() -> None:
    body = b'{"inputs": "a", "parameters": null, "options": {"wait_for_model": true}}'
    request = decode(body, JSON, "token-classification")
    assert request == DecodedRequest(["a"], {"aggregation_strategy": "simple"})
    own = b'{"inputs": "a", "parameters": {"aggregation_strategy": "max"}}'
    assert decode(own, JSON, "token-classification") == DecodedRequest(["a"], {"aggregation_strategy": "max"})


def test_answer_that_is_not_json() -> None:
    with pytest.raises(ModelFailed, match="cannot be written as JSON"):
        written(DecodedRequest(["a", "b"], {}, many=True), [1.0, float("nan")], "fill-mask")
