"""Whole systems under faults, by seed: `scripts/sim` runs as many as you like."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.sim_child import environment

SEEDS = 200
_TIMEOUT_S = 600  # on a machine that does ten other things; alone half a minute


@pytest.mark.timeout(_TIMEOUT_S)
def test_every_invariant_holds_and_each_seed_runs_alike_twice() -> None:
    """In a process of its own: hashing of strings must not depend on how pytest was started."""
    command = [sys.executable, "-m", "tests.sim.cli", "--seeds", str(SEEDS)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S - 40,
        env=environment(),
        check=False,
    )
    if done.returncode:
        pytest.fail(f"scripts/sim --seeds {SEEDS}\n{done.stdout[-20_000:]}{done.stderr[-4000:]}")
    assert f"{SEEDS} seeds, 0 failed" in done.stdout
