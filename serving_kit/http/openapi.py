"""The HTTP contract as an OpenAPI 3.1 document: what `GET /openapi.json` answers.

Written by hand, because the routes are few and their contract is fixed; the knobs come from
`settings.py`, so that they are said once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serving_kit.metrics import HISTORY_S
from serving_kit.models.tasks import TASKS, parameters_schema
from serving_kit.settings import settings_schema

_METRICS = {kind: {"schema": {"type": "string"}} for kind in ("text/plain", "application/openmetrics-text")}
_REFUSALS: Mapping[int, str] = {
    400: "The request cannot be read; the text says what is wrong.",
    401: "The bearer token is missing or wrong.",
    403: "A page from another site, a name that this server does not know, or no token to be had.",
    408: "The body did not arrive in time.",
    413: "The body or its list of inputs exceeds a bound; the text names it.",
    415: "The body is a form that this task does not take; the text says how to send it.",
    422: "The model cannot take this input, or a setting cannot take this value.",
    429: "Overloaded, where overload_status is 429.",
    500: "The model failed; the owner finds the details under the incident id.",
    503: "Overloaded, stopping or broken; Retry-After is there when it is known.",
    504: "The request's time was up.",
}


def describe(task: str, model: str, version: str) -> dict[str, Any]:
    """The document for a server of one model."""
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{model} ({task})", "version": version},
        "paths": {
            "/": {
                "post": {
                    "summary": "Ask the model.",
                    "operationId": "predict",
                    "parameters": [
                        {
                            "name": "X-Request-Timeout-Ms",
                            "in": "header",
                            "schema": {"type": "number", "exclusiveMinimum": 0},
                            "description": "Give up after this long, or timeout_ms; plain decimal digits.",
                        }
                    ],
                    "requestBody": {
                        "required": True,
                        "content": {
                            **_raw_content(task),
                            **_form_content(task),
                            "application/json": {"schema": {"$ref": "#/components/schemas/Inputs"}},
                        },
                    },
                    "responses": {
                        "200": _json_answer("What the pipeline returns.", {}),
                        **_refused(400, 401, 403, 408, 413, 415, 422, 429, 500, 503, 504),
                    },
                },
                "get": _get("The live panel as a page.", _text("text/html")),
            },
            "/panel.js": {"get": _get("The panel's own code.", _text("text/javascript"))},
            "/health": {
                "get": {
                    **_get("Whether the model can answer.", _object()),
                    "responses": {
                        "200": _json_answer("It can.", {"type": "object"}),
                        "503": _json_answer("It cannot; the reason.", {"type": "object"}),
                        **_refused(403),
                    },
                }
            },
            "/live": {
                "get": {
                    "summary": "Whether the process can go on without a restart.",
                    "responses": {
                        "200": _json_answer("It can.", {"type": "object"}),
                        "503": _json_answer(
                            "One forward has run longer than live_timeout_s.", {"type": "object"}
                        ),
                        **_refused(403),
                    },
                }
            },
            "/info": {"get": _get("Model, task, device, version.", _object())},
            "/stats": {
                "get": {
                    **_get("Everything that the panel shows.", _object()),
                    "parameters": [
                        {
                            "name": "series",
                            "in": "query",
                            "schema": {"type": "integer", "minimum": 0},
                            "description": f"Add an entry for each of so many seconds, {HISTORY_S} at most.",
                        }
                    ],
                }
            },
            "/metrics": {"get": _get("Prometheus metrics.", _METRICS)},
            "/settings": {
                "get": _get("The knobs in force.", _settings_content()),
                "patch": {
                    "summary": "Change some knobs, all or none.",
                    "operationId": "change_settings",
                    "security": [{"token": []}],
                    "requestBody": {"required": True, "content": _settings_content()},
                    "responses": {
                        "200": _json_answer("All knobs.", {"$ref": "#/components/schemas/Settings"}),
                        **_refused(400, 401, 403, 408, 413, 422),
                    },
                },
            },
            "/errors": {
                "get": {
                    "summary": "The latest failures, newest first.",
                    "security": [{"token": []}],
                    "responses": {
                        "200": _json_answer(
                            "With their tracebacks.",
                            {"type": "array", "items": {"$ref": "#/components/schemas/Incident"}},
                        ),
                        **_refused(401, 403),
                    },
                }
            },
        },
        "components": {
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "For settings and failures; from another machine for everything.",
                }
            },
            "schemas": {
                "Inputs": {
                    "oneOf": [
                        {"type": "string", "minLength": 1},
                        _inputs_object(parameters_schema(task)),
                    ]
                },
                "Settings": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": settings_schema(),
                },
                "Incident": {
                    "type": "object",
                    "required": ["id", "wall", "outcome", "error", "traceback", "request_ids"],
                    "properties": {
                        "id": {"type": "string"},
                        "wall": {"type": "number", "description": "Seconds since the epoch."},
                        "outcome": {"type": "string"},
                        "error": {"type": "string", "description": "Class and text, shortened."},
                        "traceback": {"type": "string", "description": "Shortened."},
                        "request_ids": {
                            "type": "array",
                            "items": {"type": "string"},
                            "description": "The first requests that it ended.",
                        },
                    },
                },
                "Problem": {
                    "type": "object",
                    "required": ["title", "status", "detail", "error", "error_type", "request_id"],
                    "properties": {
                        "type": {"type": "string"},
                        "title": {"type": "string"},
                        "status": {"type": "integer"},
                        "detail": {"type": "string"},
                        "error": {"type": "string"},
                        "error_type": {"type": "string"},
                        "request_id": {"type": "string"},
                        "incident": {"type": "string"},
                    },
                },
            },
        },
    }


def _inputs_object(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The schema of a JSON body with inputs; None: any parameters."""
    required = ["inputs", "parameters"] if parameters and "required" in parameters else ["inputs"]
    if parameters is None:
        parameters = {"type": ["object", "null"]}
    elif "required" not in parameters:
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


def _get(summary: str, content: dict[str, Any]) -> dict[str, Any]:
    answer = {"200": {"description": summary, "content": content}, **_refused(401, 403)}
    return {"summary": summary, "responses": answer}


def _raw_content(task: str) -> dict[str, Any]:
    """What `POST /` takes beside JSON: a text, or for images and sound the bytes of a file."""
    if _takes_media(task):
        return {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {"text/plain": {"schema": {"type": "string", "minLength": 1}}}


def _form_content(task: str) -> dict[str, Any]:
    """Forms, whose fields are the members of the JSON object."""
    text: dict[str, Any] = {"type": "string", "minLength": 1}
    one = {"type": "string", "format": "binary"} if _takes_media(task) else text
    members = {"parameters": {"type": "string", "contentMediaType": "application/json"}}

    def form(one: dict[str, Any]) -> dict[str, Any]:
        inputs = {"oneOf": [one, {"type": "array", "items": one, "minItems": 1}]}
        return {
            "schema": {
                "type": "object",
                "required": ["inputs"],
                "additionalProperties": False,
                "properties": {"inputs": inputs, **members},
            }
        }

    return {"multipart/form-data": form(one), "application/x-www-form-urlencoded": form(text)}


def _takes_media(task: str) -> bool:
    return task in TASKS and TASKS[task].media is not None


def _text(kind: str) -> dict[str, Any]:
    return {kind: {"schema": {"type": "string"}}}


def _object() -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object"}}}


def _settings_content() -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": "#/components/schemas/Settings"}}}


def _json_answer(text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _refused(*statuses: int) -> dict[str, Any]:
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {str(status): {"description": _REFUSALS[status], "content": problem} for status in statuses}
