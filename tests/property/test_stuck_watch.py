"""A step is stuck when every look finds the same one, and never otherwise."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from segue_cloud.engine.stuck import LOOKS, StuckWatch

RUNS = st.lists(st.tuples(st.sampled_from([0.0, 1.0, 2.0]), st.integers(1, LOOKS + 4)), max_size=8)


@given(RUNS)
def test_only_one_step_at_many_looks_in_a_row_is_stuck(runs: list[tuple[float, int]]) -> None:
    watch = StuckWatch()
    steps = [step for step, count in runs for _ in range(count)]
    for end, step in enumerate(steps, 1):
        last = steps[max(0, end - LOOKS - 1) : end]
        expected = step != 0.0 and len(last) == LOOKS + 1 and set(last) == {step}
        assert watch.look(step) == expected


def test_a_step_that_hangs_is_found_and_one_that_ended_is_forgotten() -> None:
    watch = StuckWatch()
    assert [watch.look(7.0) for _ in range(LOOKS + 1)] == [False] * LOOKS + [True]
    assert not watch.look(0.0)
    assert not any(watch.look(7.0) for _ in range(LOOKS))
