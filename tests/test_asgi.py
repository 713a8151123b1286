"""`create_app()` under plain uvicorn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support import REPOSITORY, until
from tests.support_http import answers, ended, free_port

pytestmark = pytest.mark.light


def test_app_under_uvicorn(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(
        "import serving_kit\n\n"
        "def shout(texts):\n    return [text.upper() for text in texts]\n\n"
        "app = serving_kit.create_app(shout, max_batch_size=16)\n"
    )
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, env=environment
    ) as process:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(url), timeout=30)
        assert httpx.post(url, content="hello").json() == "HELLO"
        assert httpx.get(f"{url}/settings").json()["max_batch_size"] == 16
        refused = httpx.patch(f"{url}/settings", json={"max_wait_ms": 1})
        assert refused.status_code == 403, "without a token no knob can be changed"
        status, said = ended(process)
    assert status in (0, -signal.SIGTERM)
    assert "Application shutdown complete" in said


def test_app_with_unloadable_model(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text("import serving_kit\n\napp = serving_kit.create_app(42)\n")
    done = subprocess.run(
        [sys.executable, "-m", "uvicorn", "server:app", "--port", str(free_port())],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"},
        check=False,
    )
    assert done.returncode == 3
    assert "StartError: cannot serve int: pass a Hub id" in done.stderr
