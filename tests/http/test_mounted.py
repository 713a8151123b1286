"""The app as a part of another app: its lifespan has to be passed on, and it says so."""

import contextlib
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

import serving_kit
from serving_kit.inline_server import InlineServer, bind

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


def test_an_app_whose_lifespan_is_not_passed_on_says_what_is_missing() -> None:
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
        assert evil.status_code == 403, "who may not ask is told nothing else"


def test_an_app_whose_lifespan_is_passed_on_answers_and_is_stopped_with_the_outer_one() -> None:
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
    # That nothing of it still runs is checked after every test (tests/conftest.py).
