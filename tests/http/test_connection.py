"""Clients that never finish their request's head, over raw sockets."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from serving_kit.http import connection
from tests.support_http import read_to_end

pytestmark = pytest.mark.light

HEAD = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n"


@pytest.fixture
def client(serve: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    monkeypatch.setattr(connection, "_HEAD_TIMEOUT_S", 0.3)
    server = serve(lambda texts: texts)
    with socket.create_connection(("127.0.0.1", server._inline.port), timeout=10) as raw:
        yield raw


@pytest.mark.parametrize("sent", [b"", b"P", HEAD], ids=["nothing", "a letter", "no end"])
def test_head_that_does_not_come(client: socket.socket, sent: bytes) -> None:
    client.sendall(sent)
    assert read_to_end(client).startswith(b"HTTP/1.1 408 ")


def test_head_without_end(client: socket.socket) -> None:
    client.sendall(HEAD)
    sent = 0
    try:
        while sent < 100_000_000 and client.sendall(b"X-1: %s\r\n" % (b"a" * 1000)) is None:
            sent += 1007
    except ConnectionError:
        pass  # what was on its way when the server closed the connection
    assert sent < 100_000_000


def test_head_in_pieces(client: socket.socket) -> None:
    for _ in range(2):
        client.sendall(HEAD[:20])
        client.sendall(HEAD[20:])
        client.sendall(b"\r\nhi")
        answer = b""
        while not answer.endswith(b'"hi"'):
            answer += client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")


def test_half_a_head_during_a_request(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_HEAD_TIMEOUT_S", 0.1)
    wait = threading.Event()

    def slow(texts: list[str]) -> list[str]:
        wait.wait(10)
        return texts

    server = serve(slow)
    with socket.create_connection(("127.0.0.1", server._inline.port), timeout=10) as raw:
        raw.sendall(HEAD + b"\r\nhi" + HEAD)
        raw.settimeout(0.5)
        with pytest.raises(TimeoutError):
            raw.recv(1)  # the second request's time has been over for a while
        wait.set()
        raw.settimeout(10)
        data = read_to_end(raw)
    assert data.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in data
