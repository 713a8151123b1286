"""Memory that a step frees stays with the process, up to 32 MiB, for the next step.

By default glibc gives larger blocks back to the system at once, and asks for them again in the next step: the
kernel then clears every page of them anew, which is 4 to 8 % of a step from 400 tokens on.

The setting holds for the whole process, the notebook's own code included, and costs it up to 32 MiB for each
arena of glibc (the threads that allocate at the same time). The values before cannot be read, and glibc no
longer adapts them once they are set: its first values, 128 KiB, can be set again, but only a new process
adapts them again. Whoever has set them for the process (`MALLOC_TRIM_THRESHOLD_`, `MALLOC_MMAP_THRESHOLD_`,
`GLIBC_TUNABLES`) keeps them.

Not here: memory of a failed step (`memory.py`).
"""

from __future__ import annotations

import ctypes
import functools
import os

_KEPT = 32 * 2**20  # bytes; glibc takes no larger value for blocks
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # in malloc.h
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@functools.cache
def keep_freed_memory() -> bool:
    """Let the process keep what it frees; once. Returns whether it does: not without glibc."""
    if any(name in os.environ for name in _VARIABLES) or not _has_glibc():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _KEPT) and mallopt(_TRIM_THRESHOLD, _KEPT))


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):  # Windows; macOS and musl do not know the name
        return False
