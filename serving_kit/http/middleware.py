"""What every request passes: access, its id, errors as responses, the access log.

    head ──▶ one Host ──▶ authorise ──▶ started? ──▶ route ──▶ response
               │              │             │          │
               └──────────────┴─────────────┴──────────┴──▶ problem in the route's shape of errors

Not here: who may ask (`access.py`), which status an error has (`problems.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import re
import secrets
import time
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving_kit import log
from serving_kit.errors import MalformedRequest, Stopping, Unavailable
from serving_kit.http import problems
from serving_kit.http.access import PRIVATE_HEADERS, Access, Denied, Headers, Level, Login, RequestHead
from serving_kit.http.bodies import answer_unread, is_unread
from serving_kit.http.endpoints import REQUEST_ID, SERVICE, RouteTable
from serving_kit.http.routes import NOT_STARTED
from serving_kit.service import Service

# Request ids are names, not secrets: one random part for the process and a number, because fresh random
# bytes for each were a fifth of what a request with an instant model costs.
_PROCESS = secrets.token_hex(4).encode()
_numbers = itertools.count(1)
_PLAIN_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_CLIENT_LEFT = 499  # in the access log, for a request without a response


@dataclass(slots=True)
class Runtime:
    """What the lifespan of the app has started. Loop thread only.

    Attributes:
        service: None before the lifespan; it stays after it, stopped.
        sends_request_id: Whether responses get the request's id here.
    """

    service: Service | None = None
    sends_request_id: bool = True


class Exchange:
    """One request and its response."""

    __slots__ = (
        "_answered_at",
        "_arrived_at",
        "_runtime",
        "_send",
        "headers",
        "method",
        "path",
        "request_id",
        "scope",
        "status",
    )

    def __init__(self, scope: Scope, send: Send, runtime: Runtime) -> None:
        self.scope, self._send, self._runtime = scope, send, runtime
        self.headers: Headers = dict(scope["headers"])  # of several with one name the last
        self.method: str = scope["method"]
        self.path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        self.request_id = _request_id(self.headers.get(b"x-request-id"))
        self.status = _CLIENT_LEFT
        self._arrived_at = time.monotonic()
        self._answered_at: float | None = None

    @property
    def started(self) -> bool:
        """Whether the response has begun."""
        return self._answered_at is not None

    @property
    def service(self) -> Service | None:
        """What answers; None: the app is not started."""
        return self._runtime.service

    async def send(self, message: Message) -> None:
        """Send a message of the response, the first with the request's id."""
        if message["type"] == "http.response.start":
            self.status, self._answered_at = message["status"], time.monotonic()
            if self._runtime.sends_request_id:
                message["headers"].append((b"x-request-id", self.request_id))
        await self._send(message)

    def stopping(self) -> bool:
        """Whether the server stops."""
        service = self.service
        return service is not None and (service.stopped or service.draining_since is not None)

    def log(self) -> None:
        """Write the line of the access log."""
        client = self.scope.get("client")
        latency_s = (self._answered_at or time.monotonic()) - self._arrived_at
        log.access(
            {
                "method": self.method,
                "path": self.path,  # without the query, which may hold the token
                "status": self.status,
                "latency_ms": round(latency_s * 1e3, 1),
                "request_id": self.request_id.decode(),
                "client": f"{client[0]}:{client[1]}" if client else "",  # a Unix socket has none
            }
        )


class RequestMiddleware:
    """Authorises each request, gives each response a request id, and each exception a response.

    Pure ASGI, inside Starlette's own error middleware: no exception reaches that one, which would print
    it from a server thread into a cell of the notebook.
    """

    def __init__(
        self, app: ASGIApp, runtime: Runtime, table: RouteTable, access: Access, access_log: bool = False
    ) -> None:
        self.app = app
        self.runtime = runtime
        self.table = table
        self.access = access
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; the ASGI interface."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = Exchange(scope, send, self.runtime)
        scope[REQUEST_ID] = exchange.request_id.decode()
        scope[SERVICE] = self.runtime.service
        try:
            await self._answer(exchange, receive)
        except (Exception, asyncio.CancelledError) as error:
            if not exchange.started:
                await self._answer_error(error, exchange, receive)
        finally:
            if self.access_log:
                exchange.log()

    async def _answer(self, exchange: Exchange, receive: Receive) -> None:
        scope, method, path = exchange.scope, exchange.method, exchange.path
        if not _has_one_host(scope, exchange.headers):
            raise MalformedRequest("a request of HTTP/1.1 has exactly one Host header")
        endpoint = self.table.find(method, path)
        if endpoint is not None:
            level, purpose = endpoint.level, endpoint.purpose
        else:
            level, purpose = self.table.level(method, path), ""
        head = RequestHead(method, path, scope["query_string"], scope.get("server"), exchange.headers)
        decision = self.access.authorise(head, level, purpose)
        if isinstance(decision, Denied):
            problem = problems.denied_problem(decision, exchange.request_id.decode())
            await self._send_problem(problem, exchange, receive)
        elif isinstance(decision, Login):
            headers = {"location": ".", "set-cookie": decision.cookie, **PRIVATE_HEADERS}
            await Response(status_code=303, headers=headers)(scope, receive, exchange.send)
        elif level is not Level.OPEN and scope[SERVICE] is None:
            raise Unavailable(NOT_STARTED)
        elif endpoint is not None and endpoint.app is not None:
            await endpoint.app(scope, receive, exchange.send)
        else:
            await self.app(scope, receive, exchange.send)

    async def _answer_error(self, error: BaseException, exchange: Exchange, receive: Receive) -> None:
        if isinstance(error, asyncio.CancelledError):  # a server that stops cancels what is unfinished
            error = Stopping()
        assert isinstance(error, Exception)
        problem = problems.error_problem(error, exchange.request_id.decode(), exchange.service)
        if isinstance(error, Stopping):
            response = problems.response(problem, self.table.error_shape(exchange.path))
            if exchange.scope["http_version"] in ("1.0", "1.1"):
                response.headers["connection"] = "close"
            await response(exchange.scope, receive, exchange.send)
        else:
            await self._send_problem(problem, exchange, receive)

    async def _send_problem(self, problem: problems.Problem, exchange: Exchange, receive: Receive) -> None:
        response = problems.response(problem, self.table.error_shape(exchange.path))
        if is_unread(exchange.scope, exchange.headers):
            await answer_unread(response, exchange.scope, receive, exchange.send, exchange.stopping)
        else:
            await response(exchange.scope, receive, exchange.send)


async def raise_again(request: Request, error: Exception) -> Response:
    """Starlette's handler of 404 and 405: leaves them to `RequestMiddleware`, like every other error."""
    if isinstance(error, HTTPException) and error.status_code == 405:
        # The router names the methods of the first route of that path, and a path may have several.
        routes = [each for each in request.app.routes if each.matches(request.scope)[0] != Match.NONE]
        methods = {method for route in routes if isinstance(route, Route) for method in route.methods or ()}
        error.headers = {"allow": ", ".join(sorted(methods))}
    raise error


def _has_one_host(scope: Scope, headers: Headers) -> bool:
    """Whether the request names its host exactly once (RFC 9112, 3.2), which HTTP/1.0 need not do."""
    if len(headers) == len(scope["headers"]):  # no header twice
        return b"host" in headers or scope["http_version"] != "1.1"
    hosts = [name for name, _ in scope["headers"]].count(b"host")
    return hosts == 1 or (hosts == 0 and scope["http_version"] != "1.1")


def _request_id(given: bytes | None) -> bytes:
    """The client's own id if it is short and plain, else a new one."""
    if given and _PLAIN_ID.fullmatch(given):
        return given
    return b"%s%08x" % (_PROCESS, next(_numbers))
