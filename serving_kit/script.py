"""Scripts, whose process ends with the code that runs now: how one is recognised, and its stop signals.

Not here: waiting (`Server.wait` in `server.py`), the signals of the command (`cli.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_STOP_SIGNALS = ("SIGTERM", "SIGHUP")  # Ctrl+C is an exception already


def in_a_script() -> bool:
    """Whether the process ends with the code that runs now: no kernel, no interactive interpreter."""
    if hasattr(sys, "ps1") or sys.flags.interactive or sys.flags.inspect:
        return False
    ipython = sys.modules.get("IPython")
    return ipython is None or ipython.get_ipython() is None


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The stop signals that have come, in the main thread of a script. The second raises KeyboardInterrupt.

    Signals that the script handles itself are left alone; the handlers are restored at the end.
    """
    caught: list[int] = []
    process = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked child, which must end as it would have without us
            pass_on(number)
            return
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread() and in_a_script():
        for name in _STOP_SIGNALS:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def pass_on(number: int) -> None:
    """Let a signal do to this process what it does by default."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
