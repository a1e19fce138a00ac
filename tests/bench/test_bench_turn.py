"""The turn suite in its tiny form: every line runs, the figures that are no times hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.harness import Report
from tests.bench.suites import turn


@pytest.mark.slow
def test_the_turn_suite_runs(model_dir: Path) -> None:
    report = Report("turn", {})
    turn.run(report, quick=True)
    rows = {row.name: row.value for row in report.rows}
    assert rows["overhead_ms_p50"] > 0
    assert 0 < rows["upload_share_before_prefill_end"] <= 1
    assert 0 < rows["wire_vs_fp16"] <= 0.55  # bytes, not time
    assert rows["edge_blocks_reused_second_turn"] > 0.5
    for shape in ("ship", "text", "edge", "auto"):
        assert rows[f"tokens_per_s_{shape}"] > 0
