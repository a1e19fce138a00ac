"""A fault planted in the product is found: the invariants see what they are there for."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.sim.mutations import MUTATIONS
from tests.support.sim_child import environment


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_fault_is_found(name: str) -> None:
    command = [sys.executable, "-m", "tests.sim.mutations", name]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=560, env=environment(), check=False
    )
    print(done.stdout, done.stderr[-2000:])
    assert done.returncode == 0
    assert "found by seed" in done.stdout
