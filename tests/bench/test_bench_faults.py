"""The fault suite in its quick form: every line runs, what is no time holds."""

from __future__ import annotations

import pytest

from tests.bench.harness import Report
from tests.bench.suites import faults
from tests.bench.suites._fault_turn import Follower, Reader
from tests.support.servers import require_broker, require_valkey


@pytest.mark.slow
@pytest.mark.usefixtures("model_dir")
def test_the_fault_suite_runs() -> None:
    require_valkey()
    require_broker()
    report = Report("faults", {})
    faults.run(report, quick=True)
    rows = {row.name: row.value for row in report.rows}
    assert rows["faults"] == len(faults.QUICK)
    assert rows["lost_ops"] == rows["doubled_ops"] == 0
    assert rows["killed_cloud_pause_ms_p99"] > 0
    assert rows["broker_hang_lag_ms_p99"] >= 0
    assert rows["store_default_kill_lost_ops"] == faults.QUICK_APPENDS
    assert rows["store_aof_always_kill_lost_ops"] == 0


def test_a_pause_counts_from_the_fault_on() -> None:
    reader = Reader(arrivals=[0.0, 5.0, 6.0, 8.0, 8.5])
    assert reader.pause_s(since=5.5, until=20.0) == 2.0
    reader.broken = "no end"
    assert reader.pause_s(since=5.5, until=20.0) == 11.5


def test_a_lag_is_from_the_log_to_the_follower() -> None:
    follower = Follower(seen=[(1.0, 3), (4.0, 9)])
    assert follower.lag_s([(0.5, 3), (1.5, 4), (3.9, 9)], since=1.0) == 2.5
    assert follower.lag_s([(0.5, 3)], since=1.0) == 0.0


def test_the_number_of_faults_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_BENCH_FAULTS", "0")
    with pytest.raises(ValueError, match="SEGUE_BENCH_FAULTS"):
        faults.faults_per_kind()
