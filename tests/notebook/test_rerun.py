"""`serve()` as a notebook uses it: run again, replaced, moved, side by side, stopped, forgotten."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import mmap
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import serving_kit
from serving_kit import SettingError, StartError
from tests.support import interrupt_the_main_thread, our_threads, run_script, until

pytestmark = pytest.mark.light


class Model:
    """Answers with its name. An instance, so that a weak reference can tell when it is gone."""

    def __init__(self, name: str = "model") -> None:
        self.__name__ = name

    def __call__(self, values: list[Any]) -> list[Any]:
        return [self.__name__ for _ in values]


class Stuck(Model):
    """Answers when the test lets it."""

    def __init__(self, name: str = "stuck") -> None:
        super().__init__(name)
        self.inside, self.released = threading.Event(), threading.Event()

    def __call__(self, values: list[Any]) -> list[Any]:
        self.inside.set()
        self.released.wait(30)
        return super().__call__(values)


def port_of(server: Any) -> int:
    return int(server.url.rpartition(":")[2])


@contextlib.contextmanager
def connected(server: Any) -> Any:
    """A function that asks over one keep-alive connection, which is never opened a second time."""
    connection = http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=15)
    connection.connect()
    connection.auto_open = 0

    def ask(text: str = "hello") -> tuple[int, str]:
        connection.request("POST", "/", text, {"content-type": "text/plain"})
        response = connection.getresponse()
        return response.status, response.read().decode()

    with contextlib.closing(connection):
        yield ask


def ask(server: Any, text: str = "hello") -> tuple[int, str]:
    with connected(server) as on_it:
        return on_it(text)


def who_answers(server: Any) -> str:
    """The name of the model behind the port now, which may be another than when `server` was made."""
    with contextlib.closing(
        http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=15)
    ) as connection:
        connection.request("GET", "/info")
        return str(json.load(connection.getresponse())["model_id"])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


# -- once ---------------------------------------------------------------------------------------------


def test_serve(serve: Any, capsys: Any) -> None:
    server = serve(lambda values: [value.upper() for value in values])
    line = f"serving <lambda> (function, python) at {server.url}; a script must call server.wait(), or the "
    assert capsys.readouterr() == (f"{line}server ends with it\n", "")
    assert ask(server, "hello") == (200, '"HELLO"')
    assert server("hello") == "HELLO"
    assert server(["a", "b"]) == ["A", "B"]
    assert server.running
    assert server.stats()["state"] == "ready"
    assert server.url in repr(server)


def test_model_error_has_notes(serve: Any, capsys: Any) -> None:
    def broken(values: list[Any]) -> list[Any]:
        raise LookupError("deep inside")

    server = serve(broken)
    with pytest.raises(serving_kit.ModelFailed) as caught:
        server("hello")
    assert "LookupError: deep inside" in caught.value.__notes__
    [incident] = server.errors()
    assert incident.id in caught.value.__notes__[-1]
    assert "deep inside" in incident.traceback
    status, body = ask(server)
    assert status == 500
    assert "deep inside" not in body
    assert capsys.readouterr().err == ""


def test_with_block() -> None:
    with serving_kit.serve(Model(), port=0) as server:
        assert ask(server) == (200, '"model"')
    assert not server.running
    assert refuses(port_of(server))


def test_with_block_that_raises() -> None:
    with pytest.raises(KeyError), serving_kit.serve(Model(), port=0) as server:
        raise KeyError
    assert not server.running


def test_stopped_server(serve: Any) -> None:
    server = serve(Model())
    server.stop()
    server.stop()
    assert not server.running
    assert server.stats()["state"] == "stopped"
    assert "stopped" in repr(server)
    with pytest.raises(RuntimeError, match="stopped"):
        server("hello")
    assert server.settings.max_batch_size == 32  # what it knew can still be read


def test_stop_drains(serve: Any) -> None:
    model = Stuck()
    server = serve(model)
    with ThreadPoolExecutor(3) as pool, connected(server) as late:
        under_way = pool.submit(ask, server)
        assert model.inside.wait(10)
        waiting = pool.submit(ask, server)
        until(lambda: server.stats()["queue_depth"] == 1)
        stopping = pool.submit(server.stop, 20)
        until(lambda: server.stats()["state"] == "draining")
        status, _ = late()
        assert status == 503
        model.released.set()
        assert under_way.result(10) == (200, '"stuck"')
        assert waiting.result(10) == (200, '"stuck"')
        stopping.result(10)


def test_stop_with_stuck_model(serve: Any) -> None:
    model = Stuck()
    server = serve(model)
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, server)]
        assert model.inside.wait(10)
        answers.append(pool.submit(ask, server))
        until(lambda: server.stats()["queue_depth"] == 1)
        began = time.monotonic()
        server.stop(0.2)
        assert time.monotonic() - began < 10
        for answer in answers:
            status, body = answer.result(10)
            assert (status, "unavailable" in body) == (503, True)
        model.released.set()
    assert not server.running


def test_interrupted_stop(serve: Any) -> None:
    """■ on `server.stop()` that waits for a slow answer: the server has stopped all the same."""
    model = Stuck()
    server = serve(model)

    def interrupt() -> None:
        until(lambda: server.stats()["state"] == "draining")
        interrupt_the_main_thread(during="stop")

    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(ask, server)
        assert model.inside.wait(10)
        interrupting = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            server.stop(9)
        interrupting.result(10)
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            assert answer.result(10)[0] == 503
        model.released.set()
    assert refuses(port_of(server))
    assert not server.running
    assert serving_kit.servers() == []
    again = serve(Model("again"), port=port_of(server))
    assert again.url == server.url


# -- again --------------------------------------------------------------------------------------------


def test_rerun_keeps_port_and_connections(serve: Any, capsys: Any) -> None:
    old = serve(Model("old"))
    with connected(old) as on_it:
        assert on_it() == (200, '"old"')
        capsys.readouterr()
        new = serve(Model("new"))
        printed = capsys.readouterr().out
        assert on_it() == (200, '"new"')
    assert new.url == old.url
    assert new.token == old.token  # notes of it stay good
    assert len(printed.splitlines()) == 1
    assert "in place of the one that was up" in printed
    assert "1 requests" in printed


def test_handle_of_replaced_server(serve: Any) -> None:
    old = serve(Model("old"))
    new = serve(Model("new"))
    assert "replaced" in repr(old)
    assert not old.running
    assert old.stats()["reason"].startswith("replaced")
    old.stop()
    with old:
        pass
    assert new.running
    assert new("hello") == "new"
    assert serving_kit.servers() == [new]


def test_request_to_replaced_server(serve: Any) -> None:
    old = serve(Model("old"))
    serve(Model("new"))
    with pytest.raises((RuntimeError, serving_kit.Unavailable)):
        old("hello")


def test_rerun_resets_settings(serve: Any) -> None:
    assert serve(Model(), max_batch_size=4).settings.max_batch_size == 4
    assert serve(Model()).settings.max_batch_size == 32


def test_rerun_under_load(serve: Any) -> None:
    server = serve(Model("0"))
    done = threading.Event()
    seen: list[list[str]] = [[], []]

    def keep_asking() -> None:
        with connected(server) as on_it:
            while not done.is_set():
                status, body = on_it()
                assert status == 200, body
                seen[0].append(body)

    def keep_connecting() -> None:
        while not done.is_set():
            status, body = ask(server)
            assert status == 200, body
            seen[1].append(body)

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(keep_asking), pool.submit(keep_connecting)]

        def both_have_seen(name: str) -> bool:
            failed = any(client.done() for client in clients)
            return failed or all(names and names[-1] == f'"{name}"' for names in seen)

        try:
            for name in map(str, range(1, 11)):
                assert serve(Model(name))("hello") == name
                until(lambda name=name: both_have_seen(name), what="an answer to both")
        finally:
            done.set()
        for client in clients:
            client.result(10)


def test_admitted_requests_keep_their_model(serve: Any) -> None:
    old_model = Stuck("old")
    old = serve(old_model)
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(ask, old)
        assert old_model.inside.wait(10)
        rerun = pool.submit(serve, Model("new"))
        until(lambda: who_answers(old) == "new", what="the new model")
        assert ask(old) == (200, '"new"')
        old_model.released.set()
        assert answer.result(10) == (200, '"old"')
        assert rerun.result(10).running


@pytest.mark.parametrize(
    "broken",
    [
        {"model": 42},
        {"model": Model(), "max_batch_size": 0},
        {"model": Model(), "no_such_knob": 1},
        {"model": Model(), "task": "fill-mask"},
    ],
)
def test_failed_rerun(serve: Any, broken: dict[str, Any], capsys: Any) -> None:
    old = serve(Model("old"))
    capsys.readouterr()
    with connected(old) as on_it:
        with pytest.raises((StartError, SettingError)):
            serve(**broken)
        assert on_it() == (200, '"old"')
    assert old.running
    assert serving_kit.servers() == [old]
    assert capsys.readouterr() == ("", "")


def test_failed_start_of_rerun(serve: Any, monkeypatch: Any) -> None:
    old = serve(Model("old"))

    async def fail(self: Any) -> None:
        raise LookupError("no memory for a second one")

    monkeypatch.setattr("serving_kit.service.Service.start", fail)
    with pytest.raises(LookupError, match="second one"):
        serve(Model("new"))
    assert ask(old) == (200, '"old"')
    assert serving_kit.servers() == [old]


def test_rerun_with_another_port(serve: Any, capsys: Any) -> None:
    old = serve(Model("old"))
    port = free_port()
    capsys.readouterr()
    new = serve(Model("new"), port=port)
    printed = capsys.readouterr().out
    assert port_of(new) == port
    assert new.url in printed
    assert f"the one at {old.url}" in printed
    assert refuses(port_of(old))
    assert "replaced" in repr(old)
    assert ask(new) == (200, '"new"')
    assert serving_kit.servers() == [new]


def test_rerun_with_invalid_port(serve: Any) -> None:
    old = serve(Model("old"))
    with pytest.raises(StartError, match="65535"):
        serve(Model("new"), port=70_000)
    assert ask(old) == (200, '"old"')


def test_serve_after_stop(serve: Any) -> None:
    port = free_port()
    serve(Model("old"), port=port).stop()
    new = serve(Model("new"), port=port)
    assert port_of(new) == port
    assert ask(new) == (200, '"new"')


def test_interrupted_rerun(serve: Any, capsys: Any) -> None:
    """■ on a cell that seems to hang: what happens next must still be under control."""
    model = Stuck("old")
    old = serve(model)
    new_is_up = threading.Event()

    def interrupt() -> None:
        until(lambda: who_answers(old) == "new", what="the new model")
        new_is_up.set()
        interrupt_the_main_thread(during="serve")

    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(ask, old)
        assert model.inside.wait(10)
        interrupting = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            serve(Model("new"))
        interrupting.result(10)
        model.released.set()
        answer.result(10)
    assert new_is_up.is_set()
    [server] = serving_kit.servers()
    assert server.url == old.url
    assert server("hello") == "new"  # who answers in the kernel is who answers over HTTP
    again = serve(Model("newer"))
    assert again.url == old.url
    assert ask(again) == (200, '"newer"')


# -- side by side -------------------------------------------------------------------------------------


def test_two_names(serve: Any) -> None:
    one, two = serve(Model("one"), name="one"), serve(Model("two"), name="two")
    assert one.url != two.url
    assert (one("hello"), two("hello")) == ("one", "two")
    assert serving_kit.servers() == [one, two]
    one.stop()
    assert serving_kit.servers() == [two]
    assert ask(two) == (200, '"two"')


def test_stop_all(serve: Any) -> None:
    started = [serve(Model(), name=name) for name in "abc"]
    serving_kit.stop_all()
    serving_kit.stop_all()
    assert serving_kit.servers() == []
    assert not any(server.running for server in started)
    assert not our_threads()


def test_busy_port(serve: Any, capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = serve(Model(), port=port)
        [line] = capsys.readouterr().out.splitlines()
        assert port < port_of(server) <= port + 100
        assert server.url in line
        assert f"because port {port} is taken" in line
        again = serve(Model(), port=port)  # asks for the same, gets the same: no wandering
        assert again.url == server.url


def test_two_names_with_one_port(serve: Any) -> None:
    port = free_port()
    one, two = serve(Model("one"), name="one", port=port), serve(Model("two"), name="two", port=port)
    assert port_of(one) == port != port_of(two)
    assert serve(Model("two"), name="two", port=port).url == two.url
    assert ask(one) == (200, '"one"')


# -- refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be a whole number from 1"),
        ({"max_batchsize": 8}, "did you mean max_batch_size"),
        ({"timeout_ms": "soon"}, "timeout_ms must be a number"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms must be a number"),
    ],
)
def test_invalid_settings(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        serving_kit.serve("/no/such/folder", port=0, **knobs)  # loading it would be another error
    assert serving_kit.servers() == []


def test_invalid_port() -> None:
    with pytest.raises(StartError, match="0 to 65535"):
        serving_kit.serve("/no/such/folder", port=65_536)


async def _async_model(values: list[Any]) -> list[Any]:
    return values


def _generator(values: list[Any]) -> Any:
    yield from values


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (42, "cannot serve int: pass a Hub id"),
        ({"model": "x"}, "cannot serve dict"),
        (_async_model, "must be a plain function .* not async"),
        (_generator, "must be a plain function"),
    ],
)
def test_unservable_models(model: Any, words: str) -> None:
    port = free_port()
    with pytest.raises(StartError, match=words):
        serving_kit.serve(model, port=port)
    assert refuses(port)
    assert not our_threads()


def test_invalid_tune(serve: Any) -> None:
    server = serve(Model(), max_batch_size=4)
    with pytest.raises(SettingError, match="max_wait_ms"):
        server.tune(max_batch_size=8, max_wait_ms=-1)
    assert server.settings.max_batch_size == 4
    assert server.tune(max_batch_size=8).max_batch_size == 8


# -- nothing left -------------------------------------------------------------------------------------


def is_gone(reference: Callable[[], Any]) -> bool:
    gc.collect()
    return reference() is None


def test_stop_releases_model(serve: Any) -> None:
    model = Model()
    reference = weakref.ref(model)
    server = serve(model)
    assert (server("hello"), ask(server)[0]) == ("model", 200)
    del model
    assert not is_gone(reference)
    server.stop()
    assert is_gone(reference)
    assert "stopped" in repr(server)  # the handle lives on without it


def test_rerun_releases_model(serve: Any) -> None:
    model = Model("old")
    reference = weakref.ref(model)
    old = serve(model)
    assert (old("hello"), ask(old)[0]) == ("old", 200)
    del model
    serve(Model("new"))
    assert is_gone(reference)
    assert "replaced" in repr(old)


def test_failed_model_is_released(serve: Any) -> None:
    class Broken(Model):
        def __call__(self, values: list[Any]) -> list[Any]:
            raise LookupError("deep inside")

    model = Broken()
    reference = weakref.ref(model)
    server = serve(model)
    with contextlib.suppress(serving_kit.ModelFailed):
        server("hello")
    ask(server)
    del model
    server.stop()
    assert is_gone(reference)
    assert len(server.errors()) == 2  # the incidents are kept; as text, so they hold nothing


def test_unstarted_model_is_released(monkeypatch: Any) -> None:
    async def fail(self: Any) -> None:
        raise LookupError("no")

    monkeypatch.setattr("serving_kit.service.Service.start", fail)
    model = Model()
    reference = weakref.ref(model)
    with pytest.raises(LookupError) as caught:
        serving_kit.serve(model, port=0)
    del model, caught
    assert is_gone(reference)


class Heavy(Model):
    """With weights that are noticed if they stay."""

    def __init__(self, name: str = "heavy", megabytes: int = 4) -> None:
        super().__init__(name)
        # Pages of its own: the heap may have as much to spare from earlier tests.
        self.weights = mmap.mmap(-1, megabytes * 2**20)
        self.weights.write(os.urandom(2**20) * megabytes)


def held() -> tuple[int, int]:
    """Open files and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def resident_mb() -> float:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


on_linux = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc here")


@on_linux
def test_fifty_starts_leak_nothing() -> None:
    def once() -> None:
        with serving_kit.serve(Heavy(), port=0) as server:
            assert ask(server)[0] == 200

    once()
    before, memory = held(), resident_mb()
    for _ in range(50):
        once()
    assert held() == before
    assert resident_mb() < memory + 20


@on_linux
def test_fifty_reruns_leak_nothing(serve: Any) -> None:
    serve(Heavy())
    before, memory = held(), resident_mb()
    for number in range(50):
        assert ask(serve(Heavy(str(number)))) == (200, f'"{number}"')
    until(lambda: held() == before, what="the end of every connection")
    assert resident_mb() < memory + 20


@on_linux
def test_stop_frees_memory(serve: Any) -> None:
    before = resident_mb()
    server = serve(Heavy(megabytes=64))
    assert ask(server)[0] == 200
    assert resident_mb() > before + 60
    server.stop()
    assert resident_mb() < before + 20


# -- scripts ------------------------------------------------------------------------------------------


def test_script_exits() -> None:
    began = time.monotonic()
    done = run_script("import serving_kit\nserving_kit.serve(list, port=0)")
    assert time.monotonic() - began < 20
    assert len(done.stdout.splitlines()) == 1


def test_script_with_stuck_model_exits() -> None:
    began = time.monotonic()
    run_script(
        """
        import http.client, threading
        import serving_kit

        inside = threading.Event()

        def stuck(values):
            inside.set()
            threading.Event().wait()

        server = serving_kit.serve(stuck, port=0)
        client = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        client.request("POST", "/", "hello")
        assert inside.wait(10)
        client.close()
        """
    )
    assert time.monotonic() - began < 20


def test_wait_until_interrupt() -> None:
    done = run_script(
        """
        import os, signal, sys, threading, time
        import serving_kit

        server = serving_kit.serve(list, port=0)
        main = threading.get_ident()

        def interrupt():
            for _ in range(2000):
                time.sleep(0.005)
                if sys._current_frames()[main].f_code.co_name == "wait":
                    os.kill(os.getpid(), signal.SIGINT)
                    return

        threading.Thread(target=interrupt).start()
        server.wait()
        print(server.running)
        """
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_wait_until_stop(serve: Any) -> None:
    server = serve(Model())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(server.wait)
        server.stop()
        waiting.result(10)
