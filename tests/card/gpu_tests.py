"""`tests/gpu` by pytest: how many passed, and why the others did not."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from tests.bench.harness import ROOT, Report

_REASON = 600


def run(report: Report, quick: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        what = "tests/gpu/test_engine_cuda.py" if quick else "tests/gpu"
        command = [sys.executable, "-m", "pytest", "-q", what, f"--junitxml={file}"]
        command += ["-p", "no:cacheprovider"]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if not file.is_file():
            raise RuntimeError(f"pytest wrote no results (exit code {code})")
        read_results(report, file.read_text())


def read_results(report: Report, junit: str) -> None:
    """Rows of how many tests ended how; names and reasons of the others to the details."""
    ended: dict[str, list[dict[str, str]]] = {"passed": [], "failed": [], "skipped": []}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name = f"{case.get('classname', '')}.{case.get('name', '')}"
        state, reason = "passed", ""
        for kind, means in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            found = case.find(kind)
            if found is not None:
                state = means
                reason = found.get("message", "") or (found.text or "")[-_REASON:]
        ended[state].append({"test": name, "reason": reason[:_REASON]})
    report.row("gpu_tests_passed", len(ended["passed"]), "tests")
    report.row("gpu_tests_skipped", len(ended["skipped"]), "tests", note="reasons in the JSON")
    report.row("gpu_tests_failed", len(ended["failed"]), "tests", 0, "lower")
    for state in ("failed", "skipped"):
        if ended[state]:
            report.details[state] = ended[state]
