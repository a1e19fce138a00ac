"""The suite of sessions in its quick form: every line runs, what is no time holds."""

from __future__ import annotations

import pytest

from tests.bench.harness import Report
from tests.bench.suites import sessions
from tests.support.servers import require_valkey


@pytest.mark.slow
@pytest.mark.usefixtures("model_dir")
def test_the_sessions_suite_runs() -> None:
    require_valkey()
    report = Report("sessions", {})
    sessions.run(report, quick=True)
    rows = {row.name: row.value for row in report.rows}
    assert rows["session_ops"] >= sessions.QUICK_OPS
    assert rows["missing_ops"] == rows["doubled_ops"] == 0
    assert rows["acknowledged_ops"] > 0
