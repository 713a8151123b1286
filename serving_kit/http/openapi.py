"""The HTTP contract as an OpenAPI 3.1 document: what `GET /openapi.json` answers.

Each route describes itself (`Endpoint.describe`), with the helpers here; `document` puts them together. The
settings come from `settings.py` and the parameters of a task from `models/tasks.py`, so that each is
written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serving_kit.settings import settings_schema

if TYPE_CHECKING:
    from serving_kit.http.endpoints import Endpoint

Schema = Mapping[str, object]  # a JSON schema
Content = Mapping[str, Schema]  # media type: its schema

TEXT: Schema = {"type": "string"}
OBJECT: Schema = {"type": "object"}
SETTINGS: Schema = {"$ref": "#/components/schemas/Settings"}
INCIDENTS: Schema = {"type": "array", "items": {"$ref": "#/components/schemas/Incident"}}
PROBLEM: Content = {"application/problem+json": {"$ref": "#/components/schemas/Problem"}}
# The statuses that any request may get, and those of a request whose body is read.
ACCESS_STATUSES = (401, 403)
BODY_STATUSES = (400, 401, 403, 408, 413, 422)
PREDICTION_STATUSES = (*BODY_STATUSES, 415, 429, 500, 503, 504)
_ERRORS: Mapping[int, str] = {
    400: "The request cannot be read; the text says what is wrong.",
    401: "The bearer token is missing or wrong.",
    403: "A page from another site, a name that this server does not know, or a server without a token.",
    408: "The body did not arrive in time.",
    413: "The body or its list of inputs exceeds a bound; the text names it.",
    415: "The body is a form that this task does not take; the text says how to send it.",
    422: "The model cannot take this input, or a setting cannot take this value.",
    429: "Overloaded, where overload_status is 429.",
    500: "The model failed; the owner finds the details under the incident id.",
    503: "Overloaded, stopping or broken; Retry-After is there when it is known.",
    504: "The deadline of the request has passed.",
}


@dataclass(frozen=True, slots=True)
class Subject:
    """What the document is about.

    Attributes:
        task: A task of `models/tasks.py`, or another word for a function.
        model: Its name.
        version: Of the package.
        parameters: The JSON schema of the object of call parameters; None: any object.
    """

    task: str
    model: str
    version: str
    parameters: Schema | None = None


Describe = Callable[[Subject], dict[str, object]]  # makes the operation object of one route


def document(subject: Subject, endpoints: Iterable[Endpoint]) -> dict[str, object]:
    """The document for a server with these routes."""
    paths: dict[str, dict[str, object]] = {}
    for each in endpoints:
        paths.setdefault(each.path, {})[each.method.lower()] = each.describe(subject)
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{subject.model} ({subject.task})", "version": subject.version},
        "paths": paths,
        "components": {"securitySchemes": _SECURITY_SCHEMES, "schemas": _schemas()},
    }


def operation(
    summary: str,
    answers: Mapping[int, tuple[str, Content]],
    errors: Iterable[int] = ACCESS_STATUSES,
    *,
    body: Content | None = None,
    parameters: Iterable[Schema] = (),
    operation_id: str = "",
    owner: bool = False,
    error_content: Content = PROBLEM,
) -> dict[str, object]:
    """One operation object.

    Args:
        summary: One sentence.
        answers: What each status of success, or of a state, means, and what is sent with it.
        errors: The statuses of errors.
        body: What the request has to send.
        parameters: Of the query and the head.
        operation_id: For generators of clients.
        owner: Whether it takes the token.
        error_content: The body of an error.
    """
    described: dict[str, object] = {"summary": summary}
    if operation_id:
        described["operationId"] = operation_id
    if owner:
        described["security"] = [{"token": []}]
    if parameters:
        described["parameters"] = list(parameters)
    if body is not None:
        described["requestBody"] = {"required": True, "content": _content(body)}
    responses = {
        str(status): {"description": text, "content": _content(content)}
        for status, (text, content) in answers.items()
    }
    described["responses"] = responses | _error_responses(errors, error_content)
    return described


def get(
    summary: str,
    content: Content,
    *,
    owner: bool = False,
    parameters: Iterable[Schema] = (),
    error_content: Content = PROBLEM,
) -> Describe:
    """For a route of GET that answers 200 to whoever may ask."""
    described = operation(
        summary, {200: (summary, content)}, owner=owner, parameters=parameters, error_content=error_content
    )
    return lambda subject: described


def probe(summary: str, fails: str) -> Describe:
    """For a route that every client may ask, and that answers 200 or 503."""
    answers = {200: ("It can.", json_content(OBJECT)), 503: (fails, json_content(OBJECT))}
    described = operation(summary, answers, (403,))
    return lambda subject: described


def json_content(schema: Schema) -> Content:
    """A JSON body of this schema."""
    return {"application/json": schema}


def one_of(bodies: Iterable[Content]) -> Content:
    """What any of several dialects takes at one path."""
    schemas: dict[str, list[Schema]] = {}
    for body in bodies:
        for kind, schema in body.items():
            schemas.setdefault(kind, []).append(schema)
    return {kind: each[0] if len(each) == 1 else {"oneOf": each} for kind, each in schemas.items()}


def _content(content: Content) -> dict[str, object]:
    return {kind: {"schema": schema} for kind, schema in content.items()}


def _error_responses(statuses: Iterable[int], content: Content) -> dict[str, object]:
    problem = _content(content)
    return {str(status): {"description": _ERRORS[status], "content": problem} for status in sorted(statuses)}


def _schemas() -> dict[str, object]:
    return {
        "Settings": {"type": "object", "additionalProperties": False, "properties": settings_schema()},
        "Incident": _INCIDENT,
        "Problem": _PROBLEM,
    }


_SECURITY_SCHEMES: Schema = {
    "token": {
        "type": "http",
        "scheme": "bearer",
        "description": "For settings and failures; from another machine for everything.",
    }
}
_INCIDENT: Schema = {
    "type": "object",
    "required": ["id", "wall", "outcome", "error", "traceback", "request_ids"],
    "properties": {
        "id": TEXT,
        "wall": {"type": "number", "description": "Seconds since the epoch."},
        "outcome": TEXT,
        "error": {"type": "string", "description": "Class and text, shortened."},
        "traceback": {"type": "string", "description": "Shortened."},
        "request_ids": {
            "type": "array",
            "items": TEXT,
            "description": "The first requests that it ended.",
        },
    },
}
_PROBLEM: Schema = {
    "type": "object",
    "required": ["title", "status", "detail", "error", "error_type", "request_id"],
    "properties": {
        "type": TEXT,
        "title": TEXT,
        "status": {"type": "integer"},
        "detail": TEXT,
        "error": TEXT,
        "error_type": TEXT,
        "request_id": TEXT,
        "incident": TEXT,
        "dropped": {"type": "boolean", "description": "It was admitted, and ended for lack of time."},
    },
}
