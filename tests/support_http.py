"""What several test modules share about servers in other processes and raw HTTP. No fixtures here."""

from __future__ import annotations

import http.client
import signal
import socket
import subprocess

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
