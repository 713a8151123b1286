"""The way of a request to the model: read the body, decode it, predict, encode the answers, send.

    receive ── read_body ──▶ dialect.decode ──▶ service.predict ──▶ dialect.encode ──▶ send

Every error leaves as a `ServingError`; `middleware.py` answers it.

Not here: shapes of bodies (`dialects/`), what happens to a request (`service.py`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable

from starlette.types import Receive, Scope, Send

from serving_kit.errors import MalformedRequest, ServingError
from serving_kit.http import openapi
from serving_kit.http.access import Headers
from serving_kit.http.bodies import read_body
from serving_kit.http.client_watch import ClientWatch
from serving_kit.http.dialects.base import DecodedRequest, Dialect, Prediction, StreamFormat, Streaming
from serving_kit.http.endpoints import REQUEST_ID, SERVICE, Endpoint
from serving_kit.http.openapi import Subject
from serving_kit.http.problems import error_problem
from serving_kit.service import Service, Ticket

_DECIMAL = re.compile(rb"[0-9]{1,15}(\.[0-9]{1,15})?")
_TIMEOUT_HEADER: openapi.Schema = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "schema": {"type": "number", "exclusiveMinimum": 0},
    "description": "Give up after this long, or timeout_ms; plain decimal digits.",
}


class Predict:
    """The ASGI app of one path.

    Without Starlette's request and response, which cost as much as reading and writing them.
    """

    def __init__(self, predictions: Iterable[Prediction]) -> None:
        self._predictions = tuple(predictions)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; the ASGI interface."""
        service: Service = scope[SERVICE]
        headers: Headers = dict(scope["headers"])
        with service.observe(scope[REQUEST_ID]) as ticket:
            ticket.limit(requested_timeout_s(headers))
            with ClientWatch(receive, ticket.deadline - service.clock(), ticket.limit_text) as watch:
                body = await read_body(
                    scope,
                    headers,
                    receive,
                    service.max_body_bytes,
                    hold=ticket.hold,
                    setting="max_body_bytes",
                )
                watch.body_arrived()
                prediction, request = decode_body(self._predictions, body, headers, service.task)
                if request.stream and prediction.streaming is not None:
                    await _send_stream(prediction.streaming, request, ticket, send)
                    return
                answers = await service.predict(request.values, request.parameters, ticket)
                answer = await prediction.encode(request, answers, service.task)
        head = [(b"content-length", b"%d" % len(answer)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": answer})


async def _send_stream(streaming: Streaming, request: DecodedRequest, ticket: Ticket, send: Send) -> None:
    """Send the answer to the one value of a request in frames.

    The head waits for the first frame, so that a request that is refused gets the status of that. An error
    behind it is the last frame.

    Raises:
        ServingError: as `Service.stream`.
    """
    service, write = ticket.service, streaming.format
    events = service.stream(request.values[0], request.parameters, ticket, service.settings.stream_timeout_s)
    started = False
    async with contextlib.aclosing(events):
        try:
            async for document in streaming.documents(request, events, service.task):
                frame = write.frame(document)
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": _head(write)})
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        except ServingError as error:
            if started:
                problem = error_problem(error, ticket.request_id, service)
                last = write.frame(streaming.error(problem)[0])
                await send({"type": "http.response.body", "body": last})
            raise
    await send({"type": "http.response.body", "body": write.end})


def _head(streamed: StreamFormat) -> list[tuple[bytes, bytes]]:
    """Headers of a stream, which no proxy is to keep or to collect."""
    return [
        (b"content-type", streamed.content_type.encode()),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]


def decode_body(
    predictions: Iterable[Prediction], body: bytes, headers: Headers, task: str
) -> tuple[Prediction, DecodedRequest]:
    """The first of several predictions whose shape the body has, and the request in it.

    Raises:
        MalformedRequest: what is wrong with the body.
    """
    for prediction in predictions:
        request = prediction.decode(body, headers, task)
        if request is not None:
            return prediction, request
    raise MalformedRequest("the body has no shape that this route takes; see GET /openapi.json")


def prediction_endpoints(dialects: Iterable[Dialect]) -> list[Endpoint]:
    """One endpoint for each path of the dialects."""
    by_path: dict[str, list[tuple[Dialect, Prediction]]] = {}
    for dialect in dialects:
        for prediction in dialect.predictions:
            by_path.setdefault(prediction.path, []).append((dialect, prediction))
    return [_endpoint(pairs[0][0], [prediction for _, prediction in pairs]) for pairs in by_path.values()]


def _endpoint(dialect: Dialect, predictions: list[Prediction]) -> Endpoint:
    first = predictions[0]
    content = dict(openapi.json_content(first.returns))
    for each in predictions:
        if each.streaming is not None:
            content[each.streaming.format.content_type] = openapi.TEXT

    def describe(subject: Subject) -> dict[str, object]:
        return openapi.operation(
            first.summary,
            {200: ("What the pipeline returns.", content)},
            openapi.PREDICTION_STATUSES,
            body=openapi.one_of(each.accepts(subject) for each in predictions),
            parameters=[_TIMEOUT_HEADER],
            operation_id=first.operation_id,
            error_content=dialect.error_content,
        )

    return Endpoint("POST", first.path, None, describe, app=Predict(predictions), error=dialect.error)


def requested_timeout_s(headers: Headers) -> float | None:
    """Seconds that the client allows (`X-Request-Timeout-Ms`); None: it does not say.

    Raises:
        MalformedRequest: it is not a positive number.
    """
    asked = headers.get(b"x-request-timeout-ms")
    if asked is None:
        return None
    milliseconds = float(asked) if _DECIMAL.fullmatch(asked) else 0.0
    if milliseconds <= 0:
        raise MalformedRequest(
            "X-Request-Timeout-Ms must be a number of milliseconds above 0 in plain decimal digits, like 250"
        )
    return milliseconds / 1000
