"""What a dialect is: how one kind of client writes its requests and reads its answers.

    body, headers ── decode ──▶ DecodedRequest ── service.predict ──▶ answers ── encode ──▶ body
                                                                      chunks  ── stream ──▶ frames

A dialect is one module: functions, and at its end one `Dialect` that names them. `http/dialects/__init__.py`
lists them, and everything else follows from that list: routes, the OpenAPI document, the shape of errors.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from serving_kit.events import Chunk, Done
from serving_kit.http.access import Headers
from serving_kit.http.endpoints import Endpoint
from serving_kit.http.openapi import PROBLEM, Content, Schema, Subject
from serving_kit.http.problems import ErrorShape, problem_json
from serving_kit.http.strict_json import dump_json
from serving_kit.models.tasks import TASKS

_LONG_CHUNK = 100_000  # bytes of JSON, written in about 0.1 ms


@dataclass(frozen=True, slots=True)
class DecodedRequest:
    """A request as the service takes it.

    Attributes:
        values: The inputs, one item each.
        parameters: Call parameters, for all of them.
        many: Whether the client sent a list, and gets one.
        stream: Whether it takes the answer to its one value in pieces.
        options: What the dialect itself needs for the answer.
    """

    values: list[object]
    parameters: dict[str, object]
    many: bool = False
    stream: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StreamFormat:
    """How the chunks of a stream become frames of the body: one JSON document in each.

    Attributes:
        content_type: Of the whole body.
        before: Bytes before each document.
        after: Bytes after each document.
        end: The last frame of a complete stream; empty: none.
    """

    content_type: str
    before: bytes
    after: bytes
    end: bytes = b""

    def frame(self, document: object) -> bytes:
        """One chunk, or an error, as bytes of the body.

        Raises:
            ModelFailed: JSON has no such value.
        """
        return self.before + dump_json(document) + self.after


# One line each: compact JSON has no others.
EVENT_STREAM = StreamFormat("text/event-stream", b"data: ", b"\n\n")


@dataclass(frozen=True, slots=True)
class Streaming:
    """How a dialect writes a stream.

    Attributes:
        format: Of the body.
        documents: Request, events of the service, and task to the documents of the frames. Each event gives
            its documents before the next one is awaited.
        error: The shape of an error behind the first frame.
    """

    format: StreamFormat
    documents: Callable[[DecodedRequest, AsyncIterator[Chunk | Done], str], AsyncIterator[object]]
    error: ErrorShape = problem_json


Decode = Callable[[bytes, Headers, str], DecodedRequest | None]
Encode = Callable[[DecodedRequest, Sequence[object], str], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A route of POST that asks the model. Several dialects may share its path.

    Attributes:
        path: Under the app's prefix.
        summary: One sentence for the OpenAPI document.
        operation_id: Its name in the OpenAPI document.
        decode: Body, headers and task to a request. None: the body has another dialect's shape, and the
            next dialect of this path is asked. Raises `MalformedRequest` or one of its subclasses.
        encode: Request, answers in the order of its values, and task to the body, which is JSON. Raises
            `ModelFailed` for an answer that cannot be written.
        accepts: The JSON schema of each media type that it takes.
        returns: The JSON schema of the answer.
        streaming: How a stream is written; None: `decode` never asks for one.
    """

    path: str
    summary: str
    operation_id: str
    decode: Decode
    encode: Encode
    accepts: Callable[[Subject], Mapping[str, Schema]]
    returns: Schema = field(default_factory=dict)
    streaming: Streaming | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """One kind of client.

    Attributes:
        predictions: The routes that ask the model.
        error: The shape of an error on its routes. Dialects that share a path share this, too: an error
            may arise before the body is read.
        error_content: The media type and the JSON schema of that.
        endpoints: Its other routes.
    """

    predictions: tuple[Prediction, ...]
    error: ErrorShape = problem_json
    error_content: Content = field(default_factory=lambda: PROBLEM)
    endpoints: tuple[Endpoint, ...] = ()


def media_type(headers: Headers) -> str:
    """The body's media type in lower case, without its options; empty: not given."""
    return _media_type(headers.get(b"content-type", b""))


@functools.lru_cache(maxsize=64)
def _media_type(content_type: bytes) -> str:
    return content_type.decode("latin-1").partition(";")[0].strip().lower()


def is_json(kind: str) -> bool:
    """Whether bodies of this media type are JSON."""
    return kind == "application/json" or kind.endswith("+json")


def takes_media(task: str) -> bool:
    """Whether the task's inputs are images or sound."""
    return task in TASKS and TASKS[task].media is not None


async def json_fragments(answers: Iterable[object]) -> list[orjson.Fragment]:
    """Each answer as JSON, to be put into the document around them; `orjson.dumps` joins both.

    Embeddings are megabytes of JSON: the event loop runs other tasks between two long answers.

    Raises:
        ModelFailed: an answer cannot be written as JSON.
    """
    fragments = []
    for answer in answers:
        document = dump_json(answer)
        fragments.append(orjson.Fragment(document))
        if len(document) > _LONG_CHUNK:
            await asyncio.sleep(0)
    return fragments
