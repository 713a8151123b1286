"""Serving in a real Jupyter kernel: requests from outside, interrupts, restarts. No browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support import until
from tests.support_kernel import OUR_THREADS, SERVE, Cell, Kernel

pytest.importorskip("ipykernel")
jupyter_client = pytest.importorskip("jupyter_client")
httpx = pytest.importorskip("httpx")

pytestmark = pytest.mark.kernel


def ask(url: str, value: Any = 21, timeout: float = 20) -> Any:
    answer = httpx.post(url, json={"inputs": value}, timeout=timeout, trust_env=False)
    answer.raise_for_status()
    return answer.json()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


def is_free(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_server(("127.0.0.1", port)).close()
        return True
    return False


class Clients:
    """Two that keep asking from outside: one on one connection, one on a new one for each question."""

    def __init__(self, url: str) -> None:
        self.address = url.removeprefix("http://")
        self.answers = [0, 0]
        self._done = threading.Event()
        self._pool = ThreadPoolExecutor(2)

    def __enter__(self) -> Clients:
        self._work = [self._pool.submit(self._ask, fresh) for fresh in (0, 1)]
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._pool.shutdown()
        for work in self._work:
            work.result()
        assert all(self.answers)

    def more(self) -> None:
        """Return when both have been answered twice more."""
        goal = [count + 2 for count in self.answers]
        until(
            lambda: (
                any(work.done() for work in self._work)
                or all(count >= least for count, least in zip(self.answers, goal, strict=True))
            ),
            20,
            "more answers",
        )

    def _ask(self, fresh: int) -> None:
        connection = self._connect()
        while not self._done.is_set():
            if fresh:
                connection.close()
                connection = self._connect()
            connection.request("POST", "/", '{"inputs": 21}', {"content-type": "application/json"})
            response = connection.getresponse()
            body = response.read()
            assert (response.status, json.loads(body)) == (200, 42), body
            self.answers[fresh] += 1
            self._done.wait(0.005)  # clients, not a denial of service: two cores are all there is
        connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self.address, timeout=20)
        connection.connect()
        connection.auto_open = 0  # never a second connection that the test does not notice
        return connection


# -- serving and asking -------------------------------------------------------------------------------


def test_requests_from_outside(kernel: Kernel) -> None:
    url = kernel.serve()
    assert ask(url, [1, 2]) == [2, 4]
    assert kernel.value("server(21)") == 42
    assert kernel.value("server.stats()['state']") == "ready"


def test_curl(kernel: Kernel) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    url = kernel.serve(SERVE.replace("2 * value", "value.upper()"))
    curl = ["curl", "--silent", "--noproxy", "*", "--max-time", "20", "-X", "POST", "-d", "test [MASK]", url]
    done = subprocess.run(curl, capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(done.stdout) == "TEST [MASK]"


def test_display_as_text(kernel: Kernel) -> None:
    url = kernel.serve()
    shown, *live = kernel.run("server").displayed
    assert url in shown["text/plain"]
    assert "double" in shown["text/plain"]
    assert all("text/plain" not in each for each in live)


def test_await_in_a_cell(kernel: Kernel) -> None:
    kernel.serve()
    cell = kernel.run("""
        import asyncio
        answers = await asyncio.gather(*(server.predict(n) for n in range(5)), asyncio.sleep(0, 'slept'))
        answers
    """)
    assert cell.text == "[0, 2, 4, 6, 8, 'slept']"


def test_settings_from_cell_and_http(kernel: Kernel) -> None:
    url = kernel.serve()
    assert kernel.value("server.tune(max_batch_size=4).max_batch_size") == 4
    settings = f"{url}/settings"
    assert httpx.get(settings, trust_env=False).json()["max_batch_size"] == 4
    change = {"max_wait_ms": 3}
    refused = httpx.patch(settings, json=change, trust_env=False)
    assert refused.status_code == 401
    bearer = {"authorization": f"Bearer {kernel.value('server.token')}"}
    accepted = httpx.patch(settings, json=change, headers=bearer, trust_env=False)
    assert accepted.status_code == 200
    assert kernel.value("server.settings.max_wait_ms") == 3


def test_two_servers(kernel: Kernel) -> None:
    one = kernel.serve()
    kernel.run("other = serving_kit.serve(list, port=0, name='other')", prints=True)
    two = kernel.value("other.url")
    assert (ask(one), ask(two)) == (42, 21)
    assert kernel.value("len(serving_kit.servers())") == 2


# -- while cells run ----------------------------------------------------------------------------------


def test_rerun_under_load(kernel: Kernel) -> None:
    url = kernel.serve()
    with Clients(url) as clients:
        for _ in range(5):
            clients.more()
            assert kernel.serve() == url
        clients.more()


def test_answers_during_busy_cell(kernel: Kernel) -> None:
    url = kernel.serve()
    kernel.run("import time")
    with Clients(url) as clients:
        cell = kernel.begin("""
            end = time.monotonic() + 3
            while time.monotonic() < end:
                sum(range(1000))
        """)
        clients.more()
        assert not cell.idle
        kernel.finish(cell)
    assert cell.error is None
    assert sum(clients.answers) >= 10


def test_interrupt_of_sleeping_cell(
    kernel: Kernel,
) -> None:
    url = kernel.serve()
    cell = kernel.begin("import time; time.sleep(60)")
    with Clients(url) as clients:
        clients.more()
        assert not cell.idle
        interrupt_until_idle(kernel, cell)
        clients.more()
    assert cell.error is not None
    assert cell.error[0] == "KeyboardInterrupt"
    assert kernel.value("server.running")


def test_answers_during_awaiting_cell(kernel: Kernel) -> None:
    url = kernel.serve()
    # No ■ here: with ipykernel 7.4 it reaches a cell that awaits only when its loop wakes by itself.
    cell = kernel.begin("import asyncio; await asyncio.sleep(1.5)")
    with Clients(url) as clients:
        clients.more()
        assert not cell.idle
        kernel.finish(cell)
    assert cell.error is None


def test_interrupt_of_busy_cell(kernel: Kernel) -> None:
    url = kernel.serve()
    cell = kernel.begin("while True: pass")
    with Clients(url) as clients:
        clients.more()
        interrupt_until_idle(kernel, cell)
        clients.more()
    assert cell.error is not None
    assert cell.error[0] == "KeyboardInterrupt"


def test_interrupt_of_idle_kernel(kernel: Kernel) -> None:
    url = kernel.serve()
    kernel.manager.interrupt_kernel()
    assert ask(url) == 42
    assert kernel.value("server(1)") == 2


def test_interrupt_of_waiting_request(kernel: Kernel) -> None:
    url = kernel.serve("""
        import threading
        import serving_kit
        released = threading.Event()
        def stuck(values):
            released.wait(30)
            return values
        server = serving_kit.serve(stuck, port=0, timeout_ms=60_000)
    """)
    cell = kernel.begin("server('hello')")
    until(lambda: httpx.get(f"{url}/stats", trust_env=False).json()["in_flight"] == 1)
    interrupt_until_idle(kernel, cell)
    assert cell.error is not None
    assert cell.error[0] == "KeyboardInterrupt"
    kernel.run("released.set()")
    assert kernel.value("server('and now?')") == "and now?"


def interrupt_until_idle(kernel: Kernel, cell: Cell) -> None:
    """Press ■, as often as a person would."""
    for _ in range(5):
        kernel.manager.interrupt_kernel()
        with contextlib.suppress(pytest.fail.Exception):
            kernel.finish(cell, 4)
            return
    pytest.fail(f"■ does not end {cell.code!r}")


# -- the panel's messages, as the browser sends and gets them ------------------------------------------


@pytest.fixture
def subshell(kernel: Kernel) -> Iterator[str]:
    """A subshell, as JupyterLab asks for one for its widgets."""
    client = kernel.client
    client.kernel_info()
    info = client.get_shell_msg(timeout=20)
    while info["msg_type"] != "kernel_info_reply":
        info = client.get_shell_msg(timeout=20)
    if "kernel subshells" not in info["content"].get("supported_features", ()):
        pytest.skip("this kernel has no subshells")
    client.control_channel.send(client.session.msg("create_subshell_request"))
    ident = client.get_control_msg(timeout=20)["content"]["subshell_id"]
    yield ident
    client.control_channel.send(client.session.msg("delete_subshell_request", {"subshell_id": ident}))
    client.get_control_msg(timeout=20)


def say(kernel: Kernel, comm: str, content: dict[str, Any], subshell: str | None) -> None:
    """What the panel's script does with `controls.send`."""
    data = {"method": "custom", "content": content}
    message = kernel.client.session.msg("comm_msg", {"comm_id": comm, "data": data})
    message["header"]["subshell_id"] = subshell
    kernel.client.shell_channel.send(message)


def show_panel(kernel: Kernel) -> tuple[str, str]:
    """Show the server in a cell; the ids of its two models."""
    card, view = kernel.run("server").displayed
    assert set(card) == {"text/html", "text/plain"}
    assert set(view) == {"application/vnd.jupyter.widget-view+json"}
    return kernel.value("[server.panel.widget.comm.comm_id, server.panel.controls.comm.comm_id]")


def test_first_message_during_blocking_cell(kernel: Kernel, subshell: str) -> None:
    url = kernel.serve()
    _, controls = show_panel(kernel)
    cell = kernel.begin("import time; time.sleep(4)")
    say(kernel, controls, {"kind": "tune", "id": "1", "knobs": {"max_batch_size": 5}}, subshell)
    kernel.listen_until(lambda: kernel.comms.get(controls), 3, "an answer")
    answer = kernel.comms[controls][-1]["content"]
    assert (answer["id"], answer["settings"]["max_batch_size"]) == ("1", 5)
    assert httpx.get(f"{url}/settings", trust_env=False).json()["max_batch_size"] == 5
    say(kernel, controls, {"kind": "tune", "id": "2", "knobs": {"max_batch_size": 0}}, subshell)
    kernel.listen_until(lambda: len(kernel.comms[controls]) == 2, 3, "a refusal")
    assert "max_batch_size must be" in kernel.comms[controls][-1]["content"]["error"]
    assert not cell.idle
    kernel.finish(cell)


def test_message_during_awaiting_cell(kernel: Kernel, subshell: str) -> None:
    kernel.serve()
    _, controls = show_panel(kernel)
    cell = kernel.begin("import asyncio; await asyncio.sleep(4)")
    for size in range(1, 8):
        say(kernel, controls, {"kind": "tune", "id": str(size), "knobs": {"max_batch_size": size}}, subshell)
    kernel.listen_until(lambda: len(kernel.comms.get(controls, ())) == 7, 3, "seven answers")
    assert not cell.idle
    kernel.finish(cell)
    assert kernel.value("server.settings.max_batch_size") == 7


def test_message_without_subshell(kernel: Kernel) -> None:
    kernel.serve()
    _, controls = show_panel(kernel)
    cell = kernel.begin("import time; time.sleep(1)")
    say(kernel, controls, {"kind": "tune", "id": "1", "knobs": {"max_batch_size": 5}}, None)
    kernel.finish(cell)
    kernel.listen_until(lambda: kernel.comms.get(controls), 5, "an answer")
    assert kernel.value("server.settings.max_batch_size") == 5


def test_frames_during_blocking_cell(kernel: Kernel) -> None:
    url = kernel.serve()
    frames, controls = show_panel(kernel)
    say(kernel, controls, {"kind": "seen", "id": "1", "view": "one", "seen": True}, None)
    sent = kernel.comms.setdefault(frames, [])
    kernel.run("import time; time.sleep(1)")
    assert sent == []
    cell = kernel.begin("time.sleep(3)")
    for _ in range(8):
        ask(url)
        kernel.listen(0.2)
    kernel.listen_until(lambda: len(sent) >= 4, 2, "four frames")
    assert not cell.idle
    kernel.finish(cell)
    assert all(each["buffer_paths"] == [["frame"]] and not each["state"] for each in sent)


def test_fifty_panels(kernel: Kernel) -> None:
    kernel.serve()
    show_panel(kernel)
    count = "len(__import__('ipywidgets').widgets.widget._instances)"
    before = kernel.value(count)
    for _ in range(10):
        kernel.run("server\nfrom IPython.display import display\nfor _ in range(5): display(server)")
    assert kernel.value(count) == before


# -- what goes wrong ----------------------------------------------------------------------------------


def test_model_errors_print_nothing(kernel: Kernel) -> None:
    url = kernel.serve("""
        import logging, warnings
        import serving_kit
        logging.basicConfig(level=logging.INFO, force=True)  # as notebooks do
        library = logging.getLogger("transformers")
        library.addHandler(logging.StreamHandler())  # as the library itself does
        library.propagate = False
        def broken(values):
            warnings.warn("of the model")
            library.warning("a line of the library")
            raise LookupError("deep inside")
        server = serving_kit.serve(broken, port=0)
    """)
    answer = httpx.post(url, content="hello", trust_env=False)
    assert answer.status_code == 500
    assert "deep inside" not in answer.text
    with socket.create_connection(("127.0.0.1", port_of(url)), timeout=10) as sock:
        sock.sendall(b"\x00\xff no HTTP\r\n\r\n")
        assert b"400" in sock.recv(1000)
    [incident] = kernel.value("[[i.id, i.traceback] for i in server.errors()]")
    assert incident[0] == answer.json()["incident"]
    assert "LookupError: deep inside" in incident[1]
    ename, evalue = kernel.fail("server('hello')")
    assert ename == "ModelFailed"
    assert "the model failed" in evalue
    assert kernel.value("[line for line in server.logs() if 'line of the library' in line]")
    kernel.run("logging.basicConfig(force=True); library.handlers.clear(); library.propagate = True")


@pytest.mark.parametrize(
    ("code", "ename", "words"),
    [
        ("serving_kit.serve(list, port=0, max_batchsize=4)", "SettingError", "did you mean max_batch_size"),
        ("serving_kit.serve(list, port=0, max_batch_size=0)", "SettingError", "from 1 to"),
        ("serving_kit.serve(list, port=70_000)", "StartError", "0 to 65535"),
        ("serving_kit.serve(42, port=0)", "StartError", "cannot serve int"),
        ("serving_kit.serve(list, task='fill-mask')", "StartError", "by its id or folder"),
    ],
)
def test_start_errors(kernel: Kernel, code: str, ename: str, words: str) -> None:
    kernel.run("import serving_kit")
    name, text = kernel.fail(code)
    assert name == ename
    assert words in text
    assert kernel.value("len(serving_kit.servers())") == 0


def test_stop(kernel: Kernel) -> None:
    url = kernel.serve()
    assert kernel.value(OUR_THREADS) != []
    kernel.run("server.stop()")
    assert kernel.value(OUR_THREADS) == []
    assert is_free(port_of(url))


# -- the life of the kernel ---------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["nest_asyncio", "nest_asyncio2"])
def test_kernel_restart_and_nesting(shared: Kernel, package: str) -> None:
    url = shared.serve()
    assert ask(url) == 42
    shared.restart()
    until(lambda: is_free(port_of(url)), 5, "a free port")
    pytest.importorskip(package)
    shared.run(f"import {package}; {package}.apply()")
    url = shared.serve()
    assert ask(url) == 42
    assert shared.value("server(21)") == 42
    cell = shared.run("import asyncio; asyncio.run(server.predict(4)), await server.predict(5)")
    assert cell.text == "(8, 10)"
    assert shared.serve() == url
    assert ask(url) == 42
    shared.run("server.stop()")
    assert shared.value(OUR_THREADS) == []


def test_kernel_shutdown(shared: Kernel) -> None:
    url = shared.serve()
    with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)) as idle:
        idle.request("GET", "/health")
        assert idle.getresponse().read()
        began = time.monotonic()
        shared.manager.shutdown_kernel()
        assert time.monotonic() - began < 15
        until(lambda: is_free(port_of(url)), 5, "a free port")


def test_no_stray_output(shared: Kernel) -> None:
    """The last test, on purpose: over everything that the kernels of this module have published."""
    assert len(shared.cells) > 10
    assert shared.stray_output() == []
