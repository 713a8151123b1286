"""The HTTP face (Starlette): routes, the error-to-status table, the lifespan.

    body ── formats.decode ──▶ service.predict ──▶ formats.encode ──▶ 200
                  │                   │
                  └── ServingError ───┴──▶ _Front: STATUS, application/problem+json, X-Request-Id

The app is built by a factory and nothing asyncio exists before its lifespan, so that the same app runs
in a notebook, under `uvicorn` and elsewhere. The service lives on `app.state.service`. URLs are
relative, so that it works under any prefix.

Not here: what a request does (`service.py`), what its body looks like (`formats.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self

from prometheus_client import PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving_kit import __version__, log
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
    Stopping,
    Unavailable,
    UnsupportedMediaType,
    error_text,
)
from serving_kit.http import formats
from serving_kit.http.access import WHERE_THE_TOKEN_IS, Access, Headers
from serving_kit.http.openapi import describe
from serving_kit.metrics import HISTORY_S, gauge
from serving_kit.notebook import assets
from serving_kit.service import Service

# Looked up along the class's bases, so that a new kind of error has its parent's status.
STATUS: dict[type[ServingError], tuple[int, str]] = {
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
_LONG_CHUNK = 100_000  # bytes of JSON, written in about 0.1 ms
_LONGEST_RETRY_S = 30  # clients give up above 120; a queue that long is better polled
# Request ids are names, not secrets: one random part for the process and a number, because fresh random
# bytes for each were a fifth of what a request with an instant model costs.
_PROCESS = secrets.token_hex(4).encode()
_numbers = itertools.count(1)
_PLAIN = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_REQUEST_ID = "serving_kit.request_id"  # in the scope
_DECIMAL = re.compile(rb"[0-9]{1,15}(\.[0-9]{1,15})?")
# Bounds of their own, because max_body_bytes=1 or timeout_ms=1 would refuse every later change, too.
_MOST_SETTINGS_BYTES = 2**16  # all knobs as JSON are 1 KiB
_SETTINGS_BODY_S = 10.0
_BODY_READ = "serving_kit.body_read"  # in the scope of a request whose body has been read to its end
# After an answer that is given before the body was read, the rest is read and discarded within these
# bounds (nginx: lingering_time and lingering_timeout, 30 and 5 s).
_LINGER_BYTES = 2**27
_LINGER_S, _LINGER_IDLE_S = 30.0, 5.0
_LINGER_LOOK_S = 0.25  # how soon that ends when the server is being stopped
_LOST_BODY = (
    "the web server in front of this app has lost the body, because the request asks for another protocol "
    "(Upgrade); start uvicorn with --http h11, or let the client ask for HTTP/1.1 only"
)
_NOT_STARTED = (
    "this app was never started, because its lifespan was not run; an app that it is mounted in has to pass "
    "its own on: async with model_app.router.lifespan_context(model_app)"
)
_LOOK_AFTER_S = 0.02  # a client that leaves within it may be answered in vain
_PRIVATE = {"cache-control": "no-store", "referrer-policy": "no-referrer"}


def build_app(
    service: Service | Callable[[], Service],
    *,
    access: Access | None = None,
    drain_s: float = 5.0,
    access_log: bool = False,
) -> Starlette:
    """The ASGI app around one service.

    Args:
        service: The service; or what makes it, called once when the app starts, on a thread where it
            may take its time to load a model.
        access: Who may ask; None: this machine, and nobody may change settings.
        drain_s: Seconds to finish what was admitted when the app stops.
        access_log: Write one line per request to the logger `serving_kit.access`.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        made = service if isinstance(service, Service) else await asyncio.to_thread(service)
        await made.start()
        app.state.service = made
        app.state.sends_request_id = not _in_ray_replica()
        try:
            yield
        finally:
            await made.stop(drain_s)

    access = access or Access()
    # CORS stays outside: a page that may ask must be able to read the refusals, too.
    cors = (
        [
            Middleware(
                CORSMiddleware,
                allow_origins=sorted(access.origins),
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        ]
        if access.origins
        else []
    )
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
            Route("/errors", errors, methods=["GET"]),
        ],
        middleware=[*cors, Middleware(_Front, access=access, access_log=access_log)],
        exception_handlers={HTTPException: _raise_again},
        lifespan=lifespan,
    )
    app.state.access = access
    return app


# -- the one route that matters -------------------------------------------------------------------


class _Predict:
    """POST /: one text, or `{"inputs", "parameters"}`.

    An ASGI app of its own: a request and a response object cost as much as reading and writing them.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service: Service = scope["app"].state.service
        headers = _headers(scope)
        with service.observe(scope.get(_REQUEST_ID, "")) as ticket:
            ticket.limit(_asked_timeout(headers))
            with _Attention(receive, ticket.deadline - service.clock(), ticket.limit_text) as attention:
                body = await _read_body(scope, headers, receive, service.max_body_bytes, ticket.hold)
                attention.body_is_here()
                if not body and b"upgrade" in headers and _has_body(headers):
                    raise MalformedRequest(_LOST_BODY)
                content_type = headers.get(b"content-type", b"").decode("latin-1")
                call = formats.decode(body, content_type, service.task)
                answers = await service.predict(call.values, call.parameters, ticket)
                answer = await _encoded(call, answers, service.task)
        head = [(b"content-length", b"%d" % len(answer)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": answer})


predict = _Predict()


async def _encoded(call: formats.Call, answers: list[Any], task: str) -> bytes:
    """The response body. Embeddings make megabytes of it: others get their turn in between."""
    chunks = []
    for chunk in formats.encode(call, answers, task):
        chunks.append(chunk)
        if len(chunk) > _LONG_CHUNK:
            await asyncio.sleep(0)
    return b"".join(chunks)


async def _read_body(
    scope: Scope,
    headers: Headers,
    receive: Receive,
    limit: int,
    hold: Callable[[int], None] | None = None,
    knob: str = " (max_body_bytes)",
) -> bytes:
    """The body, of at most `limit` bytes, whatever its headers say; `hold` gets the size of each chunk."""
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise MalformedRequest("compressed bodies are not accepted; send the body as it is")
    announced = headers.get(b"content-length", b"")[:20]
    if announced.isdigit() and int(announced) > limit:
        raise RequestTooLarge(f"the body has {announced.decode()} bytes; the most is {limit}{knob}")
    chunks, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left while sending")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise RequestTooLarge(f"the body is larger than {limit} bytes{knob}")
        if hold is not None:
            hold(len(chunk))
        chunks.append(chunk)
        more = message.get("more_body", False)
    scope[_BODY_READ] = True
    return b"".join(chunks)


class _Attention:
    """Ends what the current task does for a client: its body does not come, or it has left.

    Most requests end before anybody had looked, and looking costs as much as an instant model. So each
    has one timer, and only those that are still there when it fires get a deadline or a watcher.
    """

    __slots__ = (
        "_body_is_here",
        "_deadline",
        "_error",
        "_late",
        "_limit_text",
        "_loop",
        "_receive",
        "_task",
        "_timer",
    )

    def __init__(self, receive: Receive, patience_s: float, limit_text: Callable[[], str]) -> None:
        """Be ready to give up on a body after `patience_s` seconds; `limit_text()` names that limit."""
        self._receive = receive
        self._limit_text = limit_text
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + patience_s
        self._task = asyncio.current_task()
        self._timer: asyncio.TimerHandle | asyncio.Task[None] = self._loop.call_later(
            min(_LOOK_AFTER_S, patience_s), self._look
        )
        self._late = self._body_is_here = False
        self._error: ServingError | None = None

    def __enter__(self) -> Self:
        return self

    def body_is_here(self) -> None:
        """The whole body has been read: whatever comes now is the client's leaving."""
        self._body_is_here = True
        if self._late:
            self._timer.cancel()
            self._look()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._error is None or self._task is None:
            if isinstance(error, asyncio.CancelledError):  # a server that stops cancels what is unfinished
                raise Stopping from None
            return
        others = self._task.uncancel()  # somebody else wants it to end, too: the server is being stopped
        if not others and isinstance(error, asyncio.CancelledError):
            raise self._error from None

    def _look(self) -> None:
        self._late = True
        if self._body_is_here:
            self._timer = self._loop.create_task(self._watch())
        else:
            slow = SlowRequest(f"the body did not arrive within {self._limit_text()}")
            self._timer = self._loop.call_at(self._deadline, self._end, slow)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._end(ClientGone("the client left before its answer was ready"))

    def _end(self, error: ServingError) -> None:
        assert self._task is not None
        self._error = error
        self._task.cancel()


def _asked_timeout(headers: Headers) -> float | None:
    """Seconds that the client gives itself (`X-Request-Timeout-Ms`)."""
    asked = headers.get(b"x-request-timeout-ms")
    if asked is None:
        return None
    milliseconds = float(asked) if _DECIMAL.fullmatch(asked) else 0.0
    if milliseconds <= 0:
        raise MalformedRequest(
            "X-Request-Timeout-Ms must be a number of milliseconds above 0 in plain decimal digits, like 250"
        )
    return milliseconds / 1000


# -- the others -----------------------------------------------------------------------------------


async def page(request: Request) -> Response:
    """GET /: the live panel as a page."""
    return HTMLResponse(assets.page())


async def script(request: Request) -> Response:
    """GET /panel.js: the panel's own code, the same that the notebook runs."""
    return Response(assets.script(), media_type="text/javascript")


async def health(request: Request) -> Response:
    """GET /health: 200 when the model can answer, else 503 with the reason."""
    service: Service | None = getattr(request.app.state, "service", None)
    state, reason = ("stopped", _NOT_STARTED) if service is None else service.state()
    status = 200 if state == "ready" else 503
    return _json({"status": state, **({"reason": reason} if reason else {})}, status)


async def live(request: Request) -> Response:
    """GET /live: 200 while the process runs; 503 once it must be restarted, where `live_timeout_s` is set."""
    service: Service | None = getattr(request.app.state, "service", None)
    alive, reason = (True, "") if service is None else service.live()
    return _json(
        {"status": "live"} if alive else {"status": "stuck", "reason": reason}, 200 if alive else 503
    )


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
            "notes": service.notes,
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
    _owner_only(request, "changing settings")
    headers = _headers(request.scope)
    with _Attention(request.receive, _SETTINGS_BODY_S, lambda: f"{_SETTINGS_BODY_S:g} s"):
        body = await _read_body(request.scope, headers, request.receive, _MOST_SETTINGS_BYTES, knob="")
    changes = formats.parse_json(body)
    if not isinstance(changes, dict):
        raise MalformedRequest('settings must be an object: {"max_batch_size": 8}')
    try:
        settings = service.tune(f"HTTP client {_client(request.scope)}", **changes)
    except SettingError as error:
        raise HTTPException(422, str(error)) from None
    return _json(settings.to_dict())


async def errors(request: Request) -> Response:
    """GET /errors: the latest failures with their tracebacks, newest first, for the owner."""
    service: Service = request.app.state.service
    _owner_only(request, "the list of failures")
    return _json([incident.to_dict() for incident in service.incidents()], headers=_PRIVATE)


def _owner_only(request: Request, what: str) -> None:
    """Raise unless the request carries the token itself; the cookie of a browser is not enough."""
    access: Access = request.app.state.access
    if access.token is None:
        raise HTTPException(
            403,
            f"this server was started without a token, and {what} needs one: set SERVING_KIT_TOKEN, or pass "
            "create_app(token=...)",
        )
    if not access.holds_token(_headers(request.scope)):
        raise HTTPException(
            401,
            f"{what} needs the token ({WHERE_THE_TOKEN_IS}): Authorization: Bearer <token>",
            {"www-authenticate": "Bearer"},
        )


class _Collector:
    """Lets a Prometheus registry read one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Any:
        yield gauge("serving_kit_build_info", "What serves; always 1.", ({"version": __version__}, 1))
        yield from self._service.families()
        # The process and its Python, by the names that every Prometheus client uses.
        yield from PROCESS_COLLECTOR.collect()
        yield from PLATFORM_COLLECTOR.collect()


# -- errors ---------------------------------------------------------------------------------------


class _Front:
    """Turns away who may not ask, gives every response a request id, and every exception a response.

    Pure ASGI, inside Starlette's own error middleware: nothing gets past it, so nothing is ever
    logged by a server thread into somebody's cell.
    """

    def __init__(self, app: ASGIApp, access: Access, access_log: bool = False) -> None:
        self.app = app
        self.access = access
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = _headers(scope)
        request_id = _request_id(headers.get(b"x-request-id"))
        scope[_REQUEST_ID] = request_id.decode()
        method, path = scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))
        started, status, arrived = False, 499, time.monotonic()
        answered: float | None = None
        state = scope["app"].state
        sends_id = getattr(state, "sends_request_id", True)

        async def send_with_id(message: Message) -> None:
            nonlocal started, status, answered
            if message["type"] == "http.response.start":
                started, status, answered = True, message["status"], time.monotonic()
                if sends_id:
                    message["headers"].append((b"x-request-id", request_id))
            await send(message)

        try:
            hosts = _hosts(scope, headers)
            if hosts > 1 or (not hosts and scope["http_version"] == "1.1"):
                raise MalformedRequest("a request of HTTP/1.1 has exactly one Host header")
            refusal = self.access.refusal(method, path, scope.get("server"), headers)
            if method == "GET" and path == "/" and (pass_ := self._pass(scope)) is not None:
                await pass_(scope, receive, send_with_id)
            elif refusal is not None:
                raise HTTPException(refusal.status, refusal.text, refusal.headers)
            elif not hasattr(state, "service") and path not in ("/live", "/health"):
                raise Unavailable(_NOT_STARTED)
            elif method == "POST" and path == "/":
                await predict(scope, receive, send_with_id)  # the router would cost as much as the answer
            else:
                await self.app(scope, receive, send_with_id)
        except (Exception, asyncio.CancelledError) as error:
            if started:
                return
            # A server that stops cancels what is unfinished.
            cause = Stopping() if isinstance(error, asyncio.CancelledError) else error
            response = _problem(cause, request_id.decode(), scope["app"])
            if isinstance(cause, Stopping):
                if scope["http_version"] in ("1.0", "1.1"):
                    response.headers["connection"] = "close"
                await response(scope, receive, send_with_id)
            elif _BODY_READ in scope or not _has_body(headers):
                await response(scope, receive, send_with_id)
            else:
                await _answer_early(response, scope, receive, send_with_id)
        finally:
            if self.access_log:
                log.access(
                    {
                        "method": method,
                        "path": path,  # without the query, which may hold the token
                        "status": status,
                        "latency_ms": round(((answered or time.monotonic()) - arrived) * 1e3, 1),
                        "request_id": request_id.decode(),
                        "client": _client(scope),
                    }
                )

    def _pass(self, scope: Scope) -> Response | None:
        """For who opens `/?token=...`: a cookie, and the same page without the token in its address."""
        cookie = self.access.pass_for(scope["query_string"], scope.get("server"))
        if cookie is None:
            return None
        return Response(status_code=303, headers={"location": ".", "set-cookie": cookie, **_PRIVATE})


async def _raise_again(request: Request, error: Exception) -> Response:
    """Leave 404, 405 and friends to `_Front`, like every other error."""
    if isinstance(error, HTTPException) and error.status_code == 405:
        # The router names the methods of the first route of that path, and a path may have several.
        routes = [route for route in request.app.routes if route.matches(request.scope)[0] != Match.NONE]
        error.headers = {"allow": ", ".join(sorted({each for route in routes for each in route.methods}))}
    raise error


async def _answer_early(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request whose body has not been read to its end, and discard the rest within bounds.

    Most clients look for the answer only when they have sent everything. If the connection were closed
    at once, the system would reset it because of the unread bytes, and the answer would be lost.
    So the answer is complete for the client, and the request ends only when the client has finished.
    """
    headers = response.raw_headers
    if scope["http_version"] in ("1.0", "1.1"):
        headers = [*headers, (b"connection", b"close")]
    await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    await _discard_body(receive, getattr(scope["app"].state, "service", None))
    await send({"type": "http.response.body", "body": b""})


async def _discard_body(receive: Receive, service: Service | None) -> None:
    """Read until the body ends, the client leaves, a bound is reached or the server stops."""
    loop = asyncio.get_running_loop()
    last = now = loop.time()
    end, size, more = now + _LINGER_S, 0, True
    while more and size < _LINGER_BYTES and now < min(end, last + _LINGER_IDLE_S):
        if service is not None and (service.stopped or service.draining_since is not None):
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_LOOK_S):
                message = await receive()
                last = loop.time()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)  # which a disconnect does not have
        now = loop.time()


def _has_body(headers: Headers) -> bool:
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


def _hosts(scope: Scope, headers: Headers) -> int:
    """How often the request says by which name it asks: once (RFC 9112, 3.2)."""
    if len(headers) == len(scope["headers"]):  # no name twice
        return b"host" in headers
    return [name for name, _ in scope["headers"]].count(b"host")


def _in_ray_replica() -> bool:
    """Whether Ray Serve runs this app. Its proxy makes the request ids and adds them to the answers."""
    serve: Any = sys.modules.get("ray.serve")
    if serve is None:
        return False
    try:
        serve.get_replica_context()
    except Exception:  # RayServeException: a driver or a task, but no replica
        return False
    return True


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
            text = f"this route takes {headers.get('allow', 'another method')}"
    else:
        if not isinstance(error, ServingError):
            failed = ModelFailed("the server failed on this request", detail=error_text(error))
            if service is not None:
                service.route_failed(failed, error, request_id)
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


def _headers(scope: Scope) -> Headers:
    """By name, in lower case; of several with one name the last."""
    return dict(scope["headers"])


def _client(scope: Scope) -> str:
    """Address and port that the request came from; empty for a Unix socket."""
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else ""


def _request_id(given: bytes | None) -> bytes:
    """The client's own id if it is short and plain, else a new one."""
    if given and _PLAIN.fullmatch(given):
        return given
    return b"%s%08x" % (_PROCESS, next(_numbers))


def _json(
    document: Any,
    status: int = 200,
    headers: dict[str, str] | None = None,
    media_type: str = "application/json",
) -> Response:
    return Response(formats.dump_json(document), status, headers, media_type)
