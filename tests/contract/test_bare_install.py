"""The SDK and its command, in an empty environment: they bring nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = "numpy torch onnxruntime redis transformers structlog tokenizers"

PROGRAM = f"""
import importlib.util, sys
heavy = [name for name in {HEAVY!r}.split() if importlib.util.find_spec(name)]
assert not heavy, f"installed: {{heavy}}"
import segue, segue.testing, segue.tokens
import segue.client, segue.session, segue.turn, segue.follow
import segue_contract.sync.replica, segue_contract.transport.channel
assert segue.Client and segue.SegueError
"""


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=170,
        stdin=subprocess.DEVNULL,
        env=env,
        check=False,
    )


@pytest.mark.slow
def test_segue_in_an_empty_environment(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q"]
    installed = run(
        *pip, "--disable-pip-version-check", "-c", ROOT / "constraints.txt", f"{ROOT}[cli]"
    )
    assert installed.returncode == 0, installed.stderr
    imported = run(python, "-I", "-c", PROGRAM)
    assert imported.returncode == 0, imported.stderr

    helped = run(python, "-m", "segue", "--help")
    assert helped.returncode == 0, helped.stderr
    missing = run(python, "-m", "segue", "edge")
    assert missing.returncode == 1
    assert "pip install 'segue[edge]'" in missing.stderr
    assert "Traceback" not in missing.stderr
    doctor = run(python, "-m", "segue", "doctor", "-o", "json")
    assert doctor.returncode == 0, doctor.stderr
    assert "segue[embedded]" in doctor.stdout
