"""What the command prints about its token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support_process import command

pytestmark = pytest.mark.light


def printed(server: Any) -> str:
    server.process.terminate()
    text: str = server.ended()[1]
    return text


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_token_from_environment_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setenv("SERVING_KIT_TOKEN", "a-secret-of-the-operator")
    with command(tmp_path, "--host", host) as server:
        authorization = {"authorization": "Bearer a-secret-of-the-operator"}
        changed = httpx.patch(f"{server.url}/settings", json={"max_wait_ms": 1}, headers=authorization)
        assert changed.status_code == 200
        text = printed(server)
    assert "the one in SERVING_KIT_TOKEN" in text
    assert "a-secret-of-the-operator" not in text
    assert "?token=" not in text


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_generated_token_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.delenv("SERVING_KIT_TOKEN", raising=False)
    with command(tmp_path, "--host", host) as server:
        text = printed(server)
    [line] = [line for line in text.splitlines() if "token for PATCH" in line or "needs the token" in line]
    token = line.rpartition(" ")[2]
    assert len(token) > 20
    assert (f"/?token={token}" in text) == (host == "0.0.0.0")
