"""How much memory is free, from the texts of the kernel's files."""

from __future__ import annotations

import pytest

from serving_kit.models.free_memory import free_of_cpu

pytestmark = pytest.mark.light

GIB = 2**30
MEMINFO = {"/proc/meminfo": f"MemTotal: 999 kB\nMemAvailable:   {8 * GIB // 1024} kB\nSwapFree: 0 kB\n"}
GROUP = {"/proc/self/cgroup": "0::/a\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        (MEMINFO, 8 * GIB),
        ({**MEMINFO, **GROUP, "/sys/fs/cgroup/a/memory.max": "max"}, 8 * GIB),
        (
            {
                **MEMINFO,
                **GROUP,
                "/sys/fs/cgroup/a/memory.max": f"{3 * GIB}\n",
                "/sys/fs/cgroup/a/memory.current": f"{GIB}\n",
            },
            2 * GIB,
        ),
        (
            {
                **MEMINFO,
                **GROUP,
                "/sys/fs/cgroup/memory.max": f"{GIB}\n",
                "/sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
            },
            0,
        ),
        (
            {  # the pages of files that were read can be taken back
                **MEMINFO,
                **GROUP,
                "/sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
                "/sys/fs/cgroup/a/memory.current": f"{4 * GIB}\n",
                "/sys/fs/cgroup/a/memory.stat": f"anon 5\nactive_file {GIB}\ninactive_file {2 * GIB}\n",
            },
            3 * GIB,
        ),
        ({**MEMINFO, **GROUP, "/sys/fs/cgroup/a/memory.max": "nonsense"}, 8 * GIB),
    ],
)
def test_free_memory(files: dict[str, str], free: int) -> None:
    """What the kernel has available, and what the strictest control group leaves."""
    assert free_of_cpu(files.get) == free


def test_other_systems() -> None:
    found = free_of_cpu({}.get)
    assert found is None or found > 0
