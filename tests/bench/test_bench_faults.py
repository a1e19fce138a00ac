"""The fault suite in its quick form: every line runs, what is no time holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from segue.local.parts import Program
from tests.bench.harness import Report
from tests.bench.suites import faults
from tests.bench.suites._fault_house import Kind
from tests.bench.suites._fault_round import Fault, Sample, Strike
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
    reader = Reader(arrivals=[0.0, 5.0, 6.0, 8.0, 8.5], over=True)
    assert reader.pause_s(since=5.5, until=20.0) == 2.0
    assert reader.pause_s(since=5.5, until=7.0) == 1.0
    reader.broken = "no end"
    assert reader.pause_s(since=5.5, until=20.0) == 11.5
    reader.over, reader.broken = False, ""
    assert reader.pause_s(since=5.5, until=20.0) == 11.5


def test_another_owner_is_known_by_its_number() -> None:
    reader = Reader(arrivals=[1.0, 2.0, 3.0], epochs=[1, 1, 2], over=True)
    assert reader.taken_over(since=2.5, until=4.0)
    assert not reader.taken_over(since=1.5, until=2.5)
    assert not reader.taken_over(since=3.5, until=9.0)


def test_a_lag_is_from_the_log_to_the_follower() -> None:
    follower = Follower(seen=[(1.0, 3), (4.0, 9)])
    assert follower.lag_s([(0.5, 3), (1.5, 4), (3.9, 9)], since=1.0) == 2.5
    assert follower.lag_s([(0.5, 3), (1.5, 4), (3.9, 9)], since=3.0) == pytest.approx(0.1)
    assert follower.lag_s([(0.5, 3)], since=1.0) == 0.0


def test_who_was_struck_with_a_cloud_is_counted_never_guessed_low() -> None:
    """The cloud owned three of four replies; one shows it, one was connected to it."""

    def reader(arrivals: list[float], epochs: list[int]) -> Reader:
        return Reader(arrivals=arrivals, epochs=epochs, over=True)

    taken = reader([1.0, 3.0], [1, 2])
    connected = reader([1.0, 1.5], [1, 1])
    slow, quick = reader([1.0, 9.0], [1, 1]), reader([1.0, 2.0], [1, 1])
    readers = [quick, slow, connected, taken]
    cloud = Program("cloud", [], log=Path("/none"))
    strike = Strike(Kind("silent", "cloud"), cloud, 1.2, readers, owned=3, served=[connected])
    assert strike.hit(until=10.0) == [connected, taken, slow]


@pytest.mark.parametrize("text", ["0", "many", "-1"])
def test_numbers_are_checked(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("SEGUE_BENCH_FAULTS", text)
    with pytest.raises(ValueError, match="SEGUE_BENCH_FAULTS"):
        faults.number_from("SEGUE_BENCH_FAULTS", 5, 1)
    monkeypatch.setenv("SEGUE_BENCH_FAULTS", "7")
    assert faults.number_from("SEGUE_BENCH_FAULTS", 5, 1) == 7


def test_what_was_seen_is_shown_where_a_run_is_cut_off() -> None:
    seen = faults.Seen(replies=4, seconds=60.0)
    seen.faults.append(
        Fault("silent_cloud", 1, [Sample("ship", 1.5, True, ""), Sample("text", 2.5, True, "")])
    )
    report = Report("faults", {})
    faults.rows(report, faults.KINDS, seen)
    found = {row.name: row for row in report.rows}
    assert found["silent_cloud_pause_ms_p99"].value == 2500
    assert found["silent_cloud_pause_ms_p99"].met is False
    assert "1 faults, 2 samples" in found["silent_cloud_pause_ms_p99"].note
    assert found["faults"].value == 1
    assert {one["rows"] for one in report.left_out} > {"killed_edge_*"}
