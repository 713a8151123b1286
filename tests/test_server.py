"""`serve()` and `Server`: stop, replacement, ports, forks, scripts, arguments."""

from __future__ import annotations

import asyncio
import functools
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import serving_kit
from serving_kit import ServingError, StartError, Unavailable
from serving_kit.inline_server import InlineServer
from tests.support import REPOSITORY, run_script, until
from tests.support_http import free_port

pytestmark = pytest.mark.light


class Model:
    """Answers with its name. An instance, so that a weak reference tells when it has been freed."""

    def __init__(self, name: str = "model") -> None:
        self.__name__ = name

    def __call__(self, values: list[Any]) -> list[Any]:
        return [self.__name__ for _ in values]


def port_of(server: Any) -> int:
    return int(server.url.rpartition(":")[2])


# -- a stopped or replaced server ----------------------------------------------------------------

ASKS: list[Callable[[Any], Any]] = [
    lambda server: server("hello"),
    lambda server: asyncio.run(server.predict("hello")),
    lambda server: server.tune(max_batch_size=4),
]


@pytest.mark.parametrize("ask", ASKS, ids=["call", "predict", "tune"])
def test_use_after_stop(serve: Any, ask: Callable[[Any], Any]) -> None:
    server = serve(Model())
    server.stop()
    with pytest.raises(Unavailable, match="the server has stopped") as raised:
        ask(server)
    assert isinstance(raised.value, ServingError)
    assert isinstance(raised.value, RuntimeError)
    assert server.settings.max_batch_size == 32


@pytest.mark.parametrize("ask", ASKS, ids=["call", "predict", "tune"])
def test_use_after_replacement(serve: Any, ask: Callable[[Any], Any]) -> None:
    old, new = serve(Model("old")), serve(Model("new"))
    with pytest.raises(Unavailable, match="replaced by a newer run"):
        ask(old)
    assert new.settings.max_batch_size == 32
    assert new("hello") == "new"


def test_stop_ends_waiting_call(serve: Any) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(texts: list[str]) -> list[str]:
        inside.set()
        go_on.wait(30)
        return texts

    server = serve(slow)
    raised: list[BaseException] = []

    def ask() -> None:
        try:
            server("hello")
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert inside.wait(10)
    server.stop(0)
    thread.join(10)
    go_on.set()
    [error] = raised
    assert isinstance(error, Unavailable)


def test_stop_none_uses_drain_s(serve: Any) -> None:
    server = serve(Model())
    server.stop(None)
    assert not server.running


@pytest.mark.parametrize("host", [None, "", 8000])
def test_bad_host(host: Any) -> None:
    with pytest.raises(StartError, match=r'host must be a name or an address.*"0\.0\.0\.0"'):
        serving_kit.serve(Model(), port=0, host=host)


def test_as_code(serve: Any) -> None:
    server = serve(
        Model(),
        port=0,
        allowed_hosts=["models.example.org"],
        allowed_origins=["https://example.org"],
        drain_s=7,
        max_batch_size=4,
    )
    assert server.as_code() == (
        "serving_kit.serve(model, port=0, allowed_hosts=['models.example.org'], "
        "allowed_origins=['https://example.org'], drain_s=7.0, max_batch_size=4)"
    )


# -- a re-run -------------------------------------------------------------------------------------


def test_rerun_with_other_host_keeps_port(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    old = serve(Model("old"))
    port = port_of(old)
    capsys.readouterr()
    new = serve(Model("new"), port=port, host="0.0.0.0")
    printed = capsys.readouterr().out
    assert port_of(new) == port
    assert "taken" not in printed
    assert new.token == old.token
    answer = httpx.post(new.url, content="x", headers={"authorization": f"Bearer {new.token}"})
    assert answer.json() == "new"
    assert httpx.post(new.url, content="x").status_code == 401, "the access rule of the new host holds"
    back = serve(Model("back"), port=port)
    assert port_of(back) == port
    assert httpx.post(back.url, content="x").json() == "back"
    assert serving_kit.servers() == [back]


def test_rerun_with_unusable_host(serve: Any) -> None:
    """The old server stays."""
    old = serve(Model("old"))
    port = port_of(old)
    with pytest.raises(StartError, match="cannot listen"):
        serve(Model("new"), port=port, host="192.0.2.1")
    assert httpx.post(old.url, content="x").json() == "old"
    assert serving_kit.servers() == [old]


def test_port_of_other_server(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first = serve(Model(), name="first")
    capsys.readouterr()
    serve(Model(), name="second", port=port_of(first))
    assert f"because port {port_of(first)} is taken by the server 'first'" in capsys.readouterr().out


class Watching(Model):
    """Notes, when it is about to be loaded, whether another model is still in memory."""

    def __init__(self, other: weakref.ref[Any]) -> None:
        super().__init__("new")
        self._other = other
        self.saw: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        if name == "preprocess":  # is it a pipeline?
            self.saw.append(self._other() is not None)
        raise AttributeError(name)


@pytest.mark.parametrize("stop_first", [False, True])
def test_stop_first_frees_old_model(serve: Any, stop_first: bool) -> None:
    model = Model("old")
    old = serve(model)
    port = port_of(old)
    new_model = Watching(weakref.ref(model))
    del model
    new = serve(new_model, stop_first=stop_first)
    assert new_model.saw == [not stop_first]
    assert port_of(new) == port
    assert new.token == old.token
    assert new("hello") == "new"
    assert serving_kit.servers() == [new]


def test_stop_first_with_unloadable_model(serve: Any) -> None:
    old = serve(Model("old"))
    with pytest.raises(StartError):
        serve(42, stop_first=True)
    assert not old.running
    assert serving_kit.servers() == []


class SlowToLoad(Model):
    """Blocks while it is loaded, until `go_on`."""

    def __init__(self) -> None:
        super().__init__("slow")
        self.loading, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        if name == "preprocess":
            self.loading.set()
            self.go_on.wait(60)
        raise AttributeError(name)


def test_stop_during_other_load(serve: Any) -> None:
    server = serve(Model(), name="running")
    model = SlowToLoad()
    loads = threading.Thread(target=lambda: serve(model, name="loading"))
    loads.start()
    assert model.loading.wait(10)
    stops = threading.Thread(target=server.stop)
    stops.start()
    stops.join(20)
    stopped = not stops.is_alive()
    model.go_on.set()
    loads.join(20)
    stops.join(20)
    assert stopped


# -- a forked child -------------------------------------------------------------------------------

FORK = """
import http.client, os, sys, warnings
import serving_kit

warnings.simplefilter("ignore", DeprecationWarning)  # of forks in a process with threads, since 3.12
server = serving_kit.serve(lambda texts: texts, port=0)
client = http.client.HTTPConnection("127.0.0.1", int(server.url.rpartition(":")[2]), timeout=20)
client.request("POST", "/", b"x")
assert client.getresponse().read() == b'"x"'
ended, end = os.pipe()
child = os.fork()
if child == 0:
    os.close(end)
    os.read(ended, 1)
    os._exit(0)
server.stop()
print("closed" if client.sock.recv(1) == b"" else "open")
os.close(end)
os.waitpid(child, 0)
client.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
def test_forked_child_holds_no_connection() -> None:
    assert run_script(FORK, timeout=60).stdout.splitlines()[-1] == "closed"


# -- a script -------------------------------------------------------------------------------------

WAITING = """
import signal, sys, time
from pathlib import Path
import serving_kit

def slow(texts):
    print("inside", flush=True)
    sys.stdin.readline()
    return texts

server = serving_kit.serve(slow, port=0, drain_s=60)
print(server.url, flush=True)
server.wait()
print("after", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


@pytest.fixture
def script() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_wait_drains_on_signal(script: subprocess.Popen[str], number: signal.Signals) -> None:
    assert script.stdin is not None
    assert script.stdout is not None
    assert "a script must call server.wait()" in script.stdout.readline()
    url = script.stdout.readline().strip()
    client = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=60)
    client.request("POST", "/", b"x")
    assert script.stdout.readline() == "inside\n"
    with httpx.Client(base_url=url) as other:
        script.send_signal(number)
        until(lambda: other.get("/health").status_code == 503, timeout=30)
    script.stdin.write("\n")
    script.stdin.flush()
    assert json.loads(client.getresponse().read()) == "x"
    client.close()
    rest, _ = script.communicate(timeout=60)
    assert rest == "after True\n"
    assert script.returncode == 0


def test_no_wait_hint_in_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-i", "-c", "import serving_kit"],
        input="serving_kit.serve(lambda texts: texts, port=0).stop()\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert "serving <lambda> (function, python) at" in done.stdout
    assert "wait()" not in done.stdout


# -- arguments that are refused at the start ---------------------------------------------------


def two_arguments(texts: list[str], mark: str) -> list[str]:
    return [text + mark for text in texts]


@pytest.mark.parametrize(
    ("function", "names"),
    [(two_arguments, "two_arguments"), (lambda: [1], "<lambda>"), (lambda *, texts: texts, "<lambda>")],
)
def test_function_signature_refused(function: Any, names: str) -> None:
    with pytest.raises(serving_kit.StartError, match=f"{names} cannot be called with one list"):
        serving_kit.serve(function, port=0)


@pytest.mark.parametrize("function", [str.split, sorted, list, functools.partial(two_arguments, mark="!")])
def test_function_signature_accepted(serve: Any, function: Any) -> None:
    assert serve(function).running


@pytest.mark.parametrize(
    ("typo", "meant"), [("devce", "device"), ("prot", "port"), ("max_batch_siz", "max_")]
)
def test_misspelt_argument(typo: str, meant: str) -> None:
    with pytest.raises(serving_kit.SettingError, match=f"did you mean {meant}"):
        serving_kit.serve(two_arguments, **{typo: 1})


def test_required_token_message(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(sorted, require_token=True)
    assert "every request needs server.token" in capsys.readouterr().out
    refused = httpx.post(server.url, content="x")
    assert refused.status_code == 401
    assert (
        "server.token in a notebook, what the command printed, or SERVING_KIT_TOKEN"
        in refused.json()["error"]
    )


# -- a re-run on another port ------------------------------------------------------------------------------


class Gate:
    """Answers once `open` is set."""

    def __init__(self) -> None:
        self.inside, self.open = threading.Event(), threading.Event()

    def __call__(self, texts: list[str]) -> list[str]:
        self.inside.set()
        assert self.open.wait(60)
        return texts


def test_rerun_on_other_port_drains_old(serve: Any) -> None:
    """Admitted requests are answered; new ones are rejected, or the drain would not end."""
    gate = Gate()
    old = serve(gate, drain_s=30, max_batch_size=1)
    with ThreadPoolExecutor(3) as pool:
        admitted = pool.submit(httpx.post, old.url, content="x", timeout=60)
        assert gate.inside.wait(10)
        again = pool.submit(serve, Model("new"), port=free_port())
        until(lambda: httpx.get(f"{old.url}/health").json()["status"] == "draining")
        late = httpx.post(old.url, content="y", timeout=60)
        gate.open.set()
        new = again.result(30)
        assert admitted.result(30).status_code == 200
    assert (late.status_code, late.json()["error_type"]) == (503, "unavailable")
    assert new("x") == "new"


def test_interrupt_during_drain_of_old(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new server stays."""
    old = serve(Model("old"))
    stop, port = InlineServer.stop, free_port()

    def interrupted(inline: InlineServer, drain_s: float = 5.0) -> bool:
        stop(inline, 0)
        if inline.port != port:
            raise KeyboardInterrupt
        return True

    with monkeypatch.context() as patch:
        patch.setattr(InlineServer, "stop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            serving_kit.serve(Model("new"), port=port)
    [new] = serving_kit.servers()
    try:
        assert httpx.post(f"http://127.0.0.1:{port}/", content="x").json() == "new"
        assert "replaced" in repr(old)
    finally:
        new.stop()


def test_drain_s_covers_kernel_calls(serve: Any) -> None:
    gate = Gate()
    server = serve(gate, drain_s=30)
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(server, "x")
        assert gate.inside.wait(10)
        stopped = pool.submit(server.stop)
        assert not stopped.done()
        threading.Event().wait(6)  # longer than the default of 5 s
        gate.open.set()
        assert call.result(30) == "x"
        stopped.result(30)
