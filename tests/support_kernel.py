"""A real Jupyter kernel, driven as a front end drives it.

Every cell goes through `Kernel.run`, which records what the kernel publishes and for which cell, so that
output that no cell has asked for is found.
"""

from __future__ import annotations

import queue
import textwrap
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support import REPOSITORY

pytest.importorskip("ipykernel")
jupyter_client = pytest.importorskip("jupyter_client")

OUR_THREADS = "[t.name for t in __import__('threading').enumerate() if t.name.startswith('serving-kit')]"
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
        """As the menu does it: the kernel is asked to exit, and killed if it does not."""
        self.listen(0)
        self.client.stop_channels()
        self.manager.restart_kernel()
        self.connect()

    def begin(self, code: str, prints: bool = False) -> Cell:
        """Send a cell and return when it runs."""
        cell = Cell(textwrap.dedent(code), prints)
        # A cell that fails must not abort those that were sent after it.
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
        """Serve in a cell, which prints one line; returns the URL."""
        cell = self.run(code, prints=True)
        assert len(cell.printed.splitlines()) == 1, cell.printed
        return str(self.value("server.url"))

    def listen_until(self, condition: Any, timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"{what} did not happen within {timeout:g} s")
            self.listen(0.2)

    def listen(self, timeout: float) -> None:
        """Receive what the kernel has published."""
        while True:
            try:
                message = self.client.get_iopub_msg(timeout=timeout)
            except queue.Empty:
                return
            self.receive(message)
            if timeout:
                return

    def receive(self, message: dict[str, Any]) -> None:
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

    def stray_output(self) -> list[Any]:
        """Output that no cell has asked for."""
        self.listen(0)
        printed = [(c.code, c.printed) for c in self.cells.values() if c.printed and not c.prints]
        return [*printed, *self.strays]
