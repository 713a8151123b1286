"""Mixedbread's `batched` in front of the pipeline, in a Starlette route. Its wait is the default 5 ms."""

import batched
from common import answer, arguments, load, run
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

args = arguments()
pipe = load(args)


@batched.aio.dynamically(batch_size=args.batch_size)
def predict(texts: list[str]) -> list[object]:
    return answer(pipe, texts)


async def homepage(request: Request) -> JSONResponse:
    body = await request.body()
    return JSONResponse(await predict(body.decode("utf-8")))


run(Starlette(routes=[Route("/", homepage, methods=["POST"])]), args.port)
