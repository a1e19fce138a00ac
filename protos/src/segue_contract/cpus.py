"""How many cores this process may use: its affinity mask, and the quotas of its cgroups.

https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max) and
https://docs.kernel.org/scheduler/sched-bwc.html (cpu.cfs_quota_us, cgroup v1)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_CGROUPS = "sys/fs/cgroup"


def available_cpus(root: Path = Path("/")) -> int:
    """Cores of the affinity mask, and no more than the tightest quota is worth; at least one.

    More threads than that wait for each other, and under a quota they all stand still for the rest
    of its period.

    Args:
        root: where `proc` and `sys` are.
    """
    if hasattr(os, "sched_getaffinity"):  # not on every system
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min([cores, *_quotas(root)])


def _quotas(root: Path) -> Iterator[int]:
    """What the quotas of this process's groups, and of those around them, are worth in cores."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            mounts, quota = [root / _CGROUPS, root / _CGROUPS / "unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            mounts = [root / _CGROUPS / name for name in dict.fromkeys((controllers, "cpu"))]
            quota = _quota_v1
        else:
            continue
        for mount in mounts:
            for folder in _with_parents(mount, group):
                if cores := quota(folder):
                    yield cores


def _with_parents(mount: Path, group: str) -> Iterator[Path]:
    """The folders of a group and of all groups around it, as far as they can be seen: a container
    sees its own group as the mount, under whatever name the host has for it."""
    parts = [part for part in PurePosixPath(group).parts if part not in ("/", "..")]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count])


def _quota_v2(folder: Path) -> int:
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    return _cores(quota, period)


def _quota_v1(folder: Path) -> int:
    quota = _read(folder / "cpu.cfs_quota_us").strip()
    return _cores(quota, _read(folder / "cpu.cfs_period_us").strip())


def _cores(quota: str, period: str) -> int:
    """Cores that `quota` of each `period` (microseconds) is worth, rounded up; 0: no limit."""
    if not (quota.isdigit() and period.isdigit() and int(period)):
        return 0
    return max(1, -(-int(quota) // int(period)))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
