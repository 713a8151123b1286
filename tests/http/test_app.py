"""The app: its lifespan, also as a part of another app, and its dialects."""

import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

import httpx
import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount

import serving_kit
from serving_kit.errors import MalformedRequest
from serving_kit.http.access import Access, Headers
from serving_kit.http.app import build_app
from serving_kit.http.dialects import DIALECTS
from serving_kit.http.dialects.base import DecodedRequest, Dialect, Prediction, json_fragments
from serving_kit.http.endpoints import Endpoint
from serving_kit.http.openapi import OBJECT, TEXT, get
from serving_kit.http.problems import Problem
from serving_kit.http.strict_json import parse_json
from serving_kit.inline_server import InlineServer, bind
from serving_kit.models.loading import load_model
from serving_kit.service import Service

pytestmark = pytest.mark.light


def shout(texts: list[str]) -> list[str]:
    return [text.upper() for text in texts]


@contextlib.contextmanager
def listening(app: Starlette) -> Iterator[httpx.Client]:
    """The app behind a real uvicorn."""
    inline = InlineServer(app, bind("127.0.0.1", 0))
    inline.start()
    try:
        with httpx.Client(base_url=inline.url, timeout=20) as client:
            yield client
    finally:
        inline.stop()


def test_mounted_without_its_lifespan() -> None:
    model = serving_kit.create_app(shout, token="t")
    with listening(Starlette(routes=[Mount("/model", model)])) as client:
        for method, path in (("POST", "/"), ("GET", "/info"), ("GET", "/metrics"), ("GET", "/settings")):
            refused = client.request(method, f"/model{path}", content="a")
            assert refused.status_code == 503
            assert "lifespan_context(model_app)" in refused.json()["error"]
            assert refused.json()["error_type"] == "unavailable"
        health = client.get("/model/health")
        assert (health.status_code, health.json()["status"]) == (503, "stopped")
        assert "lifespan" in health.json()["reason"]
        assert client.get("/model/live").status_code == 200
        evil = client.post("/model/", content="a", headers={"origin": "https://evil.example"})
        assert evil.status_code == 403, "access is decided first"


def test_mounted_with_its_lifespan() -> None:
    model_app = serving_kit.create_app(shout)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with model_app.router.lifespan_context(model_app):
            yield

    with listening(Starlette(routes=[Mount("/model", model_app)], lifespan=lifespan)) as client:
        assert client.post("/model/", content="a").json() == "A"
        assert client.get("/model/health").json() == {"status": "ready"}
        assert client.delete("/model/settings").headers["allow"] == "GET, HEAD, PATCH"
        assert client.get("/model/stats").json()["requests"]["ok"] == 1
    # After every test `nothing_is_left_behind` checks that no thread of it still runs (tests/conftest.py).


# -- dialects --------------------------------------------------------------------------------------


def decode(body: bytes, headers: Headers, task: str) -> DecodedRequest | None:
    document = parse_json(body)
    if not isinstance(document, dict) or not isinstance(document.get("input"), list):
        raise MalformedRequest("input must be a list")
    return DecodedRequest(document["input"], {}, many=True)


async def encode(request: DecodedRequest, answers: Sequence[object], task: str) -> bytes:
    return orjson.dumps({"data": await json_fragments(answers)})


def error_shape(problem: Problem) -> tuple[object, str]:
    return {"error": {"message": problem.full_text, "code": problem.status}}, "application/json"


async def models(request: Request) -> Response:
    return PlainTextResponse("one")


OTHER = Dialect(
    predictions=(
        Prediction(
            "/other/shout", "Shout.", "shout", decode, encode, lambda subject: {"application/json": OBJECT}
        ),
    ),
    error=error_shape,
    endpoints=(
        Endpoint("GET", "/other/models", models, get("Models.", {"text/plain": TEXT}), error=error_shape),
    ),
)


def test_another_dialect() -> None:
    """Its routes, its shapes, its errors and its part of the OpenAPI document."""
    service = Service(load_model(shout))
    app = build_app(service, access=Access("t"), dialects=[*DIALECTS, OTHER])
    with listening(app) as client:
        assert client.post("/other/shout", json={"input": ["a", "b"]}).json() == {"data": ["A", "B"]}
        assert client.post("/", content="a").json() == "A"
        assert client.get("/other/models").text == "one"
        malformed = client.post("/other/shout", json={})
        assert malformed.status_code == 400
        assert malformed.json() == {"error": {"message": "input must be a list", "code": 400}}
        denied = client.post("/other/shout", json={}, headers={"origin": "https://evil.example"})
        assert denied.json()["error"]["code"] == 403
        assert client.get("/other/shout").json()["error"]["code"] == 405
        paths = client.get("/openapi.json").json()["paths"]
        assert paths["/other/shout"]["post"]["operationId"] == "shout"
        assert "get" in paths["/other/models"]
        assert client.get("/stats").json()["requests"]["malformed"] == 1
