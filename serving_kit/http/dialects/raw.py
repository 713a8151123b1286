"""A text, or the bytes of a file: `curl -d "test [MASK]" URL`, as in the pipeline web-server guide.

The text goes to the pipeline as it is, and the pipeline's own output comes back. A JSON string is the text
in it. For a task that takes images or sound the body is a file's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serving_kit.errors import MalformedRequest
from serving_kit.http.access import Headers
from serving_kit.http.dialects.base import (
    DecodedRequest,
    Dialect,
    Prediction,
    is_json,
    media_type,
    takes_media,
)
from serving_kit.http.openapi import Schema, Subject
from serving_kit.http.strict_json import decode_text, dump_json, parse_json

_TEXT: Schema = {"type": "string", "minLength": 1}


def decode(body: bytes, headers: Headers, task: str) -> DecodedRequest:
    """Take any body as one input.

    Raises:
        MalformedRequest: it is empty, not UTF-8, or JSON that is not a string.
    """
    if not body:
        raise MalformedRequest('the body is empty; send a text, or {"inputs": ...} as JSON')
    if is_json(media_type(headers)):
        return DecodedRequest([_json_string(body)], {})
    if takes_media(task) and not body.startswith(b"{"):  # no image or sound begins like that
        return DecodedRequest([body], {})
    return DecodedRequest([decode_text(body)], {})


async def encode(request: DecodedRequest, answers: Sequence[object], task: str) -> bytes:
    """The pipeline's own output."""
    return dump_json(answers[0])


def accepts(subject: Subject) -> Mapping[str, Schema]:
    """A text, or for images and sound the bytes of a file."""
    if takes_media(subject.task):
        binary: Schema = {"type": "string", "format": "binary"}
        return {"application/octet-stream": binary, "application/json": _TEXT}
    return {"text/plain": _TEXT, "application/json": _TEXT}


def _json_string(body: bytes) -> str:
    document = parse_json(body)
    if not isinstance(document, str):
        raise MalformedRequest('a JSON body must be an object with "inputs", or a string')
    if not document:
        raise MalformedRequest('the text is empty; send a text, or {"inputs": ...} as JSON')
    return document


RAW = Dialect(
    predictions=(Prediction("/", "Ask the model.", "predict", decode, encode, accepts),),
)
