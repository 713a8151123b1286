"""A bare Starlette route that returns the body of the request: what HTTP alone costs on this machine."""

from common import arguments, run
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


async def echo(request: Request) -> Response:
    return Response(await request.body(), media_type="application/json")


run(Starlette(routes=[Route("/", echo, methods=["POST"])]), arguments().port)
