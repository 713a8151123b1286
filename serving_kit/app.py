"""The HTTP face (Starlette): routes, the error-to-status table, the lifespan.

    body ── formats.decode ──▶ service.predict ──▶ formats.encode ──▶ 200
                  │                   │
                  └── ServingError ───┴──▶ _Guard: STATUS, application/problem+json, X-Request-Id

The app is built by a factory and nothing asyncio exists before its lifespan, so that the same app runs
in a notebook, under `uvicorn` and elsewhere. The service lives on `app.state.service`. URLs are
relative, so that it works under any prefix.

Not here: what a request does (`service.py`), what its body looks like (`formats.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import math
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from http import HTTPStatus
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving_kit import __version__, formats
from serving_kit.errors import (
    ClientGone,
    DeadlineExceeded,
    InputRejected,
    MalformedRequest,
    ModelFailed,
    Overloaded,
    RequestTooLarge,
    ServingError,
    SettingError,
    SlowRequest,
    Unavailable,
)
from serving_kit.metrics import HISTORY_S
from serving_kit.openapi import describe
from serving_kit.service import Service

# Looked up along the class's bases, so that a new kind of error has its parent's status.
STATUS: dict[type[ServingError], tuple[int, str]] = {
    ServingError: (500, "server_failed"),
    MalformedRequest: (400, "malformed_request"),
    RequestTooLarge: (413, "request_too_large"),
    SlowRequest: (408, "slow_request"),
    InputRejected: (422, "input_rejected"),
    Overloaded: (503, "overloaded"),  # or 429: the setting overload_status
    Unavailable: (503, "unavailable"),
    DeadlineExceeded: (504, "deadline_exceeded"),
    ClientGone: (499, "client_gone"),
    ModelFailed: (500, "model_failed"),
}
_LONG_CHUNK = 100_000  # bytes of JSON, written in about 0.1 ms
_LONGEST_RETRY_S = 30  # clients give up above 120; a queue that long is better polled
# Request ids are names, not secrets: one random part for the process and a number, because fresh random
# bytes for each were a fifth of what a request with an instant model costs.
_PROCESS = secrets.token_hex(4)
_numbers = itertools.count(1)
_PAGE = Path(__file__).parent / "panel.html"
_SCRIPTS = [Path(__file__).parent / name for name in ("charts.js", "panel.js")]  # one module


def build_app(
    service: Service | Callable[[], Service], *, token: str | None = None, drain_s: float = 5.0
) -> Starlette:
    """The ASGI app around one service.

    Args:
        service: The service; or what makes it, called once when the app starts, on a thread where it
            may take its time to load a model.
        token: What `PATCH /settings` wants as bearer token; None turns that route off.
        drain_s: Seconds to finish what was admitted when the app stops.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        made = service if isinstance(service, Service) else await asyncio.to_thread(service)
        await made.start()
        app.state.service = made
        try:
            yield
        finally:
            await made.stop(drain_s)

    app = Starlette(
        routes=[
            Route("/", predict, methods=["POST"]),
            Route("/", page, methods=["GET"]),
            Route("/panel.js", script, methods=["GET"]),
            Route("/health", health, methods=["GET"]),
            Route("/live", live, methods=["GET"]),
            Route("/info", info, methods=["GET"]),
            Route("/stats", stats, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/openapi.json", openapi, methods=["GET"]),
            Route("/settings", read_settings, methods=["GET"]),
            Route("/settings", change_settings, methods=["PATCH"]),
        ],
        middleware=[Middleware(_Guard)],
        exception_handlers={HTTPException: _raise_again},
        lifespan=lifespan,
    )
    app.state.token = token
    return app


# -- the one route that matters -------------------------------------------------------------------


async def predict(request: Request) -> Response:
    """POST /: one text, or `{"inputs", "parameters"}`."""
    service: Service = request.app.state.service
    with service.observe() as ticket:
        ticket.limit(_asked_timeout(request))
        body = await _read_body(request, service, ticket.deadline)
        call = formats.decode(body, request.headers.get("content-type", ""), service.task)
        answers = await _unless_gone(request, service.predict(call.values, call.parameters, ticket))
        return Response(await _encoded(call, answers, service.task), media_type="application/json")


async def _encoded(call: formats.Call, answers: list[Any], task: str) -> bytes:
    """The response body. Embeddings make megabytes of it: others get their turn in between."""
    chunks = []
    for chunk in formats.encode(call, answers, task):
        chunks.append(chunk)
        if len(chunk) > _LONG_CHUNK:
            await asyncio.sleep(0)
    return b"".join(chunks)


async def _read_body(request: Request, service: Service, deadline: float) -> bytes:
    """The body, within its bounds of size and time, whatever its headers say."""
    limit = service.max_body_bytes
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise MalformedRequest("compressed bodies are not accepted; send the body as it is")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced[:20]) > limit:
        raise RequestTooLarge(f"the body has {announced[:20]} bytes; the most is {limit} (max_body_bytes)")
    chunks, size = [], 0
    try:
        async with asyncio.timeout(deadline - service.clock()):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise RequestTooLarge(f"the body is larger than {limit} bytes (max_body_bytes)")
                chunks.append(chunk)
    except TimeoutError:
        raise SlowRequest("the body did not arrive within the request's time") from None
    except ClientDisconnect:
        raise ClientGone("the client left while sending") from None
    return b"".join(chunks)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    """Await `work`, but give it up as soon as the client closes the connection."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not gone:
            raise  # the server itself is being stopped
        task.uncancel()
        raise ClientGone("the client left before its answer was ready") from None
    finally:
        watcher.cancel()


def _asked_timeout(request: Request) -> float | None:
    """Seconds that the client gives itself (`X-Request-Timeout-Ms`)."""
    asked = request.headers.get("x-request-timeout-ms")
    if asked is None:
        return None
    try:
        milliseconds = float(asked)
    except ValueError:
        milliseconds = math.nan
    if not 0 < milliseconds < math.inf:
        raise MalformedRequest("X-Request-Timeout-Ms must be a number of milliseconds above 0")
    return milliseconds / 1000


# -- the others -----------------------------------------------------------------------------------


async def page(request: Request) -> Response:
    """GET /: the live panel as a page."""
    return HTMLResponse(_PAGE.read_text(encoding="utf-8"))


async def script(request: Request) -> Response:
    """GET /panel.js: the panel's own code, the same that the notebook runs."""
    text = "".join(path.read_text(encoding="utf-8") for path in _SCRIPTS)
    return Response(text, media_type="text/javascript")


async def health(request: Request) -> Response:
    """GET /health: 200 when the model can answer, else 503 with the reason."""
    state, reason = request.app.state.service.state()
    status = 200 if state == "ready" else 503
    return _json({"status": state, **({"reason": reason} if reason else {})}, status)


async def live(request: Request) -> Response:
    """GET /live: 200 while the process runs."""
    return _json({"status": "live"})


async def info(request: Request) -> Response:
    """GET /info: who is this."""
    service: Service = request.app.state.service
    return _json(
        {
            "name": service.name,
            "model_id": service.model_name,
            "task": service.task,
            "device": service.device,
            "max_body_bytes": service.max_body_bytes,
            "max_batch_size": service.settings.max_batch_size,
            "version": __version__,
        }
    )


async def stats(request: Request) -> Response:
    """GET /stats: the snapshot that the panel shows; `?series=N` adds the last N seconds."""
    service: Service = request.app.state.service
    asked = request.query_params.get("series", "")
    series = min(int(asked[:4]), HISTORY_S) if asked.isascii() and asked.isdigit() else 0
    return _json(service.snapshot(series))


async def metrics(request: Request) -> Response:
    """GET /metrics: Prometheus, or OpenMetrics if the scraper prefers it."""
    service: Service = request.app.state.service
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service))
    encoder, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encoder(registry), headers={"content-type": content_type})


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    service: Service = request.app.state.service
    return _json(describe(service.task, service.model_name, __version__))


async def read_settings(request: Request) -> Response:
    """GET /settings: a flat JSON object, knob: value."""
    return _json(request.app.state.service.settings.to_dict())


async def change_settings(request: Request) -> Response:
    """PATCH /settings: change some knobs, all or none; answers with all of them."""
    service: Service = request.app.state.service
    token: str | None = request.app.state.token
    if token is None:
        raise HTTPException(403, "this server was started without a token, so its settings cannot be changed")
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise HTTPException(
            401,
            "changing settings needs the token that the panel shows: Authorization: Bearer <token>",
            {"www-authenticate": "Bearer"},
        )
    body = await _read_body(request, service, service.clock() + service.settings.timeout_s)
    changes = formats.parse_json(body)
    if not isinstance(changes, dict):
        raise MalformedRequest('settings must be an object: {"max_batch_size": 8}')
    try:
        settings = service.tune(**changes)
    except SettingError as error:
        raise HTTPException(422, str(error)) from None
    return _json(settings.to_dict())


class _Collector:
    """Lets a Prometheus registry read one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Any:
        scheduler = self._service.batcher.scheduler
        return self._service.metrics.families(scheduler.queue_depth, scheduler.in_flight)


# -- errors ---------------------------------------------------------------------------------------


class _Guard:
    """Gives every response a request id, and every exception a response.

    Pure ASGI, inside Starlette's own error middleware: nothing gets past it, so nothing is ever
    logged by a server thread into somebody's cell.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(dict(scope["headers"]).get(b"x-request-id", b""))
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            if not started:
                response = _problem(error, request_id, scope["app"])
                await response(scope, receive, send_with_id)


async def _raise_again(request: Request, error: Exception) -> Response:
    """Leave 404, 405 and friends to `_Guard`, like every other error."""
    raise error


def _problem(error: Exception, request_id: str, app: Any) -> Response:
    """RFC 9457, with the members that Hugging Face's clients read (`error`, `error_type`)."""
    headers: dict[str, str] = {}
    incident: str | None = None
    service: Service | None = getattr(app.state, "service", None)
    if isinstance(error, HTTPException):
        status, kind, text = error.status_code, "http_error", error.detail
        headers.update(error.headers or {})
        if status == 404:
            text = "there is nothing here; POST / asks the model, GET /openapi.json lists the rest"
        elif status == 405:
            text = f"this route takes {headers.get('Allow', 'another method')}"
    else:
        if not isinstance(error, ServingError):
            failed = ModelFailed(
                "the server failed on this request", detail=f"{type(error).__name__}: {error}"
            )
            if service is not None:
                service.keep_incident(failed, error)
            error = failed
        status, kind = next(STATUS[each] for each in type(error).__mro__ if each in STATUS)
        text, incident = str(error), error.incident
        if isinstance(error, Overloaded) and not isinstance(error, Unavailable) and service is not None:
            status = service.settings.overload_status
        if error.detail and service is not None and service.settings.expose_errors:
            text = f"{text}: {error.detail}"
        if isinstance(error, Overloaded) and error.retry_after is not None:
            headers["retry-after"] = str(min(max(1, math.ceil(error.retry_after)), _LONGEST_RETRY_S))
    try:
        title = HTTPStatus(status).phrase
    except ValueError:  # 499 is nginx's word, not HTTP's
        title = "Client Closed Request"
    body = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": text,
        "error": text,
        "error_type": kind,
        "request_id": request_id,
    }
    if incident is not None:
        body["incident"] = incident
        body["detail"] = body["error"] = f"{text} (incident {incident})"
    return _json(body, status, headers, "application/problem+json")


def _request_id(given: bytes) -> str:
    """The client's own id if it is short and plain, else a new one."""
    text = given.decode("ascii", "replace")
    if 0 < len(text) <= 128 and all(c.isalnum() or c in "-_.:" for c in text) and text.isascii():
        return text
    return f"{_PROCESS}{next(_numbers):08x}"


def _json(
    document: Any,
    status: int = 200,
    headers: dict[str, str] | None = None,
    media_type: str = "application/json",
) -> Response:
    return Response(formats.dump_json(document), status, headers, media_type)
