"""The command, or plain uvicorn, in a process of its own, with a model that waits for a file."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.support import REPOSITORY, until
from tests.support_http import free_port

# The command serves a function instead of what a model id would load. Its calls end once the file "go"
# exists.
_COMMAND = """
import sys, time
from pathlib import Path
from serving_kit.models import loading

go = Path(sys.argv.pop(1))

def slow(texts):
    while texts != [""] and not go.exists():
        time.sleep(0.01)
    return [text.upper() for text in texts]

load_model = loading.load_model
loading.load_model = lambda model, **_: load_model(slow)  # before the command imports it
from serving_kit import cli
sys.exit(cli.main())
"""


class ServerProcess:
    """A server in a process of its own. Its model waits for the file `go`."""

    def __init__(self, process: subprocess.Popen[str], port: int, go: Path) -> None:
        self.process, self.port, self.go = process, port, go
        self.url = f"http://127.0.0.1:{port}"
        # Idle connections are given up before the server does: a request on one that it closes is lost.
        limits = httpx.Limits(max_connections=1, keepalive_expiry=1.0)
        self.client = httpx.Client(base_url=self.url, timeout=30, limits=limits)

    def health(self) -> int | None:
        """The status of `/health`; None: no answer."""
        try:
            return self.client.get("/health").status_code
        except httpx.TransportError:
            return None

    def stats(self) -> Any:
        """What `/stats` says."""
        return self.client.get("/stats").json()

    def in_flight(self) -> int:
        """Requests that wait for their answer."""
        return int(self.stats()["in_flight"])

    def ended(self) -> tuple[int, str]:
        """Wait until it ends by itself; its exit status and what it printed."""
        printed, _ = self.process.communicate(timeout=60)
        return self.process.returncode, printed


@contextlib.contextmanager
def running(command: list[str], port: int, go: Path, **more: Any) -> Iterator[ServerProcess]:
    """Run Python with these arguments in the folder of `go`, from ready to the end of the block."""
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
        server = ServerProcess(process, port, go)
        try:
            until(lambda: server.health() == 200, timeout=60)
            yield server
        finally:
            server.client.close()
            process.kill()


@contextlib.contextmanager
def command(folder: Path, *options: str, **more: Any) -> Iterator[ServerProcess]:
    """Run `serving-kit serve` with `options` on a function that waits for the file "go" in `folder`."""
    port, go = free_port(), folder / "go"
    arguments = ["-c", _COMMAND, str(go), "serve", "--port", str(port), "--max-batch-size", "1", *options]
    with running(arguments, port, go, **more) as server:
        yield server
