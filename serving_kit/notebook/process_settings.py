"""What a running server changes in its process, and restores when the last one stops.

- The GIL's switch interval. Every torch operation releases the GIL and waits up to the interval to get it
  back: a cell that runs pure Python slows a model thread 40-fold at Python's 5 ms, and about 3-fold at
  0.1 ms, where 2-fold would be an equal share.
- Where log lines and warnings of the server's own threads go. A handler writes to `sys.stderr`, which in a
  kernel is the output of the cell that runs, so they are kept for `server.logs()` instead. Lines of other
  threads pass unchanged, and the user's own logging configuration is left alone.
- Where the lines of this package go (`log.py`), from any thread: to `server.logs()`, to handlers of the
  logger `serving_kit`, and to those of its parents that do not write into a cell.
- Which warnings are errors on those threads: none (`thread_warnings.py`).

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
from typing import TextIO

from serving_kit import thread_warnings
from serving_kit.thread_warnings import THREAD_PREFIX as THREAD_PREFIX

SWITCH_INTERVAL_S = 1e-4
_KEPT_LINES = 200
# Loggers that write from the server's threads. A filter of a logger sees the records of that logger only,
# not those of its children; the libraries log through handlers of their own.
_LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "asyncio")
_LIBRARIES = ("transformers", "torch", "huggingface_hub")
_OWN_LOGGERS = ("serving_kit", "serving_kit.access")

_lock = threading.Lock()
_holders: set[int] = set()
_lines: deque[str] = deque(maxlen=_KEPT_LINES)
_undo: list[Callable[[], None]] = []


def hold(owner: object) -> None:
    """Make the changes, unless they are made; `release(owner)` undoes them. Any thread."""
    with _lock:
        if not _holders:
            _shorten_switch_interval()
            _keep_warnings()
            thread_warnings.install()
            _undo.append(thread_warnings.remove)
        _holders.add(id(owner))
        _keep_log_lines()  # each time, because libraries imported since have added handlers


def release(owner: object) -> None:
    """Restore what was changed, once no owner holds it. Any thread; idempotent."""
    with _lock:
        _holders.discard(id(owner))
        if not _holders:
            while _undo:
                _undo.pop()()


def lines() -> list[str]:
    """The latest lines that the servers' threads would have printed, oldest first. Any thread."""
    return list(_lines)


def keep(line: str) -> None:
    """Add a line to `lines()`. Any thread."""
    _lines.append(f"{time.strftime('%H:%M:%S')} {line}")


def _shorten_switch_interval() -> None:
    before = sys.getswitchinterval()
    if before <= SWITCH_INTERVAL_S:
        return
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    ours = sys.getswitchinterval()

    def undo() -> None:
        if sys.getswitchinterval() == ours:  # else other code has changed it since
            sys.setswitchinterval(before)

    _undo.append(undo)


class _KeepFromOwnThreads(logging.Filter):
    """Keeps the records of the server's threads and drops them; passes all others."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not (record.threadName or "").startswith(THREAD_PREFIX):
            return True
        keep(_formatter.format(record))
        return False


class _KeepOutOfCells(logging.Filter):
    """Passes records of this package to every handler that would get them and does not write into a cell.

    Handlers are looked up for each record, so that `logging.basicConfig()` in a later cell changes nothing.
    A handler that is attached to one of the package's own loggers gets the records, wherever it writes.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        keep(_formatter.format(record))
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            for handler in logger.handlers:
                own = logger.name in _OWN_LOGGERS
                if record.levelno >= handler.level and (own or not _writes_into_a_cell(handler)):
                    handler.handle(record)
            logger = logger.parent if logger.propagate else None
        return False  # it has been handled; a record without a handler would be printed by Python


def _writes_into_a_cell(handler: logging.Handler) -> bool:
    """Whether it writes to a stream by which a kernel has replaced `sys.stdout` or `sys.stderr`."""
    console = getattr(handler, "console", None)  # rich's handler
    streams = (getattr(handler, "stream", None), getattr(console, "file", None))
    return any(type(stream).__module__.startswith("ipykernel.") for stream in streams)


_keep_from_own_threads = _KeepFromOwnThreads()
_keep_out_of_cells = _KeepOutOfCells()
_formatter = logging.Formatter("%(levelname)s %(name)s: %(message)s")


def _keep_log_lines() -> None:
    places: list[logging.Logger | logging.Handler] = [logging.getLogger(name) for name in _LOGGERS]
    for library in _LIBRARIES:
        places += logging.getLogger(library).handlers
    if logging.lastResort is not None:  # what a process without any handler prints with
        places.append(logging.lastResort)
    for place in places:
        _filter_with(_keep_from_own_threads, place)
    for name in _OWN_LOGGERS:
        _filter_with(_keep_out_of_cells, logging.getLogger(name))


def _filter_with(log_filter: logging.Filter, place: logging.Logger | logging.Handler) -> None:
    if log_filter not in place.filters:
        place.addFilter(log_filter)
        _undo.append(lambda: place.removeFilter(log_filter))


def _keep_warnings() -> None:
    before = warnings.showwarning

    def showwarning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if threading.current_thread().name.startswith(THREAD_PREFIX):
            keep(f"{category.__name__}: {message}")
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = showwarning

    def undo() -> None:
        if warnings.showwarning is showwarning:
            warnings.showwarning = before

    _undo.append(undo)
