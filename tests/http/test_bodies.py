"""Bodies within bounds, and clients that read the response before their body was read."""

import http.client
import io
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.support_http import NOTEBOOK_AND_COMMAND, problem, read_to_end

Serve = Callable[..., Any]


def test_bound_of_a_chunked_body(client: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(2000):
            yield b"x" * 10_000

    with suppress(httpx.WriteError):  # if it has answered and closed while we were still sending: as good
        problem(client.post("/", content=endless()), 413)
    assert client.get("/health").status_code == 200


def test_bound_of_an_announced_body(client: httpx.Client) -> None:
    url = httpx.URL(str(client.base_url))
    with socket.create_connection((url.host, url.port or 80), timeout=10) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 104857600\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 413")


MEGABYTES_40 = b"x" * 40_000_000


def chunks() -> Iterator[bytes]:
    for _ in range(400):
        yield MEGABYTES_40[:100_000]


@pytest.mark.parametrize("port", NOTEBOOK_AND_COMMAND, indirect=True)
def test_urllib_reads_the_413(port: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", MEGABYTES_40, timeout=60)
    with refused.value as response:
        assert response.code == 413
        assert b"max_body_bytes" in response.read()


@pytest.mark.parametrize("port", NOTEBOOK_AND_COMMAND, indirect=True)
@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_http_client_reads_the_413(port: int, chunked: bool) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/", chunks() if chunked else MEGABYTES_40, encode_chunked=chunked)
        response = connection.getresponse()
        assert response.status == 413
        assert response.getheader("connection") == "close"
        assert b"max_body_bytes" in response.read()
    finally:
        connection.close()


@pytest.mark.light
@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/", {}, 401),
        ("POST", "/nothing", {"authorization": "Bearer {token}"}, 404),
        ("PUT", "/", {"authorization": "Bearer {token}"}, 405),
        ("POST", "/", {"authorization": "Bearer {token}", "x-request-timeout-ms": "soon"}, 400),
        ("POST", "/", {"authorization": "Bearer {token}", "content-encoding": "gzip"}, 400),
        ("POST", "/", {"origin": "https://evil.example"}, 403),
        ("PATCH", "/settings", {"authorization": "Bearer {token}"}, 413),
    ],
)
def test_every_early_response_is_read(
    serve: Serve, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    server = serve(lambda texts: texts, require_token=True)
    headers = {name: value.format(token=server.token) for name, value in headers.items()}
    connection = http.client.HTTPConnection(server.url.partition("//")[2], timeout=60)
    try:
        connection.request(
            method, path, io.BytesIO(MEGABYTES_40[:20_000_000]), {**headers, "connection": "close"}
        )
        response = connection.getresponse()
        assert (response.status, response.getheader("connection")) == (status, "close")
        assert response.read().endswith(b"}")
    finally:
        connection.close()


@pytest.mark.parametrize("port", NOTEBOOK_AND_COMMAND, indirect=True)
def test_100_continue(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:
        raw.sendall(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 40000000\r\n\r\n"
        )
        answer = read_to_end(raw)  # closed though nothing was sent
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer


@pytest.mark.light
def test_bound_of_lingering(serve: Serve) -> None:
    server = serve(lambda texts: texts)
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    sent, most = 0, 1_000_000_000
    with socket.create_connection(address, timeout=60) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (2 * most))
        try:
            while sent < most:
                raw.sendall(MEGABYTES_40[:1_000_000])
                sent += 1_000_000
        except ConnectionError:
            pass
    assert sent < most
    assert server("a") == "a"


@pytest.mark.light
def test_stop_while_a_client_lingers(serve: Serve) -> None:
    server = serve(lambda texts: texts)
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=60) as raw:
        raw.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 40000000\r\n\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 413 ")
        stopped = threading.Event()

        def trickle() -> None:
            while not stopped.wait(0.2):
                try:
                    raw.sendall(b"x")
                except OSError:
                    return

        client = threading.Thread(target=trickle)
        client.start()
        begun = time.monotonic()
        server.stop(timeout=60)
        took = time.monotonic() - begun
        stopped.set()
        client.join()
    assert not server.running
    assert took < 20, "a trickling client may linger for 30 s, and the stop would wait for 60 s"


@pytest.mark.light
def test_long_head(serve: Serve) -> None:
    server = serve(lambda texts: texts)
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nCookie: " + b"a" * 1_000_000)
            assert read_to_end(raw).startswith(b"HTTP/1.1 431 ")
