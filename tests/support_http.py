"""What several test modules share about servers in other processes and raw HTTP. No fixtures here."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess
import threading
from typing import Any

import httpx
import pytest

# For the fixture `port` of tests/http: a server in this process, and the command in its own.
NOTEBOOK_AND_COMMAND = [pytest.param("notebook", marks=pytest.mark.light), "command"]


def free_port() -> int:
    """A port of this machine that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def answers(url: str) -> bool:
    """Whether the server at `url` is ready."""
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Stop a process with SIGTERM; return its exit status and what it printed."""
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=20)
    return process.returncode, printed


def read_response(raw: socket.socket) -> tuple[int, bytes]:
    """Status and body of the next response; an interim one (100 Continue) is skipped."""
    response = http.client.HTTPResponse(raw, method="POST")
    response.begin()
    return response.status, response.read()


def read_to_end(raw: socket.socket) -> bytes:
    """All that arrives until the server closes the connection."""
    data = b""
    while more := raw.recv(65536):
        data += more
    return data


def status_line(server: Any, request: bytes) -> bytes:
    """The first line of the response to these bytes."""
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as raw:
        raw.sendall(request)
        return raw.makefile("rb").readline()


class GatedModel:
    """Upper case. The text "raise" raises, "nan" gives NaN, and "wait" waits until the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.inside = threading.Event()
        self.sizes: list[int] = []

    def __call__(self, texts: list[Any], *, suffix: str = "") -> list[Any]:
        self.sizes.append(len(texts))
        if "raise" in texts:
            raise ValueError("the secret is /home/alice/token")
        if "nan" in texts:
            return [float("nan")] * len(texts)
        if "wait" in texts:
            self.inside.set()
            assert self.gate.wait(10)
        return [str(text).upper() + suffix for text in texts]


def server_of(client: httpx.Client) -> Any:
    """The server behind the fixture `client` of tests/http."""
    return client.server  # type: ignore[attr-defined]


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The problem document of a response; fail unless it has this status and quotes nothing private."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["error"] == body["detail"]
    assert body["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    assert "/home" not in response.text
    return body
