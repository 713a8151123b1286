"""What OpenAI's clients send for text generation: `/v1/completions`, `/v1/chat/completions`, `/v1/models`.

    prompt or messages ── decode ──▶ one value for each choice ── answers, events ──▶ choices, chunks

A server has one model, so that any name of a model is taken, and given back. Members that this server does
not support are refused by their name, unless they ask for nothing. The tokens of a prompt count once for each
of `n` choices, because each is computed.

Not here: stop strings in a text (`stop_strings.py`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from starlette.requests import Request
from starlette.responses import Response

from serving_kit.errors import MalformedRequest
from serving_kit.events import Chunk, Done
from serving_kit.http import openapi
from serving_kit.http.access import Headers
from serving_kit.http.dialects.base import DecodedRequest, Dialect, Prediction, StreamFormat, Streaming
from serving_kit.http.dialects.stop_strings import StopStrings
from serving_kit.http.endpoints import SERVICE, Endpoint
from serving_kit.http.openapi import Schema, Subject
from serving_kit.http.problems import Problem
from serving_kit.http.strict_json import dump_json, parse_json
from serving_kit.values import shown

if TYPE_CHECKING:
    from serving_kit.models.text_pieces import Piece

_TASK = "text-generation"
_FORMAT = StreamFormat("text/event-stream", b"data: ", b"\n\n", b"data: [DONE]\n\n")
_MOST_CHOICES = 16
_MOST_STOPS = 8
# Name here: name of the pipeline's parameter. Bounds are those of `models/tasks.py`.
_PASSED_ON = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "seed": "seed",
}
_HANDLED = frozenset({"model", "prompt", "messages", "n", "stop", "stream", "stream_options", "logprobs"})
_WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)
# Refused, unless the value asks for what happens anyway.
_ONLY: Mapping[str, tuple[object, ...]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
}


_ERROR: openapi.Content = {
    "application/json": {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "object", "required": ["message", "type", "param", "code"]}},
    }
}


class _Route(NamedTuple):
    """What differs between chat and completions."""

    chat: bool
    prefix: str  # of the id
    object: str
    chunk_object: str


_CHAT = _Route(True, "chatcmpl-", "chat.completion", "chat.completion.chunk")
_COMPLETION = _Route(False, "cmpl-", "text_completion", "text_completion")


def _decoder(route: _Route) -> Callable[[bytes, Headers, str], DecodedRequest]:
    def decode(body: bytes, headers: Headers, task: str) -> DecodedRequest:
        """Read a request.

        Raises:
            MalformedRequest: what is wrong with it, or not supported.
        """
        document = parse_json(body)
        if not isinstance(document, dict):
            raise MalformedRequest("the body must be a JSON object")
        if task != _TASK:
            raise MalformedRequest(f"this server answers {task}, not text generation; POST / asks it")
        _refuse_unsupported(document)
        given = {name: value for name, value in document.items() if value is not None}
        values = [_messages(given)] if route.chat else _prompts(given)
        choices, streamed = _whole(given, "n", 1, _MOST_CHOICES), _flag(given, "stream")
        if streamed and len(values) * choices > 1:
            raise MalformedRequest("a stream has one choice here; leave n out, and send one prompt")
        if choices > 1 and "seed" in given:
            raise MalformedRequest("n choices with one seed would be equal; leave n or seed out")
        usage = given.get("stream_options", {})
        if not isinstance(usage, dict):
            raise MalformedRequest(f"stream_options must be an object, got {shown(usage)}")
        stops = _stops(given)
        options: dict[str, object] = {
            "model": str(given.get("model") or "default")[:1000],
            "stops": stops,
            "include_usage": bool(usage.get("include_usage")),
            "logprobs": given.get("logprobs") not in (None, False),
            "id": route.prefix + secrets.token_hex(12),
            "created": int(time.time()),
        }
        repeated = [value for value in values for _ in range(choices)]
        parameters = _parameters(given, stops, "details" if options["logprobs"] else "usage")
        return DecodedRequest(repeated, parameters, streamed, streamed, options)

    return decode


def _refuse_unsupported(document: Mapping[str, object]) -> None:
    known = {*_PASSED_ON, *_HANDLED, *_WITHOUT_EFFECT, *_ONLY}
    for name, value in document.items():
        if name not in known:
            raise MalformedRequest(f"{name[:60]!r} is not supported by this server")
        if value is not None and name in _ONLY and value not in _ONLY[name]:
            allowed = " or ".join(map(repr, _ONLY[name]))
            raise MalformedRequest(f"{name} is not supported by this server, except as {allowed}")


def _parameters(given: Mapping[str, object], stops: Sequence[str], more: str) -> dict[str, object]:
    parameters = {own: given[name] for name, own in _PASSED_ON.items() if name in given}
    if "temperature" in parameters:
        parameters["do_sample"] = bool(parameters["temperature"])
        if not parameters["temperature"]:
            del parameters["temperature"]
    if stops:
        parameters["stop_sequence"] = list(stops)
    return {**parameters, "return_full_text": False, more: True}


def _prompts(given: Mapping[str, object]) -> list[object]:
    prompt = given.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or not all(isinstance(each, str) and each for each in prompts):
        raise MalformedRequest("prompt must be a text or a list of texts, none of them empty; no token ids")
    return prompts


def _messages(given: Mapping[str, object]) -> list[object]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise MalformedRequest("messages must be a list of objects with role and content")
    return [_message(each) for each in messages]


def _message(message: object) -> dict[str, object]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise MalformedRequest(f"a message is an object with role and content, got {shown(message)}")
    content = message.get("content")
    if isinstance(content, list):  # parts, of which only those of text are taken
        texts = [each.get("text") if isinstance(each, dict) else None for each in content]
        if not all(isinstance(each, str) for each in texts):
            raise MalformedRequest("the content of a message must be text; this model takes nothing else")
        content = "".join(cast("list[str]", texts))
    if not isinstance(content, str):
        raise MalformedRequest(f"the content of a message must be text, got {shown(content)}")
    return {**message, "content": content}


def _stops(given: Mapping[str, object]) -> list[str]:
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    valid = isinstance(stops, list) and all(isinstance(each, str) and each for each in stops)
    if not valid or len(cast("list[str]", stops)) > _MOST_STOPS:
        raise MalformedRequest(f"stop must be a text or a list of at most {_MOST_STOPS} texts, none empty")
    return cast("list[str]", stops)


def _whole(given: Mapping[str, object], name: str, low: int, high: int) -> int:
    value = given.get(name, low)
    if type(value) is not int or not low <= value <= high:
        raise MalformedRequest(f"{name} must be a whole number from {low} to {high}, got {shown(value)}")
    return value


def _flag(given: Mapping[str, object], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise MalformedRequest(f"{name} must be true or false, got {shown(value)}")
    return value


def _encoder(route: _Route) -> Any:
    async def encode(request: DecodedRequest, answers: Sequence[object], task: str) -> bytes:
        """All choices, and the tokens of all of them."""
        texts = [cast("list[dict[str, Any]]", answer)[0] for answer in answers]
        choices = [_choice(route, request, index, text) for index, text in enumerate(texts)]
        usage = _usage([text["details"] for text in texts])
        return dump_json({**_head(request, route.object), "choices": choices, "usage": usage})

    return encode


def _choice(
    route: _Route, request: DecodedRequest, index: int, answer: Mapping[str, Any]
) -> dict[str, object]:
    details = answer["details"]
    cut = StopStrings(request.options["stops"])
    text = cut.push(answer["generated_text"]) + cut.rest()
    own = {"message": {"role": "assistant", "content": text}} if route.chat else {"text": text}
    return {
        "index": index,
        **own,
        "logprobs": _logprobs(route, details["tokens"]) if request.options["logprobs"] else None,
        "finish_reason": _finish_reason(details, cut),
    }


def _logprobs(route: _Route, tokens: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    if route.chat:
        content = [
            {"token": each["text"], "logprob": each["logprob"], "bytes": None, "top_logprobs": []}
            for each in tokens
        ]
        return {"content": content}
    return {
        "tokens": [each["text"] for each in tokens],
        "token_logprobs": [each["logprob"] for each in tokens],
        "top_logprobs": None,
        "text_offset": None,
    }


def _finish_reason(details: Mapping[str, Any], cut: StopStrings) -> str:
    """A stop string that the last token has completed counts more than the length."""
    return "length" if details["finish_reason"] == "length" and not cut.stopped else "stop"


def _usage(details: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    prompt = sum(each["prompt_tokens"] for each in details)
    generated = sum(each["generated_tokens"] for each in details)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _head(request: DecodedRequest, kind: str) -> dict[str, object]:
    options = request.options
    return {"id": options["id"], "object": kind, "created": options["created"], "model": options["model"]}


def _chunker(route: _Route) -> Any:
    async def documents(
        request: DecodedRequest, events: AsyncIterator[Chunk | Done], task: str
    ) -> AsyncIterator[object]:
        """A chunk for each piece of text, one with the reason of the end, one with the usage if asked for."""
        head, cut = _head(request, route.chunk_object), StopStrings(request.options["stops"])

        def chunk(text: str, finish: str | None = None, tokens: Sequence[Mapping[str, Any]] = ()) -> object:
            own = {"delta": {"content": text} if text else {}} if route.chat else {"text": text}
            logprobs = _logprobs(route, tokens) if request.options["logprobs"] and tokens else None
            return {**head, "choices": [{"index": 0, **own, "logprobs": logprobs, "finish_reason": finish}]}

        begun = not route.chat
        async for event in events:
            if not begun:
                begun = True
                delta = {"role": "assistant", "content": ""}
                first = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
                yield {**head, "choices": [first]}
            if isinstance(event, Chunk):
                piece = cast("Piece", event.value)
                if text := cut.push(piece.text):
                    yield chunk(text, tokens=[{"text": piece.text, "logprob": piece.logprob}])
                continue
            details = cast("list[dict[str, Any]]", event.value)[0]["details"]
            if rest := cut.rest():
                yield chunk(rest)
            yield chunk("", _finish_reason(details, cut))
            if request.options["include_usage"]:
                yield {**head, "choices": [], "usage": _usage([details])}

    return documents


def error(problem: Problem) -> tuple[object, str]:
    """OpenAI's shape. Its clients show `message`, and try again by the status."""
    kind = "invalid_request_error" if problem.status < 429 else "server_error"
    document = {
        "message": problem.full_text,
        "type": {401: "authentication_error", 429: "rate_limit_error"}.get(problem.status, kind),
        "param": None,
        "code": problem.error_type,
        "request_id": problem.request_id,
    }
    return {"error": document}, "application/json"


async def models(request: Request) -> Response:
    """GET /v1/models: the one model."""
    service = request.scope[SERVICE]
    model = {"id": service.model_name, "object": "model", "created": 0, "owned_by": "serving-kit"}
    return Response(dump_json({"object": "list", "data": [model]}), media_type="application/json")


def _accepts(member: str) -> Callable[[Subject], Mapping[str, Schema]]:
    def accepts(subject: Subject) -> Mapping[str, Schema]:
        names = sorted({*_PASSED_ON, *_HANDLED, *_WITHOUT_EFFECT, *_ONLY} - {"prompt", "messages"})
        properties: dict[str, object] = {member: {"description": "The prompt."}}
        properties |= {name: {} for name in names}
        return {"application/json": {"type": "object", "required": [member], "properties": properties}}

    return accepts


def _prediction(route: _Route, path: str, summary: str, operation_id: str, member: str) -> Prediction:
    return Prediction(
        path,
        summary,
        operation_id,
        _decoder(route),
        _encoder(route),
        _accepts(member),
        streaming=Streaming(_FORMAT, _chunker(route), error),
    )


OPENAI = Dialect(
    predictions=(
        _prediction(_CHAT, "/v1/chat/completions", "Continue a chat.", "chat", "messages"),
        _prediction(_COMPLETION, "/v1/completions", "Continue a text.", "complete", "prompt"),
    ),
    error=error,
    error_content=_ERROR,
    endpoints=(
        Endpoint(
            "GET",
            "/v1/models",
            models,
            openapi.get("The model, in a list.", openapi.json_content(openapi.OBJECT), error_content=_ERROR),
            error=error,
        ),
    ),
)
