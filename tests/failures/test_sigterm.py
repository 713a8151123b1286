"""SIGTERM to a server under uvicorn."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import REPOSITORY, until

pytestmark = pytest.mark.light

SLOW_APP = """
import pathlib, time
import serving_kit

def slow(texts):
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    return [text.upper() for text in texts]

app = serving_kit.create_app(slow, max_batch_size=1, timeout_ms=10_000)
"""


@pytest.fixture
def under_uvicorn(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that answers nothing before there is a file `go` in the temporary folder."""
    (tmp_path / "server.py").write_text(SLOW_APP)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"},
    ) as process:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(url), timeout=30)
        yield process, url
        process.kill()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_admitted_requests_are_finished(under_uvicorn: Any, tmp_path: Path) -> None:
    process, url = under_uvicorn
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(httpx.post, url, content=text, timeout=20) for text in "abc"]
        until(lambda: httpx.get(f"{url}/stats").json()["in_flight"] == 3)
        process.send_signal(signal.SIGTERM)
        until(lambda: not answers(url), what="the end of new connections")
        (tmp_path / "go").touch()
        assert sorted(each.result(20).json() for each in asked) == ["A", "B", "C"]
    said, _ = process.communicate(timeout=10)
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Application shutdown complete" in said
    assert "Traceback" not in said


def test_bounded_while_a_step_is_stuck(under_uvicorn: Any) -> None:
    process, url = under_uvicorn
    with ThreadPoolExecutor(2) as pool:
        soon = {"x-request-timeout-ms": "1000"}
        asked = [pool.submit(httpx.post, url, content=text, timeout=20, headers=soon) for text in "ab"]
        until(lambda: httpx.get(f"{url}/stats").json()["in_flight"] == 2)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert [each.result(20).status_code for each in asked] == [504, 504]
        said, _ = process.communicate(timeout=20)
    assert time.monotonic() - began < 1 + 5 + 5, "the requests' own time, the drain, and a margin"
    assert process.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in said
