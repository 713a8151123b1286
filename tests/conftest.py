"""What every test may use, and what every test must leave behind: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import serving_kit

REPOSITORY = Path(__file__).parent.parent


def until(condition: Callable[[], Any], timeout: float = 10.0, what: str = "it") -> Any:
    """Return the first true value of `condition()`; fail the test after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {timeout:g} s")
        time.sleep(0.005)


def our_threads() -> set[threading.Thread]:
    """The threads of this process that the kit has started."""
    return {each for each in threading.enumerate() if each.name.startswith("serving-kit-")}


def interrupt_the_main_thread(during: str) -> None:
    """What ■ does, once the main thread waits inside the function `during`. For other threads."""

    def waits() -> bool:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        return frame.f_code.co_name == "wait" and any(
            each.f_code.co_name == during for each, _ in traceback.walk_stack(frame)
        )

    until(waits, what=f"waiting in {during}()")
    # From that line of Python to its system call; a signal in between would be seen only after it.
    time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def run_script(
    script: str, *arguments: str, timeout: float = 30.0, warnings: str = "default"
) -> subprocess.CompletedProcess[str]:
    """Run `script` in a Python of its own; fail unless it ends well and stderr stays empty."""
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stderr == ""
    return done


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread, a registered server or a changed process behind.

    What a fixture of a wider scope has started before the test may stay.
    """
    registry: dict[str, Any] = sys.__dict__.setdefault("_serving_kit_servers", {})
    servers, threads, interval = dict(registry), our_threads(), sys.getswitchinterval()
    yield
    if servers:
        for name, server in list(registry.items()):
            if servers.get(name) is not server:
                server.stop()
    elif registry:
        serving_kit.stop_all()
    deadline = time.monotonic() + 5
    while our_threads() - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(each.name for each in our_threads() - threads) == []
    assert set(registry) == set(servers)
    assert sys.getswitchinterval() == interval


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """`serving_kit.serve` on any free port; every server is stopped in the end."""
    started = []

    def serve(model: Any, **arguments: Any) -> Any:
        server = serving_kit.serve(model, **{"port": 0, **arguments})
        started.append(server)
        return server

    yield serve
    for server in reversed(started):
        server.stop()
