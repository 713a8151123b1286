"""How much memory a device has free for the caches of texts that are being generated.

Of a CPU: what the kernel says is available, within the memory limits of the control groups of this process.
Of an accelerator: what its driver says is free.

Not here: freeing memory after a failed step (`memory.py`).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from serving_kit.cpus import ReadText, control_groups, read_text

if TYPE_CHECKING:
    import torch


def free_bytes(device: torch.device) -> int | None:
    """Bytes that are free on a device; None: it does not say."""
    import torch

    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    if device.type == "cpu":
        return free_of_cpu(read_text)
    return None


def free_of_cpu(read: ReadText) -> int | None:
    """Bytes of memory that this process may still take; None: it cannot be found out.

    Args:
        read: Gives the text of a file by its absolute path, or None: `/proc/meminfo`, `/proc/self/cgroup`,
            and `memory.max`, `memory.current` and `memory.stat` of every group on the way from the process's
            own to the root. Pages of files count as free: the kernel takes them back.
    """
    free = [each for each in (_available(read), *_left_in_groups(read)) if each is not None]
    if free:
        return max(0, min(free))
    try:  # not Linux: half of what there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError, AttributeError):
        return None


def _available(read: ReadText) -> int | None:
    for line in (read("/proc/meminfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return _number(value.split()[0], times=1024)
    return None


def _left_in_groups(read: ReadText) -> list[int]:
    left = []
    for group in control_groups(read):
        most, used = _number(read(f"{group}/memory.max")), _number(read(f"{group}/memory.current"))
        if most is not None and used is not None:
            left.append(most - used + _of_files(read(f"{group}/memory.stat") or ""))
    return left


def _of_files(stat: str) -> int:
    """Bytes of the pages of files in a group, from its `memory.stat`."""
    words = [line.split() for line in stat.splitlines()]
    values = {each[0]: _number(each[1]) or 0 for each in words if len(each) == 2}
    return values.get("active_file", 0) + values.get("inactive_file", 0)


def _number(text: str | None, times: int = 1) -> int | None:
    """A number of bytes. `max` stands for no limit."""
    try:
        return int(text or "") * times
    except ValueError:
        return None
