"""`Server`: calls, stop, replacement, what is left in forked children."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serving_kit import ServingError, Unavailable
from tests.support import BlockingFunction, NamedModel, run_script

pytestmark = pytest.mark.light


ASKS: list[Callable[[Any], Any]] = [
    lambda server: server("hello"),
    lambda server: asyncio.run(server.predict("hello")),
    lambda server: server.tune(max_batch_size=4),
]


@pytest.mark.parametrize("ask", ASKS, ids=["call", "predict", "tune"])
def test_use_after_stop(serve: Any, ask: Callable[[Any], Any]) -> None:
    server = serve(NamedModel())
    server.stop()
    with pytest.raises(Unavailable, match="the server has stopped") as raised:
        ask(server)
    assert isinstance(raised.value, ServingError)
    assert isinstance(raised.value, RuntimeError)
    assert server.settings.max_batch_size == 32


@pytest.mark.parametrize("ask", ASKS, ids=["call", "predict", "tune"])
def test_use_after_replacement(serve: Any, ask: Callable[[Any], Any]) -> None:
    old, new = serve(NamedModel("old")), serve(NamedModel("new"))
    with pytest.raises(Unavailable, match="replaced by a newer run"):
        ask(old)
    assert new.settings.max_batch_size == 32
    assert new("hello") == "new"


def test_stop_ends_waiting_call(serve: Any) -> None:
    blocking = BlockingFunction()
    server = serve(blocking)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(server, "hello")
        assert blocking.inside.wait(10)
        server.stop(0)
        assert isinstance(call.exception(10), Unavailable)
        blocking.open.set()


def test_stop_none_uses_drain_s(serve: Any) -> None:
    server = serve(NamedModel())
    server.stop(None)
    assert not server.running


def test_drain_s_covers_kernel_calls(serve: Any) -> None:
    blocking = BlockingFunction()
    server = serve(blocking, drain_s=30)
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(server, "x")
        assert blocking.inside.wait(10)
        stopped = pool.submit(server.stop)
        assert not stopped.done()
        threading.Event().wait(6)  # longer than the default of 5 s
        blocking.open.set()
        assert call.result(30) == "x"
        stopped.result(30)


class SlowToLoad(NamedModel):
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
    """Stopping a server does not wait for another one to load."""
    server = serve(NamedModel(), name="running")
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


def test_as_code(serve: Any) -> None:
    server = serve(
        NamedModel(),
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
