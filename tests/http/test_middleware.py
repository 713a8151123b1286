"""The head of a request, its id, and the methods of a path."""

import asyncio
import socket
import sys
import types
from typing import Any

import httpx
import pytest

import serving_kit
from tests.support_http import status_line

pytestmark = pytest.mark.light


def test_request_id_of_the_client(client: httpx.Client) -> None:
    def echoed(given: str | bytes) -> str:
        return client.get("/live", headers={"x-request-id": given}).headers["x-request-id"]

    assert echoed("abc-1.2:3_4") == "abc-1.2:3_4"
    for bad in ("a b", "x" * 200, "<script>", "é".encode()):
        assert len(echoed(bad)) == 16


@pytest.mark.parametrize(
    "hosts", [b"", b"Host: localhost\r\nHost: localhost\r\n", b"Host: localhost\r\nhost: evil.example\r\n"]
)
@pytest.mark.parametrize("line", [b"GET /live", b"POST /", b"GET /nothing"])
def test_not_exactly_one_host(server: Any, line: bytes, hosts: bytes) -> None:
    request = line + b" HTTP/1.1\r\nContent-Length: 0\r\n" + hosts + b"\r\n"
    assert status_line(server, request).startswith(b"HTTP/1.1 400 ")


def test_http_1_0_without_host(server: Any) -> None:
    assert b" 200 " in status_line(server, b"GET /live HTTP/1.0\r\n\r\n")


def test_pipelined_requests(server: Any) -> None:
    requests = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60) as raw:
        raw.sendall(requests + b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        data = b""
        while more := raw.recv(2**20):
            data += more
    assert data.count(b"HTTP/1.1 200 ") == 5001
    assert data.count(b"HTTP/1.1 ") == 5001


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/", {"GET", "HEAD", "POST"}),
        ("PUT", "/settings", {"GET", "HEAD", "PATCH"}),
        ("OPTIONS", "/settings", {"GET", "HEAD", "PATCH"}),
        ("POST", "/health", {"GET", "HEAD"}),
    ],
)
def test_allow_header(server: Any, method: str, path: str, allowed: set[str]) -> None:
    refused = httpx.request(method, f"{server.url}{path}")
    assert refused.status_code == 405
    assert set(refused.headers["allow"].split(", ")) == allowed
    assert refused.headers["allow"] in refused.json()["error"]
    for each in allowed - {"POST", "PATCH"}:
        assert httpx.request(each, f"{server.url}{path}").status_code == 200


def test_request_id_in_a_ray_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    # What ray.serve offers inside a replica, and what its proxy (ray/serve/_private/http_util.py,
    # RequestIdMiddleware) does around it.
    ray_serve = types.ModuleType("ray.serve")
    ray_serve.get_replica_context = lambda: object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray.serve", ray_serve)
    app = serving_kit.create_app(lambda texts: texts)

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", b"from-ray")]}
            await send(message)

        scope = {**scope, "headers": [*scope["headers"], (b"x-request-id", b"from-ray")]}
        await app(scope, receive, send_with_id)

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(proxy)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport) as client:
            url = "http://127.0.0.1:1"
            return [await client.post(url, content="a"), await client.post(url), await client.get(f"{url}/x")]

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200, 400, 404]
    for answer in answers:
        assert answer.headers.get_list("x-request-id") == ["from-ray"]
    assert answers[1].json()["request_id"] == "from-ray"


def test_one_request_id(server: Any) -> None:
    for given in ({}, {"x-request-id": "mine"}):
        answer = httpx.post(server.url, content="a", headers=given)
        (sent,) = answer.headers.get_list("x-request-id")
        assert sent == given.get("x-request-id", sent)
