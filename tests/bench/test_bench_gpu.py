"""The gpu suite: without a card it says so and ends well, and its code runs all the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bench.harness import ROOT, Report
from tests.bench.suites._card_plan import FULL, roof_prefill_s, roof_step_s
from tests.bench.suites.gpu import Decoded, run

NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card: it is measured")


@NO_CARD
def test_without_a_card_it_says_so_and_ends_well() -> None:
    report = Report("gpu", {})
    run(report, quick=False)
    assert report.rows == []
    assert [one["rows"] for one in report.left_out] == ["the 8B shape"]


def test_its_smallest_form_fills_every_row(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "bench", "gpu", "--quick", "--json", file],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row["value"] for row in json.loads(file.read_text())["rows"]}
    batches = [name.rpartition("_")[2] for name in rows if name.startswith("gpu_vs_hf_")]
    assert len(batches) == 2
    for batch in batches:
        for name in (
            "gpu_decode_tokens_per_s_",
            "gpu_decode_of_roof_",
            "gpu_intertoken_ms_p99_",
            "hf_decode_tokens_per_s_",
        ):
            assert rows[name + batch] > 0
    assert 0 < rows["gpu_replayed_share"] < 1
    if not torch.cuda.is_available():
        assert "no CUDA card" in done.stdout


def test_the_roof_of_a_known_card() -> None:
    """8B in bfloat16 at 2.0 TB/s and batch 1: about 125 tokens/s, less what the KV costs; at 100
    TFLOP/s 1,024 tokens take some 0.14 s, and attention makes four times that longer."""
    roof = 1 / roof_step_s(FULL, 1, 2.0e12)
    assert 120 < roof < 135
    assert 20 * roof < 32 / roof_step_s(FULL, 32, 2.0e12) < 32 * roof
    short = roof_prefill_s(FULL, 1024, 1e14)
    assert 0.14 < short < 0.15
    assert 4 * short < roof_prefill_s(FULL, 4096, 1e14) < 4.5 * short


def test_gaps_between_tokens_have_percentiles() -> None:
    found = Decoded(1.0, [0.001] * 95 + [0.010] * 5)
    assert found.gap_ms(50) == pytest.approx(1.0)
    assert found.gap_ms(99) == pytest.approx(10.0)
    assert Decoded(1.0, [0.002]).gap_ms(99) == pytest.approx(2.0)
