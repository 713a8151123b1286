"""What several test modules share: waiting, threads, scripts, functions to serve.

Not here: fixtures (`conftest.py`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
    """Send SIGINT, as interrupting a cell does, once the main thread waits inside the function `during`.

    For other threads.
    """

    def waits() -> bool:
        frame = sys._current_frames()[threading.main_thread().ident or 0]
        return frame.f_code.co_name == "wait" and any(
            each.f_code.co_name == during for each, _ in traceback.walk_stack(frame)
        )

    until(waits, what=f"waiting in {during}()")
    # The main thread may not have reached its system call yet. A signal before that would be handled only
    # after the call.
    time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def run_script(
    script: str, *arguments: str, timeout: float = 30.0, warnings: str = "default"
) -> subprocess.CompletedProcess[str]:
    """Run `script` in a Python of its own; fail unless it exits with 0 and stderr stays empty."""
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


class NamedModel:
    """A function to serve that answers with its name. A weak reference tells when it has been freed."""

    def __init__(self, name: str = "model") -> None:
        self.__name__ = name

    def __call__(self, values: list[Any]) -> list[Any]:
        """The name, once for each value."""
        return [self.__name__ for _ in values]


class BlockingFunction:
    """A function to serve that answers with its inputs once `open` is set. `inside`: it was called."""

    def __init__(self) -> None:
        self.inside, self.open = threading.Event(), threading.Event()

    def __call__(self, values: list[Any]) -> list[Any]:
        """Wait, and answer."""
        self.inside.set()
        assert self.open.wait(60)
        return values

    async def entered(self) -> None:
        """Wait until it has been called."""
        assert await asyncio.to_thread(self.inside.wait, 30)
