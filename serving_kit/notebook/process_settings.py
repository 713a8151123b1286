"""What a running server changes in its process, and puts back when the last one stops.

- The GIL's switch interval. Every torch operation gives the GIL away and waits up to the interval to
  get it back, so that a cell that spins in pure Python slows a model thread 40-fold at Python's 5 ms,
  and about 3-fold at 0.1 ms, close to the half of the cores that it can hope for.
- Where log lines and warnings of the server's own threads go. A handler writes to `sys.stderr`, which
  in a kernel is whatever cell happens to run, so they are kept for `server.logs()` instead. Lines of
  all other threads pass untouched, and so does the user's own logging set-up.
- Where this kit's own lines go (`log.py`), from any thread: to `server.logs()`, to handlers of the logger
  `serving_kit`, and to those of its parents that do not write into a cell.
- Which warnings are errors, on those threads: none (`thread_warnings.py`).

Not here: starting threads (`inline_server.py`, `batching.py`).
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

from serving_kit import thread_warnings
from serving_kit.thread_warnings import THREAD_PREFIX as THREAD_PREFIX

SWITCH_INTERVAL_S = 1e-4
_KEPT_LINES = 200
# Loggers that write from our threads. Filters of a logger see its own records only, not its children's,
# hence the list; the transformers library logs through one handler of its own, hence its handlers.
_LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "asyncio")
_LIBRARIES = ("transformers", "torch", "huggingface_hub")
_OURS = ("serving_kit", "serving_kit.access")

_lock = threading.Lock()
_holders: set[int] = set()
_lines: deque[str] = deque(maxlen=_KEPT_LINES)
_undo: list[Callable[[], None]] = []


def hold(owner: object) -> None:
    """Make the changes, unless they are made; `release(owner)` puts everything back. Any thread."""
    with _lock:
        if not _holders:
            _shorten_switch_interval()
            _keep_warnings()
            thread_warnings.install()
            _undo.append(thread_warnings.remove)
        _holders.add(id(owner))
        _keep_log_lines()  # each time: libraries imported since have brought handlers of their own


def release(owner: object) -> None:
    """Put back what was changed, once nobody holds it any more. Any thread; idempotent."""
    with _lock:
        _holders.discard(id(owner))
        if not _holders:
            while _undo:
                _undo.pop()()


def lines() -> list[str]:
    """The latest lines that the servers' threads would have printed, oldest first."""
    return list(_lines)


def keep(line: str) -> None:
    """Add a line to `lines()`."""
    _lines.append(f"{time.strftime('%H:%M:%S')} {line}")


def _shorten_switch_interval() -> None:
    before = sys.getswitchinterval()
    if before <= SWITCH_INTERVAL_S:
        return
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    ours = sys.getswitchinterval()

    def undo() -> None:
        if sys.getswitchinterval() == ours:  # else somebody else has changed it since
            sys.setswitchinterval(before)

    _undo.append(undo)


class _KeepOurs(logging.Filter):
    """Takes the records of our threads out of the stream; passes all others."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not (record.threadName or "").startswith(THREAD_PREFIX):
            return True
        keep(_formatter.format(record))
        return False


class _OutOfCells(logging.Filter):
    """Hands records of this kit to every handler that would get them, but for those that write into a cell.

    Handlers are looked up for each record, so that `logging.basicConfig()` in a later cell changes nothing.
    A handler that is attached to one of our own loggers gets our lines, wherever it writes.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        keep(_formatter.format(record))
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            for handler in logger.handlers:
                ours = logger.name in _OURS
                if record.levelno >= handler.level and (ours or not _writes_into_a_cell(handler)):
                    handler.handle(record)
            logger = logger.parent if logger.propagate else None
        return False  # the record has been to its handlers; without any, Python would print it


def _writes_into_a_cell(handler: logging.Handler) -> bool:
    """Whether it writes to what a kernel has put in place of `sys.stdout` and `sys.stderr`."""
    console = getattr(handler, "console", None)  # rich's handler
    streams = (getattr(handler, "stream", None), getattr(console, "file", None))
    return any(type(stream).__module__.startswith("ipykernel.") for stream in streams)


_filter = _KeepOurs()
_out_of_cells = _OutOfCells()
_formatter = logging.Formatter("%(levelname)s %(name)s: %(message)s")


def _keep_log_lines() -> None:
    places: list[logging.Logger | logging.Handler] = [logging.getLogger(name) for name in _LOGGERS]
    for library in _LIBRARIES:
        places += logging.getLogger(library).handlers
    if logging.lastResort is not None:  # what a process without any handler prints with
        places.append(logging.lastResort)
    for place in places:
        _filter_with(_filter, place)
    for name in _OURS:
        _filter_with(_out_of_cells, logging.getLogger(name))


def _filter_with(log_filter: logging.Filter, place: logging.Logger | logging.Handler) -> None:
    if log_filter not in place.filters:
        place.addFilter(log_filter)
        _undo.append(lambda: place.removeFilter(log_filter))


def _keep_warnings() -> None:
    before = warnings.showwarning

    def showwarning(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if threading.current_thread().name.startswith(THREAD_PREFIX):
            keep(f"{category.__name__}: {message}")
        else:
            before(message, category, *rest, **more)

    warnings.showwarning = showwarning

    def undo() -> None:
        if warnings.showwarning is showwarning:
            warnings.showwarning = before

    _undo.append(undo)
