"""The routes that do not call the model: health, statistics, settings, failures, the panel's page.

`ENDPOINTS` at the end lists them, each with who may ask and its OpenAPI fragment. No handler authorises a
request: `access.py` has decided before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client import PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from serving_kit import __version__
from serving_kit.durations import HISTORY_S
from serving_kit.errors import MalformedRequest, SettingError
from serving_kit.http import openapi
from serving_kit.http.access import PRIVATE_HEADERS, Level
from serving_kit.http.bodies import read_body
from serving_kit.http.client_watch import ClientWatch
from serving_kit.http.endpoints import SERVICE, Endpoint
from serving_kit.http.openapi import Schema, Subject
from serving_kit.http.strict_json import dump_json, parse_json
from serving_kit.metrics import gauge
from serving_kit.models.tasks import parameters_schema
from serving_kit.notebook import assets
from serving_kit.service import Service
from serving_kit.stats_json import stats_json
from serving_kit.status import State

NOT_STARTED = (
    "this app was never started, because its lifespan was not run; an app that it is mounted in has to pass "
    "its own on: async with model_app.router.lifespan_context(model_app)"
)
# Bounds of their own, because max_body_bytes=1 or timeout_ms=1 would reject every later change, too.
_MAX_SETTINGS_BYTES = 2**16  # all settings as JSON are 1 KiB
_SETTINGS_BODY_S = 10.0


class _Health(NamedTuple):
    """The answer to a probe."""

    ok: bool
    status: str
    reason: str = ""

    def response(self) -> Response:
        document = {"status": self.status, **({"reason": self.reason} if self.reason else {})}
        return _json(document, 200 if self.ok else 503)


async def page(request: Request) -> Response:
    """GET /: the live panel as a page."""
    return HTMLResponse(assets.page())


async def script(request: Request) -> Response:
    """GET /panel.js: the panel's own code, the same that the notebook runs."""
    return Response(assets.script(), media_type="text/javascript")


async def health(request: Request) -> Response:
    """GET /health: 200 when the model can answer, else 503 with the reason."""
    return _readiness(_started_service(request)).response()


async def live(request: Request) -> Response:
    """GET /live: 200 while the process runs; 503 once it must be restarted, where `live_timeout_s` is set."""
    return _liveness(_started_service(request)).response()


async def info(request: Request) -> Response:
    """GET /info: what is served, and by which version."""
    service = _service(request)
    caches = service.core_status().caches
    cache = None if caches is None else caches.limit
    return _json(
        {
            "name": service.name,
            "model_id": service.model_name,
            "task": service.task,
            "device": service.device,
            "precision": service.precision._asdict(),
            "max_body_bytes": service.max_body_bytes,
            "max_batch_size": service.settings.max_batch_size,
            "notes": service.notes,
            "layout": service.layout._asdict(),
            "max_cache_tokens": None if cache is None else cache._asdict(),
            "version": __version__,
        }
    )


async def stats(request: Request) -> Response:
    """GET /stats: the snapshot that the panel shows; `?series=N` adds the last N seconds."""
    service, asked = _service(request), request.query_params.get("series", "")
    series = min(int(asked[:4]), HISTORY_S) if asked.isascii() and asked.isdigit() else 0
    return _json(stats_json(service.status(), service.statistics(series)))


async def metrics(request: Request) -> Response:
    """GET /metrics: Prometheus, or OpenMetrics if the scraper prefers it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_ServiceCollector(_service(request)))
    encoder, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encoder(registry), headers={"content-type": content_type})


async def openapi_document(request: Request) -> Response:
    """GET /openapi.json."""
    service = _service(request)
    subject = Subject(service.task, service.model_name, __version__, parameters_schema(service.task))
    return _json(openapi.document(subject, request.app.state.endpoints))


async def read_settings(request: Request) -> Response:
    """GET /settings: a flat JSON object, setting: value."""
    return _json(_service(request).settings.to_dict())


async def change_settings(request: Request) -> Response:
    """PATCH /settings: change some settings, all or none; answers with all of them."""
    headers = dict(request.scope["headers"])
    with ClientWatch(request.receive, _SETTINGS_BODY_S, lambda: f"{_SETTINGS_BODY_S:g} s"):
        body = await read_body(request.scope, headers, request.receive, _MAX_SETTINGS_BYTES)
    changes = parse_json(body)
    if not isinstance(changes, dict):
        raise MalformedRequest('settings must be an object: {"max_batch_size": 8}')
    try:
        settings = _service(request).tune(f"HTTP client {_address(request)}", **changes)
    except SettingError as error:
        raise HTTPException(422, str(error)) from None
    return _json(settings.to_dict())


async def errors(request: Request) -> Response:
    """GET /errors: the latest failures with their tracebacks, newest first."""
    incidents = [incident.to_dict() for incident in _service(request).incidents()]
    return _json(incidents, headers=PRIVATE_HEADERS)


class _ServiceCollector(Collector):
    """Lets a Prometheus registry read one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        yield gauge("serving_kit_build_info", "What serves; always 1.", ({"version": __version__}, 1))
        yield from self._service.families()
        # The process and its Python, by the names that every Prometheus client uses.
        yield from PROCESS_COLLECTOR.collect()
        yield from PLATFORM_COLLECTOR.collect()


def _service(request: Request) -> Service:
    service: Service = request.scope[SERVICE]
    return service


def _started_service(request: Request) -> Service | None:
    service: Service | None = request.scope[SERVICE]
    return service


def _readiness(service: Service | None) -> _Health:
    if service is None:
        return _Health(False, State.STOPPED, NOT_STARTED)
    state, reason = service.state()
    return _Health(state is State.READY, state, reason)


def _liveness(service: Service | None) -> _Health:
    alive, reason = (True, "") if service is None else service.live()
    return _Health(alive, "live" if alive else "stuck", reason)


def _address(request: Request) -> str:
    """Address and port of the client; empty for a Unix socket."""
    return f"{request.client.host}:{request.client.port}" if request.client else ""


def _json(document: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump_json(document), status, headers, "application/json")


_OBJECT = openapi.json_content(openapi.OBJECT)
_SETTINGS = openapi.json_content(openapi.SETTINGS)
_SERIES: Schema = {
    "name": "series",
    "in": "query",
    "schema": {"type": "integer", "minimum": 0},
    "description": f"Add an entry for each of so many seconds, {HISTORY_S} at most.",
}
_METRICS = {"text/plain": openapi.TEXT, "application/openmetrics-text": openapi.TEXT}


def _describe_change(subject: Subject) -> dict[str, object]:
    return openapi.operation(
        "Change some knobs, all or none.",
        {200: ("All knobs.", _SETTINGS)},
        openapi.BODY_STATUSES,
        body=_SETTINGS,
        operation_id="change_settings",
        owner=True,
    )


ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint("GET", "/", page, openapi.get("The live panel as a page.", {"text/html": openapi.TEXT})),
    Endpoint(
        "GET", "/panel.js", script, openapi.get("The panel's own code.", {"text/javascript": openapi.TEXT})
    ),
    Endpoint(
        "GET",
        "/health",
        health,
        openapi.probe("Whether the model can answer.", "It cannot; the reason."),
        Level.OPEN,
    ),
    Endpoint(
        "GET",
        "/live",
        live,
        openapi.probe(
            "Whether the process can go on without a restart.",
            "One model call has run longer than live_timeout_s.",
        ),
        Level.OPEN,
    ),
    Endpoint("GET", "/info", info, openapi.get("Model, task, device, precision, version.", _OBJECT)),
    Endpoint(
        "GET", "/stats", stats, openapi.get("Everything that the panel shows.", _OBJECT, parameters=[_SERIES])
    ),
    Endpoint("GET", "/metrics", metrics, openapi.get("Prometheus metrics.", _METRICS)),
    Endpoint("GET", "/openapi.json", openapi_document, openapi.get("This document.", _OBJECT)),
    Endpoint("GET", "/settings", read_settings, openapi.get("The knobs in force.", _SETTINGS)),
    Endpoint("PATCH", "/settings", change_settings, _describe_change, Level.OWNER, "changing settings"),
    Endpoint(
        "GET",
        "/errors",
        errors,
        openapi.get(
            "The latest failures, newest first.", openapi.json_content(openapi.INCIDENTS), owner=True
        ),
        Level.OWNER,
        "the list of failures",
    ),
)
