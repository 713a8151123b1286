"""What `huggingface_hub.InferenceClient` and huggingface.js send: `{"inputs": ..., "parameters": {...}}`.

A list of inputs is several items; the answer is a list in the same order. The object counts also where the
body does not say that it is JSON, because `curl -d` says of every body that it is a form. A form with a
field `inputs` is such an object, too (`http/forms.py`). Images and sound are base64 (`models/media.py`).

Not here: which parameters exist (`models/tasks.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from serving_kit.errors import MalformedRequest
from serving_kit.http.access import Headers
from serving_kit.http.dialects.base import (
    EVENT_STREAM,
    DecodedRequest,
    Dialect,
    Prediction,
    is_json,
    json_fragments,
    media_type,
    takes_media,
)
from serving_kit.http.forms import MEMBERS, read_multipart, read_urlencoded
from serving_kit.http.openapi import Schema, Subject
from serving_kit.http.strict_json import decode_text, dump_json, parse_json

_URLENCODED = "application/x-www-form-urlencoded"


def _unchanged(answer: object) -> object:
    return answer


def _label_scores(answer: object) -> object:
    """Zero-shot classification: pairs, where the pipeline has two lists."""
    if not isinstance(answer, Mapping):
        return answer
    pairs = zip(answer["labels"], answer["scores"], strict=True)
    return [{"label": label, "score": score} for label, score in pairs]


@dataclass(frozen=True, slots=True)
class _Shape:
    """Where the clients expect of a task something else than what its pipeline does.

    Attributes:
        defaults: Parameters.
        in_list: Whether the answer to a single input is in a list, of which they take the first.
        answer: Makes the clients' answer of the pipeline's.
    """

    defaults: Mapping[str, object] = field(default_factory=dict)
    in_list: bool = False
    answer: Callable[[object], object] = _unchanged


_SHAPES: Mapping[str, _Shape] = {
    "text-classification": _Shape(in_list=True),
    "token-classification": _Shape({"aggregation_strategy": "simple"}),  # only grouping gives entity_group
    "zero-shot-classification": _Shape(answer=_label_scores),
}
_PIPELINE_SHAPE = _Shape()


def decode(body: bytes, headers: Headers, task: str) -> DecodedRequest | None:
    """Read an object or a form; None: the body is a text or a file.

    Raises:
        MalformedRequest: what is wrong with it, and what would be right.
        UnsupportedMediaType: a form that this task does not take.
    """
    if not body:
        return None
    kind = media_type(headers)
    document: dict[str, object] | None = None
    if kind.startswith("multipart/"):
        document = read_multipart(body, headers[b"content-type"], media=takes_media(task))
    elif kind == _URLENCODED:
        document = read_urlencoded(body)
    if document is None:
        document = _json_object(body) if is_json(kind) else _unlabelled_object(body, task)
    return None if document is None else _decoded(document, task)


async def encode(request: DecodedRequest, answers: Sequence[object], task: str) -> bytes:
    """The answers in the shape that these clients expect for the task."""
    shape = _SHAPES.get(task, _PIPELINE_SHAPE)
    if not request.many and not shape.in_list:
        return dump_json(shape.answer(answers[0]))
    return orjson.dumps(await json_fragments(shape.answer(answer) for answer in answers))


def accepts(subject: Subject) -> Mapping[str, Schema]:
    """The object, and forms whose fields are its members."""
    text: Schema = {"type": "string", "minLength": 1}
    file: Schema = {"type": "string", "format": "binary"}
    return {
        "application/json": _object_schema(subject.parameters),
        "multipart/form-data": _form(file if takes_media(subject.task) else text),
        _URLENCODED: _form(text),
    }


def _object_schema(parameters: Schema | None) -> Schema:
    """Parameters: the schema of that member; None: any object."""
    required = ["inputs"]
    if parameters is None:
        parameters = {"type": ["object", "null"]}
    elif "required" in parameters:
        required = ["inputs", "parameters"]
    else:
        parameters = {"oneOf": [parameters, {"type": "null"}]}
    return {
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": {
            "inputs": {"description": "One input, or a list of them."},
            "parameters": parameters,
            "options": {},
        },
    }


def _form(one: Schema) -> Schema:
    inputs = {"oneOf": [one, {"type": "array", "items": one, "minItems": 1}]}
    parameters = {"type": "string", "contentMediaType": "application/json"}
    return {
        "type": "object",
        "required": ["inputs"],
        "additionalProperties": False,
        "properties": {"inputs": inputs, "parameters": parameters},
    }


def _json_object(body: bytes) -> dict[str, object] | None:
    """The object in a body that says it is JSON; None: it is no object."""
    if not body.lstrip().startswith(b"{"):
        return None
    document = parse_json(body)
    if isinstance(document, dict) and "inputs" in document:
        return document
    raise MalformedRequest('a JSON body must be an object with "inputs", or a string')


def _unlabelled_object(body: bytes, task: str) -> dict[str, object] | None:
    """The object in a body that does not say that it is JSON; None: it is a text or a file."""
    if takes_media(task) and not body.startswith(b"{"):
        return None
    if not body.lstrip().startswith(b"{"):
        return None
    try:
        document = json.loads(decode_text(body))
    except (ValueError, RecursionError):
        return None
    return _json_object(body) if isinstance(document, dict) and "inputs" in document else None


def _decoded(document: Mapping[str, object], task: str) -> DecodedRequest:
    for name in document:
        if name not in MEMBERS:
            raise MalformedRequest(f"unknown member {name[:60]!r}; the body has inputs and parameters")
    parameters = document.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise MalformedRequest(f"parameters must be an object, got {type(parameters).__name__}")
    inputs = document["inputs"]
    if inputs is None or inputs in ("", [], {}):
        raise MalformedRequest("inputs is empty")
    if defaults := _SHAPES.get(task, _PIPELINE_SHAPE).defaults:
        parameters = {**defaults, **parameters}
    if isinstance(inputs, list):
        return DecodedRequest(inputs, parameters, many=True)
    return DecodedRequest([inputs], parameters)


HUGGING_FACE = Dialect(
    predictions=(Prediction("/", "Ask the model.", "predict", decode, encode, accepts),),
    stream=EVENT_STREAM,
)
