"""The log of the command: levels, JSON, the access log."""

import json
import os
import subprocess
import sys
from typing import Any

import httpx

from tests.support import REPOSITORY, until
from tests.support_http import answers, free_port

TOKEN = "a-secret-token"


def run(*options: str) -> tuple[list[str], str]:
    """Serve the demo model and use it; the lines on stderr, and the id of a refused request."""
    port = free_port()
    command = [sys.executable, "-m", "serving_kit.cli", "serve", "--port", str(port), *options]
    environment = {**os.environ, "SERVING_KIT_TOKEN": TOKEN}
    with subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=REPOSITORY,
        env=environment,
    ) as process:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(url), timeout=90)
        with httpx.Client(base_url=url, timeout=30) as client:
            assert client.get("/", params={"token": TOKEN}).status_code == 303
            refused = client.post("/", content="no mask")
            assert refused.status_code == 422
            bearer = {"authorization": f"Bearer {TOKEN}"}
            assert client.patch("/settings", json={"max_wait_ms": 1}, headers=bearer).status_code == 200
        process.terminate()
        _, written = process.communicate(timeout=30)
    assert TOKEN not in written
    return written.splitlines(), refused.headers["x-request-id"]


def test_json_access_log() -> None:
    lines, refused = run("--log-format", "json", "--access-log")
    documents: list[dict[str, Any]] = [json.loads(line) for line in lines]
    ours = [each for each in documents if each["logger"] == "serving_kit"]
    [rejected] = [each for each in ours if each.get("outcome") == "rejected"]
    assert (rejected["level"], rejected["request_id"], rejected["items"]) == ("info", refused, 1)
    [changed] = [each for each in ours if each.get("setting") == "max_wait_ms"]
    assert (changed["before"], changed["after"]) == (0.0, 1.0)
    assert changed["by"].startswith("HTTP client 127.0.0.1:")
    access = [each for each in documents if each["logger"] == "serving_kit.access"]
    asked = [each for each in access if each["path"] != "/health"]
    assert [(each["method"], each["path"], each["status"]) for each in asked] == [
        ("GET", "/", 303),
        ("POST", "/", 422),
        ("PATCH", "/settings", 200),
    ]
    assert asked[1]["request_id"] == refused
    assert all(each["client"].startswith("127.0.0.1:") and each["latency_ms"] >= 0 for each in asked)


def test_log_level_warning() -> None:
    """There is no access log by default."""
    lines, _ = run("--log-level", "warning")
    assert not [line for line in lines if "serving_kit" in line]
