"""Lets the user's own cells nest event loops. Opt-in; nothing in this package needs it.

A kernel's main thread already runs an event loop, so `asyncio.run(...)` in a cell fails. `await ...` is
nearly always the better solution. For code that cannot be changed there is nest-asyncio, which patches the
loop's class until the process ends. The server works with and without it, because its own loop is made by
`asyncio.Runner` on its own thread (`inline_server.py`).
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from types import ModuleType

_INSTEAD = "use `await ...` in the cell instead of asyncio.run(...)"


def allow_nested_asyncio() -> str:
    """Let cells of this kernel call `asyncio.run` and `loop.run_until_complete`.

    Patches the running loop of the calling thread with nest_asyncio2 or, if that is not installed,
    nest_asyncio. Only a restart of the kernel undoes it. Idempotent.

    Returns:
        What was done, in a sentence.

    Raises:
        RuntimeError: It cannot be done here; the text says why and what to do instead.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return "no event loop is running in this thread, so asyncio.run works as it is: nothing was changed"
    if hasattr(asyncio, "_nest_patched"):
        return "nested event loops were allowed already: nothing was changed"
    if not isinstance(loop, asyncio.BaseEventLoop):
        raise RuntimeError(f"{type(loop).__module__} loops cannot be nested; {_INSTEAD}")
    nest = _find()
    nest.apply(loop)
    return f"nested event loops are allowed in this kernel now ({nest.__name__})"


def _find() -> ModuleType:
    names = ["nest_asyncio2"]
    if sys.version_info < (3, 14):  # the older package has no release for it
        names.append("nest_asyncio")
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise RuntimeError(
        f"neither {' nor '.join(names)} is installed; {_INSTEAD}, or pip install nest-asyncio2"
    )
