"""What `huggingface_hub.InferenceClient` and huggingface.js send: `{"inputs": ..., "parameters": {...}}`.

A list of inputs is several items; the answer is a list in the same order. The object counts also where the
body does not say that it is JSON, because `curl -d` says of every body that it is a form. A form with a
field `inputs` is such an object, too (`http/forms.py`). Images and sound are base64 (`models/media.py`).

Not here: which parameters exist (`models/tasks.py`).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import orjson

from serving_kit.errors import InputRejected, MalformedRequest
from serving_kit.events import Chunk, Done
from serving_kit.http.access import Headers
from serving_kit.http.dialects.base import (
    EVENT_STREAM,
    DecodedRequest,
    Dialect,
    Prediction,
    Streaming,
    is_json,
    json_fragments,
    media_type,
    takes_media,
)
from serving_kit.http.forms import MEMBERS, read_multipart, read_urlencoded
from serving_kit.http.openapi import Schema, Subject
from serving_kit.http.strict_json import decode_text, dump_json, parse_json
from serving_kit.values import shown

if TYPE_CHECKING:
    from serving_kit.models.text_pieces import Piece

# Parameters of text-generation-inference without an equal here. Clients send them as false or null.
_NOT_SUPPORTED = (
    "watermark",
    "best_of",
    "decoder_input_details",
    "frequency_penalty",
    "grammar",
    "adapter_id",
    "top_n_tokens",
    "truncate",
)
_URLENCODED = "application/x-www-form-urlencoded"


def _unchanged(answer: object) -> object:
    return answer


def _label_scores(answer: object) -> object:
    """Zero-shot classification: pairs, where the pipeline has two lists."""
    if not isinstance(answer, Mapping):
        return answer
    pairs = zip(answer["labels"], answer["scores"], strict=True)
    return [{"label": label, "score": score} for label, score in pairs]


def _pipeline_parameters(given: dict[str, object]) -> dict[str, object]:
    """The pipeline's parameters for those of text-generation-inference.

    Raises:
        InputRejected: one that is not supported asks for something.
    """
    for name in _NOT_SUPPORTED:
        if given.get(name):
            raise InputRejected(f"{name} is not supported by this server; leave it out")
    own = {name: value for name, value in given.items() if name not in _NOT_SUPPORTED}
    if (stop := own.pop("stop", None)) not in (None, []):
        if "stop_sequence" in own:
            raise MalformedRequest("stop and stop_sequence mean the same; send one of them")
        own["stop_sequence"] = stop
    return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True, slots=True)
class _Shape:
    """Where the clients expect of a task something else than what its pipeline does.

    Attributes:
        defaults: Parameters.
        parameters: Makes the pipeline's parameters of the clients'.
        in_list: Whether the answer to a single input is in a list, of which they take the first.
        answer: Makes the clients' answer of the pipeline's.
    """

    defaults: Mapping[str, object] = field(default_factory=dict)
    in_list: bool = False
    answer: Callable[[object], object] = _unchanged
    parameters: Callable[[dict[str, object]], dict[str, object]] | None = None


_SHAPES: Mapping[str, _Shape] = {
    "text-classification": _Shape(in_list=True),
    "token-classification": _Shape({"aggregation_strategy": "simple"}),  # only grouping gives entity_group
    "zero-shot-classification": _Shape(answer=_label_scores),
    "text-generation": _Shape(parameters=_pipeline_parameters),
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
            "stream": {"type": ["boolean", "null"], "description": "Text generation only."},
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
        if name not in MEMBERS and name != "stream":
            raise MalformedRequest(f"unknown member {name[:60]!r}; the body has inputs and parameters")
    parameters = document.get("parameters")
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        raise MalformedRequest(f"parameters must be an object, got {type(parameters).__name__}")
    inputs = document["inputs"]
    if inputs is None or inputs in ("", [], {}):
        raise MalformedRequest("inputs is empty")
    shape = _SHAPES.get(task, _PIPELINE_SHAPE)
    parameters = {**shape.defaults, **parameters}
    if shape.parameters is not None:
        parameters = shape.parameters(parameters)
    if _is_streamed(document, task):
        if isinstance(inputs, list):
            raise MalformedRequest("a stream answers one input; send a string instead of a list")
        return DecodedRequest(
            [inputs], {"return_full_text": False, **parameters, "details": True}, stream=True
        )
    if isinstance(inputs, list):
        return DecodedRequest(inputs, parameters, many=True)
    return DecodedRequest([inputs], parameters)


def _is_streamed(document: Mapping[str, object], task: str) -> bool:
    streamed = document.get("stream")
    if streamed not in (None, True, False):
        raise MalformedRequest(f"stream must be true or false, got {shown(streamed)}")
    if streamed and task != "text-generation":
        raise MalformedRequest(f"{task} has no streams; leave stream out")
    return bool(streamed)


async def documents(
    request: DecodedRequest, events: AsyncIterator[Chunk | Done], task: str
) -> AsyncIterator[object]:
    """One event for each piece of text, and one with the whole text and its details."""
    index = 0
    async for event in events:
        index += 1
        if isinstance(event, Chunk):
            piece = cast("Piece", event.value)
            token = {"id": piece.token, "text": piece.text, "logprob": piece.logprob, "special": False}
            yield {"index": index, "token": token, "generated_text": None, "details": None}
        else:
            answer = cast("list[dict[str, Any]]", event.value)[0]
            details = answer["details"]
            last = details["tokens"][-1]
            yield {
                "index": index,
                "token": {**last, "text": "", "special": True},
                "generated_text": answer["generated_text"],
                "details": {
                    "finish_reason": details["finish_reason"],
                    "generated_tokens": details["generated_tokens"],
                    "input_length": details["prompt_tokens"],
                    "seed": details["seed"],
                },
            }


HUGGING_FACE = Dialect(
    predictions=(
        Prediction(
            "/",
            "Ask the model.",
            "predict",
            decode,
            encode,
            accepts,
            streaming=Streaming(EVENT_STREAM, documents),
        ),
    ),
)
