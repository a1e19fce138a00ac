"""An edge that is told what it lacks knows the finished turns as the log has them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from segue_cloud.rpc.history import first_unknown, known_digest
from segue_contract.sync.state import TurnState
from segue_edge.turns.history import SessionHistory


@given(st.lists(st.sampled_from(["begin", "end first", "end last", "ask"]), max_size=40))
def test_in_whatever_order_turns_end_the_edge_knows_them_as_the_log_does(steps: list[str]) -> None:
    log: list[TurnState] = []
    history = SessionHistory()
    for step in [*steps, "ask"]:
        running = [turn for turn in log if not turn.ended]
        if step == "begin":
            log.append(TurnState(turn=f"t{len(log)}", prompt="?"))
        elif step == "ask":
            finished = [turn for turn in log if turn.ended]
            first = first_unknown(finished, history.known_turns, history.known_digest)
            history.merge(1, first, finished[first:], known_digest(finished))
            assert history.turns == finished
        elif running:
            ending = running[0 if step == "end first" else -1]
            ending.tokens, ending.pieces, ending.reason = [1], ["!"], "stop"


def test_what_is_known_already_is_not_sent_again() -> None:
    finished = [TurnState(turn=f"t{at}", tokens=[1], reason="stop") for at in range(3)]
    named = known_digest(finished[:2])
    assert first_unknown(finished, 2, named) == 2
    assert first_unknown(finished, 2, b"") == 2, "an edge of an earlier version"
    assert first_unknown(finished[1:], 2, named) == 0
    assert first_unknown(finished[:1], 2, named) == 0
