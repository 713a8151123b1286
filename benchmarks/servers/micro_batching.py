"""A bare Starlette route with micro-batching in front of an engine: a queue, and one thread that computes.

A batch is what waits when the engine is free, up to `--batch-size`; the first item waits `--delay-ms` for
company. HTTP goes on while the engine computes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from common import run
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

Item = tuple[str, "asyncio.Future[Any]"]


async def _batch(queue: asyncio.Queue[Item], args: argparse.Namespace) -> list[Item]:
    loop = asyncio.get_running_loop()
    batch = [await queue.get()]
    end = loop.time() + args.delay_ms / 1000
    while len(batch) < args.batch_size:
        if queue.empty() and loop.time() < end:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(end):
                    batch.append(await queue.get())
        elif queue.empty():
            break
        else:
            batch.append(queue.get_nowait())
    return batch


def serve(predict: Callable[[Sequence[str]], Sequence[Any]], args: argparse.Namespace) -> None:
    """Serve `predict` at `/` until the process ends."""
    queue: asyncio.Queue[Item] = asyncio.Queue()

    async def work() -> None:
        while True:
            batch = await _batch(queue, args)
            outputs = await asyncio.to_thread(predict, [text for text, _ in batch])
            for (_, answer), output in zip(batch, outputs, strict=True):
                if not answer.done():
                    answer.set_result(output)

    async def homepage(request: Request) -> JSONResponse:
        text = (await request.body()).decode("utf-8")
        answer = asyncio.get_running_loop().create_future()
        await queue.put((text, answer))
        return JSONResponse(await answer)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(work())
        yield
        task.cancel()

    run(Starlette(routes=[Route("/", homepage, methods=["POST"])], lifespan=lifespan), args.port)
