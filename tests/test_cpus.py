"""How many CPUs a process may use, from the texts of the control group files."""

from __future__ import annotations

import pytest

from serving_kit.cpus import allowed_cpus, cpu_quota

pytestmark = pytest.mark.light

V1 = "9:name=systemd:/\n4:cpu,cpuacct:/docker/abc\n3:cpuset:/\n0::/\n"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),  # no control groups: macOS
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"/proc/self/cgroup": "0::/\n"}, None),  # the root group of a host has no such file
        (
            {  # the strictest group on the way up counts
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/b/cpu.max": "400000 100000",
                "/sys/fs/cgroup/a/cpu.max": "200000 100000",
                "/sys/fs/cgroup/cpu.max": "max 100000",
            },
            2.0,
        ),
        (
            {
                "/proc/self/cgroup": V1,
                "/sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "300000\n",
                "/sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {  # inside a container its own group is mounted as the root
                "/proc/self/cgroup": V1,
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        ({"/proc/self/cgroup": V1, "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}, None),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "nonsense 0\n"}, None),
        ({"/proc/self/cgroup": "nonsense"}, None),
    ],
)
def test_cpu_quota(files: dict[str, str], quota: float | None) -> None:
    """Control groups of version 1 and 2."""
    assert cpu_quota(files.get) == quota


def test_allowed_cpus() -> None:
    assert allowed_cpus() >= 1
