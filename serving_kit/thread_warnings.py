"""Keeps warnings on the server's own threads warnings, whatever a cell turns them into.

The filters of `warnings` belong to the whole process: after `warnings.simplefilter("error")` in a cell,
a function's "divide by zero" would raise on the model thread, and its client would get a 500. So while
a server runs, a filter of ours stands first in the list. It matches on the server's threads only; what
happens on all others is decided by the user's own filters, as before.

Every thread may call these functions.

Not here: where the text of a warning goes (`notebook/process_settings.py`).
"""

from __future__ import annotations

import re
import threading
import warnings
from typing import Any

THREAD_PREFIX = "serving-kit-"


class _OnOurThreads:
    """Stands where a filter has the pattern for its message, of which `match` is all that is used."""

    def match(self, text: str) -> bool:
        return threading.current_thread().name.startswith(THREAD_PREFIX)

    def __reduce__(self) -> Any:
        # Libraries send the filters to other processes, which have no threads of ours.
        return re.compile, ("(?!)",)


# "always" leaves no mark in the registries of modules, which would silence the same warning in a cell.
_FILTER: Any = ("always", _OnOurThreads(), Warning, None, 0)
_installed = False


def install() -> None:
    """Put the filter first."""
    global _installed
    _installed = True
    put_first()


def put_first() -> None:
    """Put the filter first again: cells add theirs before it, or go back to an earlier list.

    Does nothing unless it is installed. Cheap enough for every call of a model.
    """
    if not _installed:
        return
    filters: Any = warnings.filters
    if not filters or filters[0] is not _FILTER:
        filters.insert(0, _FILTER)
        _remove_from(filters, after=1)


def remove() -> None:
    """Take the filter out. One that an earlier list still has matches no thread any more."""
    global _installed
    _installed = False
    _remove_from(warnings.filters)


def _remove_from(filters: Any, after: int = 0) -> None:
    for index in range(len(filters) - 1, after - 1, -1):
        if filters[index] is _FILTER:
            del filters[index]
