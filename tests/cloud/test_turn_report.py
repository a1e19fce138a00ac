"""The plan report in the log: the edge's view, brought up to the turn's end by the owner."""

from __future__ import annotations

import pytest

from segue_cloud.turns.report import TurnTimes, final_report, read_note
from segue_contract.errors import InvalidArgument
from segue_contract.plan import Cost, PlanReport, encode_plan

FORESEEN = {"ship": Cost(ttft_s=0.1, total_s=1.0), "text": Cost(ttft_s=0.3, total_s=0.5)}


def test_a_turn_that_no_edge_planned() -> None:
    times = TurnTimes(began=10.0, first_token=10.5, second_token=10.6, ended=12.0)
    report = final_report(None, times, prompt_tokens=130, cached_tokens=64, why="no edge")
    assert report.actual is not None
    assert report.actual.ttft_s == pytest.approx(0.5)
    assert report.actual.gap_s == pytest.approx(0.1)
    assert report.actual.total_s == pytest.approx(2.0)
    assert (report.shape, report.first_token_by, report.reason) == ("text", "cloud", "no edge")
    assert (report.prompt_blocks, report.cloud_cached_blocks) == (2, 1)


def test_a_note_from_before_the_first_token_is_completed_by_the_cloud() -> None:
    early = PlanReport(shape="text", predicted=FORESEEN, actual=Cost(ttft_s=0.2, total_s=0.2))
    times = TurnTimes(began=9.9, first_token=10.3, second_token=10.4, ended=11.0)
    report = final_report(
        read_note(encode_plan(early), 10.0), times, prompt_tokens=70, cached_tokens=64, why=""
    )
    assert report.actual is not None
    assert report.actual.ttft_s == pytest.approx(0.5)  # 0.2 s old when it came, 0.3 s later
    assert report.actual.total_s == pytest.approx(1.2)
    assert report.first_token_by == "cloud"
    assert report.cloud_cached_blocks == 1
    assert report.regret_s == pytest.approx(0.2)  # against ship's 1.0


def test_what_the_edge_saw_itself_stands() -> None:
    seen = PlanReport(
        shape="ship",
        predicted=FORESEEN,
        first_token_by="edge",
        actual=Cost(ttft_s=0.1, total_s=0.15),
    )
    times = TurnTimes(began=9.9, first_token=10.0, second_token=10.4, ended=11.0)
    report = final_report(
        read_note(encode_plan(seen), 10.0), times, prompt_tokens=70, cached_tokens=0, why=""
    )
    assert report.actual is not None
    assert report.actual.ttft_s == pytest.approx(0.1)
    assert report.actual.gap_s == pytest.approx(0.45)
    assert report.actual.total_s == pytest.approx(1.15)
    assert report.regret_s == pytest.approx(0.65)  # against text's 0.5


def test_blocks_that_were_shipped_for_this_turn_are_not_reused_ones() -> None:
    shipped = PlanReport(shape="ship", predicted=FORESEEN, shipped_blocks=3)
    times = TurnTimes(began=9.9, first_token=10.0, second_token=10.4, ended=11.0)
    came = read_note(encode_plan(shipped), 10.0)
    fresh = final_report(came, times, prompt_tokens=400, cached_tokens=192, why="")
    assert fresh.cloud_cached_blocks == 0
    later = final_report(came, times, prompt_tokens=400, cached_tokens=320, why="")
    assert later.cloud_cached_blocks == 2


@pytest.mark.parametrize("data", [b"", b"no report", encode_plan(PlanReport(shape="teleport"))])
def test_bytes_that_are_no_report(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        read_note(data, 0.0)
