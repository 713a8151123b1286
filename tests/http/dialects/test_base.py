"""What all dialects share: the choice among them, streams, answers as JSON."""

import asyncio
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.errors import MalformedRequest
from serving_kit.http.dialects import DIALECTS
from serving_kit.http.dialects.base import EVENT_STREAM, json_fragments, media_type
from serving_kit.http.predict import decode_body

pytestmark = pytest.mark.light
PREDICTIONS = [prediction for dialect in DIALECTS for prediction in dialect.predictions]


@given(
    body=st.binary(max_size=200) | st.text(max_size=100).map(str.encode),
    kind=st.sampled_from([b"application/json", b"application/x-www-form-urlencoded"]),
)
def test_any_bytes(body: bytes, kind: bytes) -> None:
    """Any body is a request, or an error with a short text."""
    try:
        _, request = decode_body(PREDICTIONS, body, {b"content-type": kind}, "fill-mask")
    except MalformedRequest as error:
        assert 0 < len(str(error)) < 300
    else:
        assert request.values


def test_body_of_no_dialect() -> None:
    with pytest.raises(MalformedRequest, match="no shape that this route takes"):
        decode_body(PREDICTIONS[:1], b"a text", {}, "fill-mask")


def test_frames() -> None:
    chunk = {"token": "é\n"}
    assert EVENT_STREAM.frame(chunk) == 'data: {"token":"é\\n"}\n\n'.encode()


def test_media_type() -> None:
    assert media_type({b"content-type": b"Text/Plain; charset=utf-8"}) == "text/plain"
    assert media_type({}) == ""


def test_other_tasks_run_between_long_answers() -> None:
    ran = []

    async def other() -> None:
        ran.append(True)

    async def write(answers: list[Any]) -> bytes:
        task = asyncio.create_task(other())
        written = orjson.dumps(await json_fragments(answers))
        assert ran == [True] * task.done()
        return written

    assert asyncio.run(write(["a", 1])) == b'["a",1]'
    assert ran == [True]  # after the short answers
    ran.clear()
    assert len(asyncio.run(write(["a" * 200_000, "b"]))) == 200_008
