"""How many CPUs this process may use: its affinity and the quota of its control group.

`os.cpu_count()` counts the host's. A container with a quota of two on a host of 64 that starts 64 threads
is stopped by the kernel for most of every period.

Not here: telling torch (`models/loading.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

_ROOT = "/sys/fs/cgroup"
ReadText = Callable[[str], str | None]  # the text of a file; None if it cannot be read


def allowed_cpus() -> int:
    """CPUs that this process may keep busy: at least 1, a quota's fraction rounded up. Any thread."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        count = os.cpu_count() or 1
    quota = cpu_quota(read_text)
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def cpu_quota(read: ReadText) -> float | None:
    """CPUs that the control groups of this process allow; None: no limit, or none that can be read.

    Args:
        read: Gives the text of a file by its absolute path, or None. All that this function knows comes
            from it: `/proc/self/cgroup`, and `cpu.max` (version 2) or `cpu.cfs_quota_us` and
            `cpu.cfs_period_us` (version 1) of every group on the way from the process's own to the root.
    """
    quotas = [_ratio(*words[:2]) for each in control_groups(read) if (words := _words(read, each))]
    for line in (read("/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "cpu" in controllers.split(","):
            for root in (f"{_ROOT}/{controllers}", f"{_ROOT}/cpu"):
                for group in _groups(root, path):
                    quota, period = read(f"{group}/cpu.cfs_quota_us"), read(f"{group}/cpu.cfs_period_us")
                    if quota and period:
                        quotas.append(_ratio(quota, period))
    return min((each for each in quotas if each is not None), default=None)


def control_groups(read: ReadText) -> Iterator[str]:
    """The folders of the control groups (version 2) of this process, from its own up to the root.

    Args:
        read: Gives the text of `/proc/self/cgroup`.
    """
    for line in (read("/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            yield from _groups(_ROOT, path)


def _groups(root: str, path: str) -> Iterator[str]:
    """The folders from a group's own up to the root. In a container the own one may not be visible."""
    relative = PurePosixPath(path).relative_to("/") if path.startswith("/") else PurePosixPath(path)
    for folder in (relative, *relative.parents):
        yield str(PurePosixPath(root) / folder)


def _words(read: ReadText, group: str) -> list[str]:
    words = (read(f"{group}/cpu.max") or "").split()
    return words if len(words) > 1 else []


def _ratio(quota: str, period: str) -> float | None:
    """Quota over period, both in microseconds. `max` and -1 stand for no limit."""
    try:
        allowed, of = int(quota), int(period)
    except ValueError:
        return None
    return allowed / of if allowed > 0 and of > 0 else None


def read_text(path: str) -> str | None:
    """The text of a file; None: it cannot be read."""
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
