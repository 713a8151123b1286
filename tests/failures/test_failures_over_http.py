"""A model that fails, over HTTP: statuses, `/health`, and what the owner is told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import serving_kit
from serving_kit import status_reader
from serving_kit.errors import Unavailable
from serving_kit.failures import breaker
from tests.support import until

pytestmark = pytest.mark.light


class Faulty:
    """Answers in capitals; raises or waits at a gate when it is told to."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.inside, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, texts: list[str]) -> list[str]:
        self.inside.set()
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        return [text.upper() for text in texts]


@pytest.fixture
def faulty(serve: Any) -> Iterator[tuple[Any, Faulty, httpx.Client]]:
    model = Faulty()
    server = serve(model, timeout_ms=20_000)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield server, model, client
        model.gate.set()


def health(client: httpx.Client) -> tuple[int, str, str]:
    answer = client.get("/health")
    return answer.status_code, answer.json()["status"], answer.json().get("reason", "")


def test_broken_model_on_health(faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, model, client = faulty
    monkeypatch.setattr(breaker, "_INCONCLUSIVE_S", 0.0)
    monkeypatch.setattr(breaker, "_INCONCLUSIVE_PAUSE_S", 3.0)
    assert health(client) == (200, "ready", "")
    model.error = LookupError("secret")
    statuses = [client.post("/", content=f"x{n}").status_code for n in range(5)]
    assert statuses == [500] * 5
    until(lambda: health(client)[0] == 503)
    _, status, reason = health(client)
    assert status == "failed"
    assert "no request was answered for" in reason
    assert "the last failed with LookupError; it is tried again in" in reason
    refused = client.post("/", content="x")
    assert refused.status_code == 503
    assert refused.json()["error_type"] == "unavailable"
    assert 1 <= int(refused.headers["retry-after"]) <= 3
    assert "secret" not in refused.text + reason
    assert server.stats()["faults"]["error"] == 5
    assert 'serving_kit_faults_total{kind="error"} 5.0' in client.get("/metrics").text

    model.error = None
    until(lambda: health(client)[0] == 200)
    _, status, reason = health(client)
    assert status == "ready", "or a load balancer would send no request that closes it"
    assert "requests are let in to try again" in reason
    assert client.post("/", content="x").json() == "X"
    assert health(client) == (200, "ready", "")


def test_lost_device_on_health(faulty: Any) -> None:
    _, model, client = faulty
    model.error = RuntimeError("CUDA error: device-side assert triggered")
    assert client.post("/", content="x").status_code == 500
    assert health(client)[:2] == (503, "failed")
    assert "restart the kernel" in health(client)[2]
    refused = client.post("/", content="x")
    assert (refused.status_code, "retry-after" in refused.headers) == (503, False)


def test_input_that_does_not_fit(faulty: Any) -> None:
    server, model, client = faulty
    model.error = MemoryError()
    refused = client.post("/", content="x")
    assert (refused.status_code, refused.json()["error_type"]) == (413, "request_too_large")
    assert server.stats()["faults"]["out_of_memory"] == 1


def test_stuck_step(faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server, model, client = faulty
    model.gate.clear()
    monkeypatch.setattr(status_reader, "_STUCK_AT_LEAST_S", 0.3)
    server.tune(timeout_ms=100)
    began = time.monotonic()
    late = client.post("/", content="x")
    assert late.status_code == 504
    assert time.monotonic() - began < 2
    until(lambda: health(client)[:2] == (503, "stuck"))
    assert "one model call has been running for" in health(client)[2]
    model.gate.set()
    until(lambda: health(client)[0] == 200)
    model.gate.clear()
    model.inside.clear()
    assert client.post("/", content="x").status_code == 504
    began = time.monotonic()
    server.stop(0.2)
    assert time.monotonic() - began < 5
    model.gate.set()


def test_clients_that_leave(faulty: Any) -> None:
    server, model, client = faulty
    model.gate.clear()
    sockets = []
    for _ in range(3):
        sock = socket.create_connection(("127.0.0.1", client.base_url.port), timeout=5)
        sock.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n\r\nx")
        sockets.append(sock)
        assert model.inside.wait(5)
    until(lambda: server.stats()["queue_depth"] == 2)
    for sock in sockets:
        sock.close()
    until(lambda: server.stats()["queue_depth"] == 0)
    until(lambda: server.stats()["requests"]["cancelled"] == 3)
    model.gate.set()
    until(lambda: server.stats()["wasted_items"] == 1)
    assert server.stats()["items"] == 1, "the others never ran"


def test_loop_thread_that_dies(faulty: Any, capsys: Any) -> None:
    def die() -> None:
        raise SystemExit("killed")

    server, model, client = faulty
    port = client.base_url.port
    assert client.post("/", content="x").json() == "X"
    model.gate.clear()
    model.inside.clear()
    with ThreadPoolExecutor(2) as pool:
        over_http = pool.submit(client.post, "/", content="x")
        assert model.inside.wait(5)
        in_the_cell = pool.submit(server, "y")
        until(lambda: server.stats()["in_flight"] == 2)
        server._inline.loop.call_soon_threadsafe(die)
        with pytest.raises((RuntimeError, Unavailable, CancelledError)):
            in_the_cell.result(10)
        answer = over_http.exception(10) or over_http.result()
        assert isinstance(answer, httpx.TransportError) or answer.status_code >= 500
        until(lambda: not server._inline.alive)
        assert not server.running
        model.gate.set()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        stats = server.stats()
        assert (stats["state"], stats["reason"]) == (
            "failed",
            "the server's thread has died: run serve() again",
        )
        assert ", failed," in repr(server)
        with pytest.raises(RuntimeError, match="stopped"):
            server("z")
        assert any("the server's thread has died" in line for line in server.logs())
        again = serving_kit.serve(model, port=port)
        client.close()
    assert again("z") == "Z"
    again.stop()
    assert capsys.readouterr().err == ""
