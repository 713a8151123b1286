"""Small rules of HTTP that proxies and careful clients rely on."""

import asyncio
import json
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

import httpx
import pytest

import serving_kit
from serving_kit.settings import KNOBS

pytestmark = pytest.mark.light
Serve = Callable[..., Any]


def echo(texts: list[Any]) -> list[Any]:
    return texts


@pytest.fixture
def server(serve: Serve) -> Any:
    return serve(echo)


def status_line(server: Any, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as raw:
        raw.sendall(request)
        return raw.makefile("rb").readline()


# -- the head --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hosts", [b"", b"Host: localhost\r\nHost: localhost\r\n", b"Host: localhost\r\nhost: evil.example\r\n"]
)
@pytest.mark.parametrize("line", [b"GET /live", b"POST /", b"GET /nothing"])
def test_a_request_has_exactly_one_host(server: Any, line: bytes, hosts: bytes) -> None:
    request = line + b" HTTP/1.1\r\nContent-Length: 0\r\n" + hosts + b"\r\n"
    assert status_line(server, request).startswith(b"HTTP/1.1 400 ")


def test_http_1_0_needs_no_host(server: Any) -> None:
    assert b" 200 " in status_line(server, b"GET /live HTTP/1.0\r\n\r\n")


def test_many_small_requests_at_once_are_all_answered(server: Any) -> None:
    requests = b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5000
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60) as raw:
        raw.sendall(requests + b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        data = b""
        while more := raw.recv(2**20):
            data += more
    assert data.count(b"HTTP/1.1 200 ") == 5001
    assert data.count(b"HTTP/1.1 ") == 5001


@pytest.mark.parametrize(
    "timeout", ["1_000", "+1", "1e3", "inf", "nan", "0x10", ".5", "5.", "0", "0.0", "", "١"]
)
def test_a_timeout_is_a_plain_decimal_number(server: Any, timeout: str) -> None:
    headers = {b"x-request-timeout-ms": timeout.encode()}
    refused = httpx.post(server.url, content="a", headers=headers)  # type: ignore[arg-type]
    assert refused.status_code == 400
    assert "X-Request-Timeout-Ms" in refused.json()["error"]


@pytest.mark.parametrize("timeout", ["5000", "5000.5", "05000", "999999999999999"])
def test_plain_decimal_numbers_are_timeouts(server: Any, timeout: str) -> None:
    assert httpx.post(server.url, content="a", headers={"x-request-timeout-ms": timeout}).json() == "a"


# -- the answer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/", {"GET", "HEAD", "POST"}),
        ("PUT", "/settings", {"GET", "HEAD", "PATCH"}),
        ("OPTIONS", "/settings", {"GET", "HEAD", "PATCH"}),
        ("POST", "/health", {"GET", "HEAD"}),
    ],
)
def test_a_refused_method_comes_with_all_that_the_path_has(
    server: Any, method: str, path: str, allowed: set[str]
) -> None:
    refused = httpx.request(method, f"{server.url}{path}")
    assert refused.status_code == 405
    assert set(refused.headers["allow"].split(", ")) == allowed
    assert refused.headers["allow"] in refused.json()["error"]
    for each in allowed - {"POST", "PATCH"}:
        assert httpx.request(each, f"{server.url}{path}").status_code == 200


def test_behind_rays_proxy_there_is_one_request_id(monkeypatch: pytest.MonkeyPatch) -> None:
    # What ray.serve offers inside a replica, and what its proxy (ray/serve/_private/http_util.py,
    # RequestIdMiddleware) does around it.
    ray_serve = types.ModuleType("ray.serve")
    ray_serve.get_replica_context = lambda: object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray.serve", ray_serve)
    app = serving_kit.create_app(echo)

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


def test_everywhere_else_there_is_one_too(server: Any) -> None:
    for given in ({}, {"x-request-id": "mine"}):
        answer = httpx.post(server.url, content="a", headers=given)
        (sent,) = answer.headers.get_list("x-request-id")
        assert sent == given.get("x-request-id", sent)


# -- settings and numbers --------------------------------------------------------------------------


def test_the_bound_of_bodies_does_not_bind_settings(server: Any) -> None:
    token = {"authorization": f"Bearer {server.token}"}
    url = f"{server.url}/settings"
    assert httpx.patch(url, json={"max_body_bytes": 1}, headers=token).status_code == 200
    assert httpx.post(server.url, content="ab").status_code == 413
    everything = server.settings.to_dict() | {"max_body_bytes": 1000}
    assert httpx.patch(url, json=everything, headers=token).json()["max_body_bytes"] == 1000
    assert httpx.post(server.url, content="ab").json() == "ab"
    refused = httpx.patch(url, content=b" " * 1_000_000, headers=token)
    assert refused.status_code == 413
    assert "max_body_bytes" not in refused.json()["error"], "raising that knob would not help"


def test_the_timeout_of_requests_does_not_bind_settings(server: Any) -> None:
    server.tune(timeout_ms=1)
    body = b'{"timeout_ms": 5000}'
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as raw:
        raw.sendall(
            b"PATCH /settings HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n"
            b"Content-Length: %d\r\n\r\n" % (server.token.encode(), len(body))
        )
        for _ in range(10):  # each takes more than a millisecond
            assert httpx.get(f"{server.url}/live").status_code == 200
        raw.sendall(body)
        assert raw.makefile("rb").readline().startswith(b"HTTP/1.1 200 ")
    assert server.settings.timeout_ms == 5000


@pytest.mark.parametrize("name", ["self", "changes", "", "__init__", "max_wait_s", "by"])
def test_what_is_no_setting_is_refused_by_name(server: Any, name: str) -> None:
    before = server.settings
    token = {"authorization": f"Bearer {server.token}"}
    refused = httpx.patch(f"{server.url}/settings", content=json.dumps({name: 1}), headers=token)
    assert refused.status_code == 422
    assert f"no setting named {name!r}" in refused.json()["error"]
    assert server.settings == before
    assert name not in KNOBS


@pytest.mark.parametrize(("asked", "given"), [("1000000", 300), ("300", 300), ("7", 7), ("9" * 5000, 300)])
def test_a_series_has_five_minutes_at_most(server: Any, asked: str, given: int) -> None:
    assert len(httpx.get(f"{server.url}/stats?series={asked}").json()["series"]) == given
