"""A model call that hangs: `/health`, `/live`, and the limit that an expired request is told."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

import serving_kit
from serving_kit.models.functions import CallableModel
from serving_kit.service import Service
from serving_kit.settings import Settings
from tests.support import BlockingFunction, until

pytestmark = pytest.mark.light
Serve = Callable[..., Any]


@pytest.fixture
def blocking() -> Iterator[BlockingFunction]:
    blocking = BlockingFunction()
    blocking.open.set()
    yield blocking
    blocking.open.set()


def hang(client: httpx.Client, blocking: BlockingFunction) -> None:
    """Leave the model inside a call, by a request that has expired."""
    blocking.open.clear()
    assert client.post("/", content="x").status_code == 504
    assert blocking.inside.is_set()


def test_stuck_call_fails_health(serve: Serve, blocking: BlockingFunction) -> None:
    server = serve(blocking, timeout_ms=100)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        hang(client, blocking)
        until(lambda: client.get("/health").status_code == 503, timeout=20)
        answer = client.get("/health").json()
        assert answer["status"] == "stuck"
        assert "one model call has been running for" in answer["reason"]
        assert "serving_kit_ready 0.0" in client.get("/metrics").text
        assert client.get("/live").status_code == 200, "by default a hanging call restarts nothing"
        blocking.open.set()
        until(lambda: client.get("/health").status_code == 200)
        assert "serving_kit_ready 1.0" in client.get("/metrics").text


def test_stuck_call_fails_live(serve: Serve, blocking: BlockingFunction) -> None:
    server = serve(blocking, timeout_ms=100, live_timeout_s=6)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        hang(client, blocking)
        until(lambda: client.get("/health").status_code == 503, timeout=20)
        until(lambda: client.get("/live").status_code == 503, timeout=20)
        assert "must be restarted" in client.get("/live").json()["reason"]
        blocking.open.set()
        until(lambda: client.get("/live").status_code == 200)
    assert "live_timeout_s=6" in server.as_code()


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "soon", True])
def test_bad_live_timeout(value: Any) -> None:
    with pytest.raises(serving_kit.SettingError, match="live_timeout_s must be a number of seconds above 0"):
        serving_kit.create_app(list, live_timeout_s=value)


def state_after(seconds: float, *, timeout_ms: float, learned_s: float | None = None) -> str:
    """The state of a service whose model call has run for so long, on a clock of its own.

    `learned_s`: what such calls have taken before; None: there were none.
    """
    now = 0.0
    inside, go_on = threading.Event(), threading.Event()

    class Model(CallableModel):
        timings = () if learned_s is None else tuple((1, learned_s) for _ in range(10))

    def wait(texts: list[str]) -> list[str]:
        inside.set()
        assert go_on.wait(30)
        return texts

    async def main() -> str:
        nonlocal now
        settings = Settings(timeout_ms=timeout_ms, drop_hopeless=False)
        service = Service(Model(wait), settings, clock=lambda: now)
        await service.start()

        async def ask() -> None:
            with service.observe() as ticket:
                await service.predict(["x"], {}, ticket)

        request = asyncio.ensure_future(ask())
        await asyncio.to_thread(inside.wait, 30)
        now = seconds
        state, _ = service.state()
        request.cancel()
        go_on.set()
        await asyncio.wait([request])
        await service.stop()
        return state

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("seconds", "timeout_ms", "learned_s", "state"),
    [
        (4, 100, None, "ready"),  # too short: may be a pause of the machine
        (6, 100, None, "stuck"),
        (6, 2_000, None, "stuck"),
        (25, 60_000, None, "ready"),  # a long generation within its timeout
        (121, 60_000, None, "stuck"),
        (6, 2_000, 20.0, "ready"),  # expected to take long
        (150, 2_000, 20.0, "stuck"),
    ],
)
def test_when_a_call_counts_as_stuck(
    seconds: float, timeout_ms: float, learned_s: float | None, state: str
) -> None:
    assert state_after(seconds, timeout_ms=timeout_ms, learned_s=learned_s) == state


# -- which limit applied -----------------------------------------------------------------------------


def test_expired_message_names_limit(serve: Serve, blocking: BlockingFunction) -> None:
    server = serve(blocking, timeout_ms=200)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        blocking.open.clear()
        running = client.post("/", content="x")
        waiting = client.post("/", content="x")
        own = client.post("/", content="x", headers={"x-request-timeout-ms": "50"})
        longer = client.post("/", content="x", headers={"x-request-timeout-ms": "99999"})
    servers = "the request was not answered within 200 ms (timeout_ms)"
    assert [each.status_code for each in (running, waiting, own, longer)] == [504] * 4
    assert running.json()["error"] == waiting.json()["error"] == longer.json()["error"] == servers
    assert own.json()["error"] == (
        "the request was not answered within the client's 50 ms (X-Request-Timeout-Ms)"
    )


def test_slow_body_message_names_limit(serve: Serve, blocking: BlockingFunction) -> None:
    server = serve(blocking)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as sock:
        sock.sendall(
            b"POST / HTTP/1.1\r\nhost: localhost\r\nx-request-timeout-ms: 50\r\ncontent-length: 5\r\n\r\nab"
        )
        answer = b""
        while not answer.endswith(b"}"):
            chunk = sock.recv(4096)
            assert chunk, answer
            answer += chunk
    assert b"the body did not arrive within the client's 50 ms (X-Request-Timeout-Ms)" in answer


def test_kernel_call_message_names_limit(serve: Serve, blocking: BlockingFunction) -> None:
    server = serve(blocking, timeout_ms=2000)
    blocking.open.clear()
    with pytest.raises(serving_kit.DeadlineExceeded, match=r"within 2,000 ms \(timeout_ms\)"):
        server("x")
