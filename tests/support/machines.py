"""Another machine: a network namespace, reached over a link of its own. Linux, as root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Machine:
    """`address`: its own; `ours`: by which it reaches this one."""

    namespace: str
    address: str
    ours: str

    def command(self, command: list[str]) -> list[str]:
        """`command`, to be run there."""
        program = shutil.which("ip")
        assert program is not None
        return [program, "netns", "exec", self.namespace, *command]


@contextmanager
def other_machine() -> Iterator[Machine]:
    """Skips the test where this one may make none."""
    number = os.getpid() % 60_000
    network = f"10.213.{number % 250}"
    namespace, here, there = f"segue-{number}", f"sg{number}a", f"sg{number}b"
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("only root makes network namespaces")
    made = _ip("netns", "add", namespace)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        for args in (
            ("link", "add", here, "type", "veth", "peer", "name", there, "netns", namespace),
            ("addr", "add", f"{network}.1/24", "dev", here),
            ("link", "set", here, "up"),
            ("-n", namespace, "addr", "add", f"{network}.2/24", "dev", there),
            ("-n", namespace, "link", "set", there, "up"),
            ("-n", namespace, "link", "set", "lo", "up"),
        ):
            done = _ip(*args)
            if done.returncode:
                pytest.skip(f"no link between two network namespaces here: {done.stderr.strip()}")
        yield Machine(namespace, f"{network}.2", f"{network}.1")
    finally:
        _ip("netns", "del", namespace)
        _ip("link", "del", here)


def _ip(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *args], capture_output=True, text=True, timeout=20, check=False)
