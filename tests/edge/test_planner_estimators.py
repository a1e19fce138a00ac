"""Estimates: priors, medians, and samples that must not mislead."""

from __future__ import annotations

import msgspec
import pytest

from segue_contract.plan import Cost, PlanReport, with_actual
from segue_edge.planner.estimators import Estimate, Goodput, ReplyLength, RoundTrip
from segue_edge.planner.ledger import ledger_line


def test_a_prior_stands_in_until_something_was_seen() -> None:
    estimate = Estimate(10.0)
    assert (estimate.value, estimate.confidence) == (10.0, 0.0)
    estimate.observe(2.0)
    assert estimate.value == 2.0
    assert 0 < estimate.confidence < 1


def test_one_outlier_does_not_move_the_median() -> None:
    estimate = Estimate(10.0)
    for value in (2.0, 2.1, 1.9, 500.0, 2.0):
        estimate.observe(value)
    assert estimate.value == 2.0


def test_the_window_forgets() -> None:
    estimate = Estimate(1.0, window=4)
    for value in (1.0,) * 10 + (9.0,) * 4:
        estimate.observe(value)
    assert estimate.value == 9.0


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_measurement_is_left_out(value: float) -> None:
    estimate = Estimate(3.0)
    estimate.observe(value)
    assert estimate.confidence == 0.0


def test_the_round_trip_is_the_least_sample() -> None:
    rtt = RoundTrip()
    for value in (0.004, 0.001, 2.0):
        rtt.observe(value)
    assert rtt.value == 0.001


def test_a_stream_that_waited_for_the_prefill_never_lowers_goodput() -> None:
    goodput = Goodput(100e6)
    goodput.observe(10_000_000, 1.0, app_limited=True)
    assert goodput.bytes_per_s == 100e6
    goodput.observe(300_000_000, 1.0, app_limited=True)
    assert goodput.bytes_per_s == 300e6
    goodput.observe(50_000_000, 1.0, app_limited=False)
    assert goodput.bytes_per_s == 175e6


def test_a_few_bytes_say_nothing_of_goodput() -> None:
    goodput = Goodput(100e6)
    goodput.observe(1000, 0.0001, app_limited=False)
    assert goodput.confidence == 0.0


def test_a_reply_is_never_expected_beyond_what_was_allowed() -> None:
    reply = ReplyLength()
    assert reply.expect(10) == 10
    for _ in range(40):
        reply.observe(50)
    assert reply.expect(1000) == pytest.approx(50, abs=1)


def _report() -> PlanReport:
    foreseen = {
        "ship": Cost(ttft_s=0.1, total_s=1.0),
        "text": Cost(ttft_s=0.3, total_s=0.9),
        "edge": Cost(ttft_s=0.1, total_s=0.2),
    }
    return PlanReport(shape="ship", predicted=foreseen)


def test_regret_is_against_the_best_other_shape_that_was_possible() -> None:
    actual = Cost(ttft_s=0.1, total_s=1.5)
    assert with_actual(_report(), actual).regret_s == pytest.approx(1.3)
    without_edge = msgspec.structs.replace(_report(), missing={"edge": "it does not decode"})
    without_edge = with_actual(without_edge, actual)
    assert without_edge.regret_s == pytest.approx(0.6)


def test_no_regret_where_nothing_was_better() -> None:
    actual = Cost(ttft_s=0.1, total_s=0.15)
    assert with_actual(_report(), actual).regret_s == 0.0


def test_a_ledger_line_is_one_json_object() -> None:
    line = ledger_line(_report(), turn="t1", seconds=0.12345678)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    entry = msgspec.json.decode(line)
    assert entry["turn"] == "t1"
    assert entry["seconds"] == 0.123457
    assert entry["predicted"]["text"]["ttft_s"] == 0.3
