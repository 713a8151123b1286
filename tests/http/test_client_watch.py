"""Clients that are slow or leave."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support import until
from tests.support_http import GatedModel, server_of

pytestmark = pytest.mark.light


def test_body_that_does_not_end(client: httpx.Client) -> None:
    url = httpx.URL(str(client.base_url))
    with socket.create_connection((url.host, url.port or 80), timeout=10) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\nx-request-timeout-ms: 100\r\n")
        sock.sendall(b"content-length: 10\r\n\r\nab")
        assert sock.recv(100).startswith(b"HTTP/1.1 408")


def test_client_that_leaves_while_its_item_waits(client: httpx.Client, model: GatedModel) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/", content="wait")
        assert model.inside.wait(10)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/", content="impatient", timeout=0.05)
        until(lambda: server_of(client).stats()["queue_depth"] == 0)
        model.gate.set()
        assert running.result().status_code == 200
    assert server_of(client).stats()["requests"]["cancelled"] == 1
    assert model.sizes == [1]


def test_slow_client_that_leaves(client: httpx.Client, model: GatedModel) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/", content="wait")
        assert model.inside.wait(10)
        url = httpx.URL(str(client.base_url))
        with socket.create_connection((url.host, url.port or 80), timeout=10) as sock:
            sock.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\nab")
            time.sleep(0.1)  # longer than a request may last before it gets a watcher
            sock.sendall(b"cd")
            until(lambda: server_of(client).stats()["queue_depth"] == 1)
        until(lambda: server_of(client).stats()["queue_depth"] == 0)
        model.gate.set()
        assert running.result().status_code == 200
    assert server_of(client).stats()["requests"]["cancelled"] == 1
    assert model.sizes == [1]


def test_client_that_leaves_while_sending(client: httpx.Client) -> None:
    url = httpx.URL(str(client.base_url))
    with socket.create_connection((url.host, url.port or 80), timeout=10) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\nab")
        until(lambda: server_of(client).stats()["window"]["arrivals_per_s"] > 0)
    until(lambda: server_of(client).stats()["requests"]["cancelled"] == 1)
