"""Texts and files as they are."""

import asyncio

import pytest

from serving_kit.errors import MalformedRequest
from serving_kit.http.dialects.base import DecodedRequest
from serving_kit.http.dialects.raw import decode, encode

pytestmark = pytest.mark.light
JSON = {b"content-type": b"application/json"}
FORM = b"application/x-www-form-urlencoded"  # what `curl -d` says


@pytest.mark.parametrize("content_type", [b"", FORM, b"text/plain; charset=utf-8", b"text/html"])
def test_text_of_any_media_type(content_type: bytes) -> None:
    request = decode(b"test [MASK]", {b"content-type": content_type}, "fill-mask")
    assert request == DecodedRequest(["test [MASK]"], {})


def test_json_string() -> None:
    assert decode(b'"a \\u00e9"', JSON, "fill-mask").values == ["a é"]


def test_file_of_a_media_task() -> None:
    assert decode(b"\x89PNG", {}, "image-classification").values == [b"\x89PNG"]


@pytest.mark.parametrize(
    ("body", "headers", "complaint"),
    [
        (b"", {}, "the body is empty"),
        (b'""', JSON, "the text is empty"),
        (b"\xff\xfe", {}, r"not UTF-8 \(byte 0\)"),
        (b"[1]", JSON, 'must be an object with "inputs"'),
        (b"null", JSON, 'must be an object with "inputs"'),
    ],
)
def test_malformed_bodies(body: bytes, headers: dict[bytes, bytes], complaint: str) -> None:
    with pytest.raises(MalformedRequest, match=complaint):
        decode(body, headers, "fill-mask")


def test_answer_of_the_pipeline() -> None:
    answer = {"labels": ["a"], "scores": [0.9]}
    body = asyncio.run(encode(DecodedRequest(["a"], {}), [answer], "zero-shot-classification"))
    assert body == b'{"labels":["a"],"scores":[0.9]}'
