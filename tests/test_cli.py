"""`serving-kit serve`: options, the token, a served demo model."""

import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from serving_kit.cli import main
from serving_kit.settings import KNOBS
from tests.support import REPOSITORY, until
from tests.support_http import answers, ended, free_port


@pytest.mark.light
def test_help_lists_every_knob(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["serve", "--help"])
    assert done.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for name, knob in KNOBS.items():
        assert f"--{name.replace('_', '-')}" in words
        assert knob.doc[:40] in words
    assert "--max-batch-size ITEMS most items in one step" in words


@pytest.mark.light
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--max-batch-size", "0"], "max_batch_size must be a whole number from 1 to 4,096 items, got 0"),
        (["--max-batch-size", "many"], "max_batch_size must be a whole number"),
        (["--group-by-length", "maybe"], "group_by_length must be true or false"),
        (["--overload-status", "418"], "503 or 429"),
        (["--precision", "int8"], "precision must be one of exact, fast, got 'int8'"),
    ],
)
def test_bad_knob_value(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, before a model is loaded."""
    with pytest.raises(SystemExit) as done:
        main(["serve", *arguments])
    assert done.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.light
def test_port_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"port {port} is taken by another program" in capsys.readouterr().err


def test_serve_demo_model_until_sigterm() -> None:
    port = free_port()
    command = [sys.executable, "-m", "serving_kit.cli", "serve", "--port", str(port), "--max-batch-size", "8"]
    environment = {**os.environ, "SERVING_KIT_TOKEN": "a-token"}
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment
    ) as process:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(url), timeout=60)
        best = httpx.post(url, content="paris is the capital of [MASK].").json()[0]
        assert best.keys() == {"score", "token", "token_str", "sequence"}
        token = {"authorization": "Bearer a-token"}
        changed = httpx.patch(f"{url}/settings", json={"max_wait_ms": 1}, headers=token).json()
        assert (changed["max_batch_size"], changed["max_wait_ms"]) == (8, 1.0)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
            slow.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 6\r\n\r\n[MASK")
            until(lambda: httpx.get(f"{url}/stats").json()["requests"]["ok"] == 1)
            process.send_signal(signal.SIGTERM)
            until(lambda: not answers(url))
            slow.sendall(b"]")
            assert slow.recv(1000).startswith(b"HTTP/1.1 503"), (
                "a body that ends after the signal is rejected"
            )
        status, said = ended(process)
    assert status in (0, -signal.SIGTERM)
    assert f"serving serving-kit-demo (fill-mask, cpu) at {url}" in said
    assert "Traceback" not in said


def test_network_host_requires_token() -> None:
    port = free_port()
    command = [sys.executable, "-m", "serving_kit.cli", "serve", "--host", "0.0.0.0", "--port", str(port)]
    environment = {**os.environ, "SERVING_KIT_TOKEN": "a-token"}
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment
    ) as process:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(url), timeout=60)
        assert httpx.get(f"{url}/stats").status_code == 401
        with httpx.Client(follow_redirects=True) as browser:
            assert browser.get(f"{url}/?token=a-token").status_code == 200
        status, said = ended(process)
    assert status in (0, -signal.SIGTERM)
    assert "everything needs the token: the one in SERVING_KIT_TOKEN" in said
    assert "a-token" not in said, "a token from the environment is not printed"
    assert "Traceback" not in said


@pytest.mark.light
def test_empty_host(capsys: pytest.CaptureFixture[str]) -> None:
    """The system takes it for all addresses."""
    assert main(["serve", "--host", ""]) == 2
    assert "host must be a name or an address, got ''" in capsys.readouterr().err
