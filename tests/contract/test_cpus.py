"""Cores that a process may use: the affinity mask and the quotas of its cgroups, v1 and v2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from segue_contract.cpus import available_cpus

MANY = 16


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(MANY)), raising=False)


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("cgroup", "files", "cores"),
    [
        ("", {}, MANY),
        ("0::/\n", {f"{V2}/cpu.max": "max 100000\n"}, MANY),
        ("0::/\n", {f"{V2}/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {f"{V2}/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {f"{V2}/cpu.max": "9900000 100000\n"}, MANY),
        ("0::/\n", {f"{V2}/cpu.max": "garbage"}, MANY),
        ("0::/a/b\n", {f"{V2}/a/b/cpu.max": "400000 100000\n"}, 4),
        (
            "0::/a/b\n",
            {f"{V2}/a/b/cpu.max": "400000 100000\n", f"{V2}/a/cpu.max": "300000 100000\n"},
            3,
        ),
        ("0::/../host/name\n", {f"{V2}/cpu.max": "200000 100000\n"}, 2),
        ("1:name=systemd:/\n0::/\n", {"sys/fs/cgroup/unified/cpu.max": "200000 100000"}, 2),
        (
            "4:cpu,cpuacct:/pod/one\n",
            {f"{V1}/pod/one/cpu.cfs_quota_us": "250000\n"}
            | {f"{V1}/pod/one/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        (
            "4:cpu,cpuacct:/pod/one\n",
            {f"{V1}/cpu.cfs_quota_us": "100000\n", f"{V1}/cpu.cfs_period_us": "100000\n"},
            1,
        ),
        (
            "4:cpu:/\n",
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            MANY,
        ),
        ("9:cpuset:/\n", {"sys/fs/cgroup/cpuset/cpu.cfs_quota_us": "1000"}, MANY),
    ],
)
def test_the_tightest_quota_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], cores: int
) -> None:
    assert available_cpus(machine(tmp_path, cgroup, files)) == cores


def test_a_mask_below_the_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    root = machine(tmp_path, "0::/\n", {f"{V2}/cpu.max": "200000 100000\n"})
    assert available_cpus(root) == 1


def test_on_this_machine_there_is_at_least_one() -> None:
    assert 1 <= available_cpus() <= MANY
