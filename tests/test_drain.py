"""Draining: the command, plain uvicorn, a notebook's server, a script, forked children."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import until
from tests.support_http import free_port, read_to_end
from tests.support_process import command, running

# The command on the demo model; each call of it takes 50 ms longer.
COMMAND_WITH_MODEL = """
import functools, sys, time
from transformers import BertModel
import serving_kit.cli

forward = BertModel.forward

@functools.wraps(forward)
def slow(*arguments, **named):
    time.sleep(0.05)
    return forward(*arguments, **named)

BertModel.forward = slow
sys.exit(serving_kit.cli.main())
"""
APP = """
import time
from pathlib import Path
import serving_kit

def slow(texts):
    while not Path("go").exists():
        time.sleep(0.01)
    return [text.upper() for text in texts]

app = serving_kit.create_app(slow, max_batch_size=1, drain_s=1)
"""


def ask(url: str, text: str = "x") -> httpx.Response:
    return httpx.post(url, content=text, timeout=60)


def is_a_refusal(response: httpx.Response) -> bool:
    return (
        response.status_code == 503
        and response.headers["content-type"] == "application/problem+json"
        and int(response.headers["retry-after"]) > 0
        and response.headers["connection"] == "close"
        and response.json()["error_type"] == "unavailable"
    )


def upload(port: int) -> socket.socket:
    """A connection with half a request."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(b"POST / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 6\r\n\r\nhal")
    return connection


@pytest.mark.light
def test_command_finishes_admitted_requests(tmp_path: Path) -> None:
    with command(tmp_path) as server, ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(ask, server.url) for _ in range(20)]
        until(lambda: server.in_flight() == 20)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.health() != 200)
        server.go.touch()
        assert [each.result(60).json() for each in answers] == ["X"] * 20
        assert server.ended()[0] == 0


@pytest.mark.light
def test_command_answers_rest_with_503(tmp_path: Path) -> None:
    """Also an upload that has not arrived completely."""
    options = ("--drain-s", "1.5", "--timeout-ms", "600000")
    with command(tmp_path, *options) as server, ThreadPoolExecutor(150) as pool:
        answers = [pool.submit(ask, server.url) for _ in range(150)]
        until(lambda: server.in_flight() == 150, timeout=60)
        with upload(server.port) as connection:
            until(lambda: server.health() == 200)  # a later connection was accepted
            server.process.send_signal(signal.SIGTERM)
            ends = [each.result(60) for each in answers]
            received = read_to_end(connection)
        status, printed = server.ended()
    assert Counter(map(is_a_refusal, ends)) == {True: 150}
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503")
    assert b"retry-after:" in head
    assert json.loads(body)["status"] == 503
    assert status == 0
    assert "Traceback" not in printed


def all_admitted(stats: dict[str, Any]) -> bool:
    answered: int = stats["requests"]["ok"]
    return answered > 0 and answered + int(stats["in_flight"]) == 150


def test_command_drains_slow_pipeline(tmp_path: Path) -> None:
    """Each of 150 requests ends as an answer or a 503."""
    pytest.importorskip("torch")
    port = free_port()
    options = ["--port", str(port), "--max-batch-size", "1", "--timeout-ms", "600000", "--drain-s", "2"]
    arguments = ["-c", COMMAND_WITH_MODEL, "serve", *options]
    with running(arguments, port, tmp_path / "unused") as server, ThreadPoolExecutor(150) as pool:
        answers = [pool.submit(ask, server.url, "paris is [MASK].") for _ in range(150)]
        until(lambda: all_admitted(server.stats()), timeout=60)
        server.process.send_signal(signal.SIGTERM)
        ends = [each.result(120) for each in answers]
        status, printed = server.ended()
    answered = [each for each in ends if each.status_code == 200]
    refused = [each for each in ends if each.status_code != 200]
    assert all(each.json()[0]["token_str"] for each in answered)
    assert all(map(is_a_refusal, refused))
    assert answered
    assert refused
    assert status == 0
    assert "Traceback" not in printed


@pytest.mark.light
def test_lame_duck_answers_requests(tmp_path: Path) -> None:
    """`/health` says 503 meanwhile."""
    with command(tmp_path, "--lame-duck-s", "600") as server:
        server.go.touch()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.health() == 503)
        assert httpx.get(f"{server.url}/live").status_code == 200
        assert ask(server.url).json() == "X"
        server.process.send_signal(signal.SIGTERM)  # ends the lame duck time
        assert server.ended()[0] == 0


@pytest.mark.light
def test_port_closes_after_lame_duck(tmp_path: Path) -> None:
    with command(tmp_path, "--lame-duck-s", "0.5") as server:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.health() == 503)
        until(lambda: server.health() is None, timeout=30)
        assert server.ended()[0] == 0


@pytest.mark.light
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_drain(tmp_path: Path, second: signal.Signals) -> None:
    with command(tmp_path, "--drain-s", "600") as server, ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(ask, server.url) for _ in range(5)]
        until(lambda: server.in_flight() == 5)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.health() != 200)
        server.process.send_signal(second)
        assert all(is_a_refusal(each.result(60)) for each in answers)
        status, printed = server.ended()
    assert status == 0
    assert "Traceback" not in printed


@pytest.mark.light
def test_sighup_drains(tmp_path: Path) -> None:
    with command(tmp_path) as server, ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(ask, server.url) for _ in range(5)]
        until(lambda: server.in_flight() == 5)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.health() != 200)
        server.go.touch()
        assert [each.result(60).json() for each in answers] == ["X"] * 5
        assert server.ended()[0] == 0


@pytest.mark.light
def test_sighup_ignored_under_nohup(tmp_path: Path) -> None:
    with command(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as server:
        server.go.touch()
        server.process.send_signal(signal.SIGHUP)
        assert ask(server.url).json() == "X"
        server.process.send_signal(signal.SIGTERM)
        assert server.ended()[0] == 0


@pytest.mark.light
def test_uvicorn_answers_rest_with_503(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(APP)
    port, go = free_port(), tmp_path / "go"
    options = ["--port", str(port), "--timeout-graceful-shutdown", "1"]
    with (
        running(["-m", "uvicorn", "server:app", *options], port, go) as server,
        ThreadPoolExecutor(20) as pool,
    ):
        answers = [pool.submit(ask, server.url) for _ in range(20)]
        until(lambda: server.in_flight() == 20)
        with upload(port) as connection:
            until(lambda: server.health() == 200)
            server.process.send_signal(signal.SIGTERM)
            ends = [each.result(60) for each in answers]
            received = read_to_end(connection)
        go.touch()
        _, printed = server.ended()
    assert Counter(map(is_a_refusal, ends)) == {True: 20}
    assert received.startswith(b"HTTP/1.1 503")
    assert "Traceback" not in printed


@pytest.mark.light
def test_notebook_answers_rest_with_503(serve: Any) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(texts: list[str]) -> list[str]:
        if texts != [""]:
            inside.set()
            go_on.wait(60)
        return texts

    server = serve(slow, max_batch_size=1, drain_s=0.2)
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, server.url) for _ in range(3)]
        until(lambda: server.stats()["in_flight"] == 3)
        with upload(int(server.url.rpartition(":")[2])) as connection:
            until(lambda: ask_health(server.url) == 200)
            server.stop()
            received = read_to_end(connection)
        go_on.set()
        assert all(is_a_refusal(each.result(60)) for each in answers)
    assert received.startswith(b"HTTP/1.1 503")


@pytest.mark.light
def test_notebook_lame_duck(serve: Any) -> None:
    server = serve(lambda texts: texts, lame_duck_s=5)
    stops = threading.Thread(target=server.stop)
    stops.start()
    until(lambda: ask_health(server.url) == 503)
    assert ask(server.url).json() == "x"
    stops.join(30)
    assert not server.running


def ask_health(url: str) -> int:
    return httpx.get(f"{url}/health").status_code


# -- forked children -----------------------------------------------------------------------------

# The command on a function whose first call forks a child that sleeps.
FORKING = """
import multiprocessing, sys, time
from serving_kit.models import loading

def work(texts):
    if not multiprocessing.active_children():
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True).start()
    return texts

load_model = loading.load_model
loading.load_model = lambda model, **_: load_model(work)  # before the command imports it
from serving_kit import cli
sys.exit(cli.main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_command_ends_with_forked_child(tmp_path: Path) -> None:
    """The child has the signal handlers of its parent, which waits for it when it exits."""
    port, go = free_port(), tmp_path / "go"
    with running(["-W", "ignore", "-c", FORKING, "serve", "--port", str(port)], port, go) as server:
        assert server.client.post("/", content="x").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        status, printed = server.ended()
    assert (status, "Traceback" in printed) == (0, False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_forked_child_does_not_hold_port(tmp_path: Path) -> None:
    port, go = free_port(), tmp_path / "go"
    orphan = FORKING.replace("daemon=True).start()", "daemon=False).start()").replace(
        "sys.exit(cli.main())",
        "cli.main(); import os; sys.stdout.flush(); os._exit(0)",
    )
    with running(["-W", "ignore", "-c", orphan, "serve", "--port", str(port)], port, go) as server:
        assert server.client.post("/", content="x").status_code == 200
        [child] = children(server.process.pid)
        try:
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(60)
            socket.create_server(("127.0.0.1", port)).close()
        finally:
            os.kill(child, signal.SIGKILL)


def children(process: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True)
    return [int(line) for line in listed.stdout.split()]


def test_refused_upload_during_lame_duck(tmp_path: Path) -> None:
    with command(tmp_path, "--lame-duck-s", "30", "--require-token") as server:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.health() == 503, timeout=20)
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        client.request("POST", "/", body=b"x" * 40_000_000)
        assert client.getresponse().status == 401
        client.close()
