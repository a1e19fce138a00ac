"""Benchmarks cannot rot: the harness keeps its form, and the codec suite runs in its tiny form."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.harness import ROOT, Report, median_of, number, suite_names
from tests.bench.suites._codec_ladder import Rung, pays_below_mbit_s

MEASURED = ("wire_vs_fp16", "encode_mb_per_s", "decode_mb_per_s")


def test_scripts_bench_runs_a_suite_and_writes_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "codec.json"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench", "codec", "--quick", "--json", file],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert written["suite"] == "codec"
    assert {"cpu", "cores", "memory_gib", "python", "load_at_start"} <= set(written["machine"])
    rows = {row["name"]: row for row in written["rows"]}
    for name in MEASURED:
        assert name in done.stdout
        assert rows[name]["value"] > 0
        assert "target" in rows[name]
    assert rows["wire_vs_fp16"]["value"] <= 0.55  # bytes, not time
    for step in ("k8v8", "k8v4", "k4v4"):
        assert rows[f"{step}_pays_below"]["value"] >= 0
        assert f"{step}_bytes_per_token" in rows
    for codec in ("k8v4-sink4", "k4v4-sink4"):
        assert f"{codec}_pays_below" in rows
    assert "The ladder" in done.stdout


def test_the_link_speed_below_which_a_step_pays() -> None:
    before = Rung("a", 1000, encode_s=0.001, decode_s=0.001)
    step = Rung("b", 500, encode_s=0.002, decode_s=0.002)
    limit = pays_below_mbit_s(step, before)
    assert limit == pytest.approx(8 * 64 * 500 / 0.002 / 1e6)

    def whole(rung: Rung, mbit_s: float) -> float:
        return rung.encode_s + rung.decode_s + 8 * 64 * rung.bytes_per_token / (mbit_s * 1e6)

    assert whole(step, 0.9 * limit) < whole(before, 0.9 * limit)
    assert whole(step, 1.1 * limit) > whole(before, 1.1 * limit)
    assert pays_below_mbit_s(Rung("c", 500, 0.001, 0.001), before) == math.inf
    assert pays_below_mbit_s(Rung("d", 1000, 0.0005, 0.001), before) == 0


def test_an_unknown_suite_is_refused_with_those_that_exist() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench", "nothing"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "codec" in done.stderr
    assert "codec" in suite_names()


def test_a_row_is_a_finite_number_with_a_name_of_its_own() -> None:
    report = Report("s", {})
    seen: list[str] = []
    report.on_row = lambda row: seen.append(row.name)
    report.row("fast", 5, "MB/s", 4)
    report.row("late", 5, "ms", 4, "lower")
    assert [row.met for row in report.rows] == [True, False]
    assert seen == ["fast", "late"]
    with pytest.raises(ValueError, match="number"):
        report.row("bad", math.nan, "s")
    with pytest.raises(ValueError, match="two rows"):
        report.row("fast", 1, "s")
    assert [row["name"] for row in report.as_json()["rows"]] == ["fast", "late"]


def test_median_counts_no_warmup() -> None:
    calls: list[int] = []
    assert median_of(lambda: calls.append(1), repeats=5, warmup=2) >= 0
    assert len(calls) == 7


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.51571, "0.5157"), (1234.56, "1,235"), (23.456, "23.46"), (1e-5, "0.00001"),
     (2, "2"), (-1500, "-1,500")],
)  # fmt: skip
def test_numbers_read_calmly(value: float, text: str) -> None:
    assert number(value) == text
