"""Errors as HTTP: the table of statuses, and the body of RFC 9457.

    ServingError ─┐
    Denied ───────┼──▶ Problem ── ErrorShape of the dialect ──▶ body
    HTTPException ┘

Not here: sending the response (`middleware.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.responses import Response

from serving_kit.errors import (
    ClientGone,
    DeadlineExceeded,
    InputRejected,
    MalformedRequest,
    ModelFailed,
    Overloaded,
    RequestTooLarge,
    ServingError,
    SlowRequest,
    Unavailable,
    UnsupportedMediaType,
    error_text,
)
from serving_kit.http.access import Denied
from serving_kit.http.strict_json import dump_json
from serving_kit.service import Service

# Looked up along the class's bases, so that a new kind of error has its parent's status.
STATUS: Mapping[type, tuple[int, str]] = {
    ServingError: (500, "server_failed"),
    MalformedRequest: (400, "malformed_request"),
    RequestTooLarge: (413, "request_too_large"),
    SlowRequest: (408, "slow_request"),
    UnsupportedMediaType: (415, "unsupported_media_type"),
    InputRejected: (422, "input_rejected"),
    Overloaded: (503, "overloaded"),  # or 429: the setting overload_status
    Unavailable: (503, "unavailable"),
    DeadlineExceeded: (504, "deadline_exceeded"),
    ClientGone: (499, "client_gone"),
    ModelFailed: (500, "model_failed"),
}
_HTTP_ERROR = "http_error"  # the error type of what HTTP itself and the rules of access reject
_MAX_RETRY_S = 30  # clients give up above 120; a queue that long is better polled


@dataclass(frozen=True, slots=True)
class Problem:
    """What a client learns of an error, before a dialect gives it a shape."""

    status: int
    error_type: str
    text: str
    request_id: str
    incident: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    dropped: bool = False  # it had been admitted, and ended for lack of time

    @property
    def title(self) -> str:
        """The phrase of the status."""
        if self.status == 499:  # nginx's status, not one of HTTP
            return "Client Closed Request"
        return HTTPStatus(self.status).phrase

    @property
    def full_text(self) -> str:
        """The text, with the id under which the owner finds the details."""
        return self.text if self.incident is None else f"{self.text} (incident {self.incident})"


ErrorShape = Callable[[Problem], tuple[object, str]]  # to a JSON document and its media type


def problem_json(problem: Problem) -> tuple[object, str]:
    """RFC 9457, with the members that Hugging Face's clients read (`error`, `error_type`)."""
    document = {
        "type": "about:blank",
        "title": problem.title,
        "status": problem.status,
        "detail": problem.full_text,
        "error": problem.full_text,
        "error_type": problem.error_type,
        "request_id": problem.request_id,
    }
    if problem.incident is not None:
        document["incident"] = problem.incident
    if problem.dropped:
        document["dropped"] = True
    return document, "application/problem+json"


def response(problem: Problem, shape: ErrorShape = problem_json) -> Response:
    """The response with this problem."""
    document, media_type = shape(problem)
    return Response(dump_json(document), problem.status, dict(problem.headers), media_type)


def denied_problem(denied: Denied, request_id: str) -> Problem:
    """The problem of a request that may not ask."""
    return Problem(denied.status, _HTTP_ERROR, denied.text, request_id, headers=denied.headers)


def error_problem(error: Exception, request_id: str, service: Service | None) -> Problem:
    """The problem of an exception. One that is no `ServingError` becomes an incident of the service.

    Args:
        error: What a route has raised.
        request_id: Of the request.
        service: None: it is not started.
    """
    if isinstance(error, HTTPException):
        return _http_problem(error, request_id)
    if isinstance(error, ServingError):
        return _serving_problem(error, request_id, service)
    failed = ModelFailed("the server failed on this request", detail=error_text(error))
    if service is not None:
        service.telemetry.route_failed(failed, error, request_id)
    return _serving_problem(failed, request_id, service)


def _http_problem(error: HTTPException, request_id: str) -> Problem:
    headers, text = error.headers or {}, error.detail
    if error.status_code == 404:
        text = "there is nothing here; POST / asks the model, GET /openapi.json lists the rest"
    elif error.status_code == 405:
        text = f"this route takes {headers.get('allow', 'another method')}"
    return Problem(error.status_code, _HTTP_ERROR, text, request_id, headers=headers)


def _serving_problem(error: ServingError, request_id: str, service: Service | None) -> Problem:
    status, error_type = next(STATUS[each] for each in type(error).__mro__ if each in STATUS)
    text, headers = str(error), {}
    if isinstance(error, Overloaded):
        if error.retry_after is not None:
            headers["retry-after"] = str(min(max(1, math.ceil(error.retry_after)), _MAX_RETRY_S))
        if service is not None and not isinstance(error, Unavailable):
            status = service.settings.overload_status
    if error.detail and service is not None and service.settings.expose_errors:
        text = f"{text}: {error.detail}"
    return Problem(status, error_type, text, request_id, error.incident, headers, error.dropped)
