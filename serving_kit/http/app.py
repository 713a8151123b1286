"""The ASGI app around one service (Starlette): its routes, its middleware, its lifespan.

    middleware.py ── predict.py ──▶ dialects/ ──▶ service.py        POST /
          │
          └───────── routes.py                                      everything else

The app is built by a factory and nothing asyncio exists before its lifespan, so that the same app runs in a
notebook, under `uvicorn` and elsewhere. The service lives on `app.state.service`. URLs are relative, so
that the app works under any prefix.

Not here: what a request does (`service.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Callable, Iterable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from serving_kit.http import routes
from serving_kit.http.access import Access
from serving_kit.http.dialects import DIALECTS
from serving_kit.http.dialects.base import Dialect
from serving_kit.http.endpoints import Endpoint, RouteTable
from serving_kit.http.middleware import RequestMiddleware, Runtime, raise_again
from serving_kit.http.predict import prediction_endpoints
from serving_kit.service import Service


def build_app(
    service: Service | Callable[[], Service],
    *,
    access: Access | None = None,
    drain_s: float = 5.0,
    access_log: bool = False,
    dialects: Iterable[Dialect] = DIALECTS,
) -> Starlette:
    """The ASGI app around one service.

    Args:
        service: The service; or a function that makes it, called once when the app starts, on a thread on
            which it may take its time to load a model.
        access: Who may ask; None: this machine, and settings cannot be changed.
        drain_s: Seconds to finish what was admitted when the app stops.
        access_log: Write one line per request to the logger `serving_kit.access`.
        dialects: The shapes of requests and answers that it speaks.
    """
    access = access or Access()
    table = RouteTable(all_endpoints(dialects))
    runtime = Runtime()
    app = Starlette(
        routes=[endpoint.route() for endpoint in table.endpoints],
        middleware=[
            *_cors(access.origins),
            Middleware(RequestMiddleware, runtime=runtime, table=table, access=access, access_log=access_log),
        ],
        exception_handlers={HTTPException: raise_again},
        lifespan=_lifespan(service, runtime, drain_s),
    )
    app.state.endpoints = table.endpoints
    return app


def all_endpoints(dialects: Iterable[Dialect] = DIALECTS) -> list[Endpoint]:
    """The routes of an app that speaks these dialects."""
    dialects = tuple(dialects)
    others = [endpoint for dialect in dialects for endpoint in dialect.endpoints]
    return [*prediction_endpoints(dialects), *others, *routes.ENDPOINTS]


def _lifespan(
    service: Service | Callable[[], Service], runtime: Runtime, drain_s: float
) -> Callable[[Starlette], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        made = service if isinstance(service, Service) else await asyncio.to_thread(service)
        await made.start()
        app.state.service = runtime.service = made
        runtime.sends_request_id = not _in_ray_replica()
        try:
            yield
        finally:
            await made.stop(drain_s)

    return lifespan


def _cors(origins: frozenset[str]) -> list[Middleware]:
    """Outside of everything else: a page that may ask must be able to read error responses, too."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=sorted(origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    ]


def _in_ray_replica() -> bool:
    """Whether Ray Serve runs this app. Its proxy makes the request ids and adds them to the responses."""
    context = getattr(sys.modules.get("ray.serve"), "get_replica_context", None)
    if context is None:
        return False
    try:
        context()
    except Exception:  # RayServeException: a driver or a task, but no replica
        return False
    return True
