"""The server of the transformers guide "Web server inference": one text after the other.

As in the guide, the pipeline runs in the event loop. Only `on_event`, which Starlette has removed, is
replaced by a lifespan.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from common import arguments, load, run
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

args = arguments()


async def homepage(request: Request) -> JSONResponse:
    payload = await request.body()
    response_q: asyncio.Queue[Any] = asyncio.Queue()
    await request.app.state.model_queue.put((payload.decode("utf-8"), response_q))
    return JSONResponse(await response_q.get())


async def server_loop(q: asyncio.Queue[Any]) -> None:
    pipe = load(args)
    while True:
        string, response_q = await q.get()
        await response_q.put(pipe(string))


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.model_queue = asyncio.Queue()
    task = asyncio.create_task(server_loop(app.state.model_queue))
    yield
    task.cancel()


run(Starlette(routes=[Route("/", homepage, methods=["POST"])], lifespan=lifespan), args.port)
