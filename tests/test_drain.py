"""What a stop does to work under way: the command, plain uvicorn, a notebook's server, a script."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import REPOSITORY, until

# The command on a function: its model is what `load_model` would have made of an id. One forward of it
# ends when the file "go" appears.
COMMAND = """
import sys, time
from pathlib import Path
import serving_kit.cli
from serving_kit.models import loading

go = Path(sys.argv.pop(1))

def slow(texts):
    while texts != [""] and not go.exists():
        time.sleep(0.01)
    return [text.upper() for text in texts]

load_model = loading.load_model
loading.load_model = lambda model, **_: load_model(slow)
sys.exit(serving_kit.cli.main())
"""
# The command on the demo model, each of whose forwards takes 50 ms longer.
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


class Process:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], port: int, go: Path) -> None:
        self.process, self.port, self.go = process, port, go
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=30, limits=httpx.Limits(max_connections=1))

    def health(self) -> int | None:
        try:
            return self.client.get("/health").status_code
        except httpx.TransportError:
            return None

    def stats(self) -> Any:
        return self.client.get("/stats").json()

    def in_flight(self) -> int:
        return int(self.stats()["in_flight"])

    def ended(self) -> tuple[int, str]:
        """Its exit status and what it printed, once it has ended by itself."""
        printed, _ = self.process.communicate(timeout=60)
        return self.process.returncode, printed


@contextlib.contextmanager
def running(command: list[str], port: int, go: Path, **more: Any) -> Iterator[Process]:
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{go.parent}"}
    with subprocess.Popen(
        [sys.executable, *command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=go.parent,
        env=environment,
        **more,
    ) as process:
        server = Process(process, port, go)
        try:
            until(lambda: server.health() == 200, timeout=60)
            yield server
        finally:
            server.client.close()
            process.kill()


@contextlib.contextmanager
def command(tmp_path: Path, *options: str, **more: Any) -> Iterator[Process]:
    port, go = free_port(), tmp_path / "go"
    arguments = ["-c", COMMAND, str(go), "serve", "--port", str(port), "--max-batch-size", "1", *options]
    with running(arguments, port, go, **more) as server:
        yield server


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


def everything(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    chunks = []
    while chunk := connection.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)


@pytest.mark.light
def test_the_command_finishes_what_it_has_admitted(tmp_path: Path) -> None:
    with command(tmp_path) as server, ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(ask, server.url) for _ in range(20)]
        until(lambda: server.in_flight() == 20)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.health() != 200)
        server.go.touch()
        assert [each.result(60).json() for each in answers] == ["X"] * 20
        assert server.ended()[0] == 0


@pytest.mark.light
def test_what_the_command_cannot_finish_in_time_ends_as_a_503_in_the_usual_shape(tmp_path: Path) -> None:
    with command(tmp_path, "--drain-s", "1.5") as server, ThreadPoolExecutor(150) as pool:
        answers = [pool.submit(ask, server.url) for _ in range(150)]
        until(lambda: server.in_flight() == 150, timeout=60)
        with upload(server.port) as connection:
            until(lambda: server.health() == 200)  # a later connection was accepted
            server.process.send_signal(signal.SIGTERM)
            ends = [each.result(60) for each in answers]
            received = everything(connection)
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


def test_of_150_requests_to_a_slow_model_each_ends_as_an_answer_or_a_503(tmp_path: Path) -> None:
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
def test_the_lame_duck_time_says_503_on_health_while_requests_are_answered(tmp_path: Path) -> None:
    with command(tmp_path, "--lame-duck-s", "600") as server:
        server.go.touch()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.health() == 503)
        assert httpx.get(f"{server.url}/live").status_code == 200
        assert ask(server.url).json() == "X"
        server.process.send_signal(signal.SIGTERM)  # ends the waiting
        assert server.ended()[0] == 0


@pytest.mark.light
def test_after_the_lame_duck_time_the_port_closes(tmp_path: Path) -> None:
    with command(tmp_path, "--lame-duck-s", "0.5") as server:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.health() == 503)
        until(lambda: server.health() is None, timeout=30)
        assert server.ended()[0] == 0


@pytest.mark.light
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_waiting_but_answers(tmp_path: Path, second: signal.Signals) -> None:
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
def test_a_terminal_that_closes_lets_the_command_drain(tmp_path: Path) -> None:
    with command(tmp_path) as server, ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(ask, server.url) for _ in range(5)]
        until(lambda: server.in_flight() == 5)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.health() != 200)
        server.go.touch()
        assert [each.result(60).json() for each in answers] == ["X"] * 5
        assert server.ended()[0] == 0


@pytest.mark.light
def test_under_nohup_the_command_goes_on_when_the_terminal_closes(tmp_path: Path) -> None:
    with command(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as server:
        server.go.touch()
        server.process.send_signal(signal.SIGHUP)
        assert ask(server.url).json() == "X"
        server.process.send_signal(signal.SIGTERM)
        assert server.ended()[0] == 0


@pytest.mark.light
def test_under_plain_uvicorn_what_is_cut_off_ends_as_a_503_too(tmp_path: Path) -> None:
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
            received = everything(connection)
        go.touch()
        _, printed = server.ended()
    assert Counter(map(is_a_refusal, ends)) == {True: 20}
    assert received.startswith(b"HTTP/1.1 503")
    assert "Traceback" not in printed


@pytest.mark.light
def test_stopping_a_notebooks_server_answers_what_it_cannot_finish(serve: Any) -> None:
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
            received = everything(connection)
        go_on.set()
        assert all(is_a_refusal(each.result(60)) for each in answers)
    assert received.startswith(b"HTTP/1.1 503")


@pytest.mark.light
def test_a_notebooks_server_has_a_lame_duck_time_too(serve: Any) -> None:
    server = serve(lambda texts: texts, lame_duck_s=5)
    stops = threading.Thread(target=server.stop)
    stops.start()
    until(lambda: ask_health(server.url) == 503)
    assert ask(server.url).json() == "x"
    stops.join(30)
    assert not server.running


def ask_health(url: str) -> int:
    return httpx.get(f"{url}/health").status_code


# -- children of the model -----------------------------------------------------------------------------

# The command on a function whose first call forks a child that sleeps.
FORKING = """
import multiprocessing, sys, time
import serving_kit.cli
from serving_kit.models import loading

def work(texts):
    if not multiprocessing.active_children():
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True).start()
    return texts

load_model = loading.load_model
loading.load_model = lambda model, **_: load_model(work)
sys.exit(serving_kit.cli.main())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_command_ends_though_its_model_has_forked_a_child(tmp_path: Path) -> None:
    """The child has the signal handlers of its parent, which waits for it at its exit."""
    port, go = free_port(), tmp_path / "go"
    with running(["-W", "ignore", "-c", FORKING, "serve", "--port", str(port)], port, go) as server:
        assert server.client.post("/", content="x").status_code == 200
        server.process.send_signal(signal.SIGTERM)
        status, printed = server.ended()
    assert (status, "Traceback" in printed) == (0, False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_a_forked_child_does_not_keep_the_commands_port_busy(tmp_path: Path) -> None:
    port, go = free_port(), tmp_path / "go"
    orphan = FORKING.replace("daemon=True).start()", "daemon=False).start()").replace(
        "sys.exit(serving_kit.cli.main())",
        "serving_kit.cli.main(); import os; sys.stdout.flush(); os._exit(0)",
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


def test_a_refused_upload_in_the_lame_duck_time_reads_its_answer(tmp_path: Path) -> None:
    with command(tmp_path, "--lame-duck-s", "30", "--require-token") as server:
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.health() == 503, timeout=20)
        client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        client.request("POST", "/", body=b"x" * 40_000_000)
        assert client.getresponse().status == 401
        client.close()
