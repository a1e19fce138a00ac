"""One process a step, so that a step that hangs, dies or leaves the card in disorder ends alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.harness import ROOT, Row
from tests.card.plan import Step, limit_of

_LAST_LINES, _LINE = 30, 300
_STOP_S = 3.0

Command = Callable[[Step, Path, bool], list[str]]


@dataclass(frozen=True)
class Outcome:
    """What became of a step. `state`: "ok" | "failed" | "stopped" (at its limit) | "left out".

    `found`: what the step wrote: its rows, what it left out, its details.
    """

    step: Step
    state: str
    seconds: float = 0.0
    reason: str = ""
    last_lines: list[str] = field(default_factory=list)
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        names = ("name", "value", "unit", "target", "better", "note")
        rows = self.found.get("rows", [])
        return [Row(**{name: row[name] for name in names if name in row}) for row in rows]

    def as_json(self) -> dict[str, Any]:
        own: dict[str, Any] = {"step": self.step.name, "state": self.state}
        own["seconds"] = round(self.seconds, 1)
        if self.state != "ok":
            own |= {"reason": self.reason, "last_lines": self.last_lines}
        return own | dict(self.found)


def command_of(step: Step, file: Path, quick: bool) -> list[str]:
    """The process of a step, which writes its rows to `file` as they come."""
    found = [sys.executable, "-m", "tests.card.child", step.name, str(file)]
    return [*found, "--quick"] if quick else found


def run_steps(
    steps: Sequence[Step],
    folder: Path,
    quick: bool,
    environment: Callable[[Step], Mapping[str, str]],
    total_s: float,
    command: Command = command_of,
) -> Iterator[Outcome]:
    """Each step's outcome as it ends; `folder`/NAME.json has it by then."""
    began = time.monotonic()
    for step in steps:
        file = folder / f"{step.name}.json"
        file.unlink(missing_ok=True)
        limit_s = limit_of(step, time.monotonic() - began, total_s)
        if limit_s:
            outcome = _run(step, command(step, file, quick), file, environment(step), limit_s)
        else:
            outcome = Outcome(step, "left out", reason="the steps before it took all the time")
        write_json(file, outcome.as_json())
        yield outcome


def _run(
    step: Step, command: Sequence[str], file: Path, environment: Mapping[str, str], limit_s: float
) -> Outcome:
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
        seconds = time.monotonic() - began
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    last = [line[:_LINE] for line in lines if line.strip()][-_LAST_LINES:]
    found = _read(file)
    if code == 0:
        return Outcome(step, "ok", seconds, found=found)
    if code is None:
        reason = f"it was ended at its limit of {limit_s:.0f} s"
        return Outcome(step, "stopped", seconds, reason, last, found)
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    reason = f"{ended}: {last[-1] if last else 'it said nothing'}"
    return Outcome(step, "failed", seconds, reason, last, found)


def _end(child: subprocess.Popen[bytes]) -> None:
    """The process and all that it started; those that ended by themselves are gone already."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        if child.poll() is None:
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                continue
    child.wait()


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found


def write_json(path: Path, value: object) -> None:
    """In one step: readers see the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)
