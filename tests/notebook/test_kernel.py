"""A real Jupyter kernel serves, is asked from outside, interrupted, restarted. No browser.

Every cell goes through `Kernel.run`, which remembers what the kernel published and for which cell, so
that the end of the module can tell whether any output ever went astray.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import shutil
import socket
import subprocess
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support import REPOSITORY, until

pytest.importorskip("ipykernel")
jupyter_client = pytest.importorskip("jupyter_client")
httpx = pytest.importorskip("httpx")

pytestmark = pytest.mark.kernel

SERVE = """
import serving_kit
def double(values):
    return [2 * value for value in values]
server = serving_kit.serve(double, port=0)
"""


@dataclass
class Cell:
    """A cell that was sent to the kernel."""

    code: str
    prints: bool = False  # whether its own code prints
    printed: str = ""
    displayed: list[dict[str, Any]] = field(default_factory=list)
    error: tuple[str, str] | None = None
    busy: bool = False
    idle: bool = False

    @property
    def text(self) -> str:
        """What was displayed last, as text."""
        return str(self.displayed[-1]["text/plain"])


class Kernel:
    """One kernel and everything that it has published."""

    def __init__(self) -> None:
        self.manager = jupyter_client.KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(REPOSITORY))
        self.cells: dict[str, Cell] = {}
        self.strays: list[dict[str, Any]] = []
        self.comms: dict[str, list[dict[str, Any]]] = {}  # what was sent to the browser's models, by id
        self.connect()

    def connect(self) -> None:
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def close(self) -> None:
        self.listen(0)
        self.client.stop_channels()
        if self.manager.has_kernel:
            self.manager.shutdown_kernel(now=True)

    def restart(self) -> None:
        """As the menu does it: the kernel is asked to go, and killed if it does not."""
        self.listen(0)
        self.client.stop_channels()
        self.manager.restart_kernel()
        self.connect()

    def begin(self, code: str, prints: bool = False) -> Cell:
        """Send a cell and return when it runs."""
        cell = Cell(textwrap.dedent(code), prints)
        # A cell that fails must not take with it those that were sent meanwhile.
        self.cells[self.client.execute(cell.code, stop_on_error=False)] = cell
        self.listen_until(lambda: cell.busy, 30, f"the start of {code!r}")
        return cell

    def finish(self, cell: Cell, timeout: float = 30) -> Cell:
        """Return when the cell has ended."""
        self.listen_until(lambda: cell.idle, timeout, f"the end of {cell.code!r}")
        return cell

    def run(self, code: str, *, prints: bool = False, timeout: float = 30) -> Cell:
        """Run a cell that must not fail."""
        cell = self.finish(self.begin(code, prints), timeout)
        assert cell.error is None, cell.error
        return cell

    def fail(self, code: str) -> tuple[str, str]:
        """Run a cell that must fail; its ename and evalue."""
        cell = self.finish(self.begin(code))
        assert cell.error is not None, f"{code!r} was expected to fail"
        return cell.error

    def value(self, expression: str) -> Any:
        """What an expression is in the kernel, through JSON. Nothing is printed for it."""
        shown = f"import json as _json; from IPython.display import JSON; JSON({{'v': {expression}}})"
        return self.run(shown).displayed[-1]["application/json"]["v"]

    def serve(self, code: str = SERVE) -> str:
        """Serve in a cell, which says so in a line of its own; the URL."""
        cell = self.run(code, prints=True)
        assert len(cell.printed.splitlines()) == 1, cell.printed
        return str(self.value("server.url"))

    def listen_until(self, condition: Any, timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"{what} did not come within {timeout:g} s")
            self.listen(0.2)

    def listen(self, timeout: float) -> None:
        """Take in what the kernel has published since."""
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=timeout)
            except queue.Empty:
                return
            self.hear(message)
            if timeout:
                return

    def hear(self, message: dict[str, Any]) -> None:
        kind, content = message["msg_type"], message["content"]
        if kind == "comm_msg":
            self.comms.setdefault(content["comm_id"], []).append(content["data"])
        cell = self.cells.get(message["parent_header"].get("msg_id", ""))
        if cell is None:
            if kind in ("stream", "error", "display_data", "execute_result"):
                self.strays.append(message)
        elif kind == "status":
            cell.busy = True
            cell.idle = content["execution_state"] == "idle"
        elif kind == "stream":
            cell.printed += content["text"]
        elif kind in ("execute_result", "display_data"):
            cell.displayed.append(content["data"])
        elif kind == "error":
            cell.error = content["ename"], content["evalue"]

    def went_astray(self) -> list[Any]:
        """Output that no cell has asked for."""
        self.listen(0)
        printed = [(c.code, c.printed) for c in self.cells.values() if c.printed and not c.prints]
        return [*printed, *self.strays]


@pytest.fixture(scope="module")
def shared() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.close()


@pytest.fixture
def kernel(shared: Kernel) -> Iterator[Kernel]:
    """The module's kernel; the servers of the test are stopped afterwards."""
    yield shared
    shared.run("import serving_kit; serving_kit.stop_all()")
    assert shared.value(OUR_THREADS) == []
    assert shared.went_astray() == []


OUR_THREADS = "[t.name for t in __import__('threading').enumerate() if t.name.startswith('serving-kit')]"


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
        connection.auto_open = 0  # never a second connection without anybody noticing
        return connection


# -- serving and asking -------------------------------------------------------------------------------


def test_a_cell_serves_and_the_world_outside_is_answered(kernel: Kernel) -> None:
    url = kernel.serve()
    assert ask(url, [1, 2]) == [2, 4]
    assert kernel.value("server(21)") == 42
    assert kernel.value("server.stats()['state']") == "ready"


def test_curl_is_answered_as_the_guide_shows_it(kernel: Kernel) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    url = kernel.serve(SERVE.replace("2 * value", "value.upper()"))
    curl = ["curl", "--silent", "--noproxy", "*", "--max-time", "20", "-X", "POST", "-d", "test [MASK]", url]
    done = subprocess.run(curl, capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(done.stdout) == "TEST [MASK]"


def test_displaying_the_server_says_what_it_is_in_text(kernel: Kernel) -> None:
    url = kernel.serve()
    shown, *live = kernel.run("server").displayed
    assert url in shown["text/plain"]
    assert "double" in shown["text/plain"]
    assert all("text/plain" not in each for each in live)


def test_an_async_cell_awaits_an_answer_while_its_loop_goes_on(kernel: Kernel) -> None:
    kernel.serve()
    cell = kernel.run("""
        import asyncio
        answers = await asyncio.gather(*(server.predict(n) for n in range(5)), asyncio.sleep(0, 'slept'))
        answers
    """)
    assert cell.text == "[0, 2, 4, 6, 8, 'slept']"


def test_knobs_move_from_a_cell_and_over_http_with_the_token(kernel: Kernel) -> None:
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


def test_two_servers_run_side_by_side_in_one_kernel(kernel: Kernel) -> None:
    one = kernel.serve()
    kernel.run("other = serving_kit.serve(list, port=0, name='other')", prints=True)
    two = kernel.value("other.url")
    assert (ask(one), ask(two)) == (42, 21)
    assert kernel.value("len(serving_kit.servers())") == 2


# -- while cells run ----------------------------------------------------------------------------------


def test_running_the_cell_again_keeps_the_port_and_no_client_notices(kernel: Kernel) -> None:
    url = kernel.serve()
    with Clients(url) as clients:
        for _ in range(5):
            clients.more()
            assert kernel.serve() == url
        clients.more()


def test_everybody_is_answered_while_a_cell_spins_in_pure_python(kernel: Kernel) -> None:
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


def test_the_server_answers_while_a_cell_sleeps_and_the_stop_button_ends_only_the_cell(
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


def test_the_server_answers_while_a_cell_awaits(kernel: Kernel) -> None:
    url = kernel.serve()
    # No ■ here: with ipykernel 7.4 it reaches a cell that awaits only when its loop wakes by itself.
    cell = kernel.begin("import asyncio; await asyncio.sleep(1.5)")
    with Clients(url) as clients:
        clients.more()
        assert not cell.idle
        kernel.finish(cell)
    assert cell.error is None


def test_the_stop_button_on_a_spinning_cell_leaves_the_server_answering(kernel: Kernel) -> None:
    url = kernel.serve()
    cell = kernel.begin("while True: pass")
    with Clients(url) as clients:
        clients.more()
        interrupt_until_idle(kernel, cell)
        clients.more()
    assert cell.error is not None
    assert cell.error[0] == "KeyboardInterrupt"


def test_the_stop_button_on_an_idle_kernel_leaves_the_server_answering(kernel: Kernel) -> None:
    url = kernel.serve()
    kernel.manager.interrupt_kernel()
    assert ask(url) == 42
    assert kernel.value("server(1)") == 2


def test_the_stop_button_on_a_cell_that_asks_a_stuck_model_gives_the_question_up(kernel: Kernel) -> None:
    url = kernel.serve("""
        import threading
        import serving_kit
        released = threading.Event()
        def stuck(values):
            released.wait(30)
            return values
        server = serving_kit.serve(stuck, port=0, timeout_ms=60_000)
    """)
    cell = kernel.begin("server('anybody there?')")
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


def test_the_first_touch_of_a_slider_counts_while_a_cell_blocks(kernel: Kernel, subshell: str) -> None:
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


def test_a_touch_counts_while_a_cell_awaits(kernel: Kernel, subshell: str) -> None:
    kernel.serve()
    _, controls = show_panel(kernel)
    cell = kernel.begin("import asyncio; await asyncio.sleep(4)")
    for size in range(1, 8):
        say(kernel, controls, {"kind": "tune", "id": str(size), "knobs": {"max_batch_size": size}}, subshell)
    kernel.listen_until(lambda: len(kernel.comms.get(controls, ())) == 7, 3, "seven answers")
    assert not cell.idle
    kernel.finish(cell)
    assert kernel.value("server.settings.max_batch_size") == 7


def test_without_a_subshell_a_touch_counts_when_the_cell_has_ended(kernel: Kernel) -> None:
    kernel.serve()
    _, controls = show_panel(kernel)
    cell = kernel.begin("import time; time.sleep(1)")
    say(kernel, controls, {"kind": "tune", "id": "1", "knobs": {"max_batch_size": 5}}, None)
    kernel.finish(cell)
    kernel.listen_until(lambda: kernel.comms.get(controls), 5, "an answer")
    assert kernel.value("server.settings.max_batch_size") == 5


def test_frames_come_while_a_cell_blocks_and_none_in_silence(kernel: Kernel) -> None:
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


def test_fifty_panels_leave_no_widget_behind(kernel: Kernel) -> None:
    kernel.serve()
    show_panel(kernel)
    count = "len(__import__('ipywidgets').widgets.widget._instances)"
    before = kernel.value(count)
    for _ in range(10):
        kernel.run("server\nfrom IPython.display import display\nfor _ in range(5): display(server)")
    assert kernel.value(count) == before


# -- what goes wrong ----------------------------------------------------------------------------------


def test_errors_of_the_model_print_nothing_and_can_be_looked_up(kernel: Kernel) -> None:
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
def test_what_cannot_start_says_so_in_the_cell(kernel: Kernel, code: str, ename: str, words: str) -> None:
    kernel.run("import serving_kit")
    name, text = kernel.fail(code)
    assert name == ename
    assert words in text
    assert kernel.value("len(serving_kit.servers())") == 0


def test_stop_ends_every_thread_and_frees_the_port(kernel: Kernel) -> None:
    url = kernel.serve()
    assert kernel.value(OUR_THREADS) != []
    kernel.run("server.stop()")
    assert kernel.value(OUR_THREADS) == []
    assert is_free(port_of(url))


# -- the life of the kernel ---------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["nest_asyncio", "nest_asyncio2"])
def test_restarting_the_kernel_frees_the_port_and_a_patched_loop_serves_as_well(
    shared: Kernel, package: str
) -> None:
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


def test_shutting_the_kernel_down_frees_the_port(shared: Kernel) -> None:
    url = shared.serve()
    with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)) as idle:
        idle.request("GET", "/health")
        assert idle.getresponse().read()
        began = time.monotonic()
        shared.manager.shutdown_kernel()
        assert time.monotonic() - began < 15
        until(lambda: is_free(port_of(url)), 5, "a free port")


def test_no_output_ever_went_to_a_cell_that_did_not_print(shared: Kernel) -> None:
    """The last test, on purpose: over everything that the kernels of this module have published."""
    assert len(shared.cells) > 10
    assert shared.went_astray() == []
