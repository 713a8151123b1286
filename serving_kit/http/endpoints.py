"""A route of the server: its handler, and beside it who may ask, its OpenAPI fragment, its shape of errors.

Not here: the routes themselves (`routes.py`, `dialects/`), the decision who may ask (`access.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from serving_kit.http.access import Level
from serving_kit.http.openapi import Describe
from serving_kit.http.problems import ErrorShape, problem_json

Handler = Callable[[Request], Awaitable[Response]]
# In the scope, for handlers: what the middleware knows of the request.
REQUEST_ID = "serving_kit.request_id"  # a string
SERVICE = "serving_kit.service"  # None: the app is not started; only routes of the level OPEN see that


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One method of one path.

    Attributes:
        method: In upper case. GET includes HEAD.
        path: Under the app's prefix. A path with parameters has the level CLIENT.
        handler: What answers.
        describe: Makes its OpenAPI operation.
        level: Who may ask.
        purpose: What takes the token, for the text of a denial; for the level OWNER.
        app: An ASGI app instead of the handler, called without the router, which costs as much as the
            answer of an instant model.
        error: The shape of an error.
    """

    method: str
    path: str
    handler: Handler | None
    describe: Describe
    level: Level = Level.CLIENT
    purpose: str = ""
    app: ASGIApp | None = None
    error: ErrorShape = problem_json

    def route(self) -> Route:
        """For Starlette's router."""
        target = self.handler or self.app
        assert target is not None, "an endpoint has a handler or an app"
        return Route(self.path, target, methods=[self.method])


class RouteTable:
    """The endpoints by method and path."""

    def __init__(self, endpoints: Iterable[Endpoint]) -> None:
        self.endpoints = tuple(endpoints)
        self._by_route = {("HEAD", each.path): each for each in self.endpoints if each.method == "GET"}
        self._by_route |= {(each.method, each.path): each for each in self.endpoints}
        self._open_paths = frozenset(each.path for each in self.endpoints if each.level is Level.OPEN)
        self._error_shapes = {each.path: each.error for each in self.endpoints}

    def find(self, method: str, path: str) -> Endpoint | None:
        """The endpoint; None: there is none, or its path has parameters."""
        return self._by_route.get((method, path))

    def level(self, method: str, path: str) -> Level:
        """Who may ask this route, also where there is none: a 404 needs the same level as an answer."""
        endpoint = self.find(method, path)
        if endpoint is not None:
            return endpoint.level
        return Level.OPEN if path in self._open_paths else Level.CLIENT

    def error_shape(self, path: str) -> ErrorShape:
        """The shape of an error at this path, whatever the method."""
        return self._error_shapes.get(path, problem_json)
