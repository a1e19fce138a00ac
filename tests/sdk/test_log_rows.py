"""`segue log`: what its rows say of turns that were said offline beside others."""

from __future__ import annotations

from segue.cli.sessions import line_of, rows_of
from segue.events import Entry, Snapshot
from segue_contract.sync import ops
from segue_contract.sync.replica import Replica
from tests.support.said_ops import begins

_TURNS = (("t1", None), ("t2", None), ("t3", "t1"), ("t4", "t3"))


def _ops() -> list[ops.Op]:
    return [op for turn, follows in _TURNS for op in begins(turn, follows=follows)]


def test_an_entry_that_begins_a_turn_of_a_branch_says_beside_what() -> None:
    log = Replica()
    rows = [
        row
        for offset, op in enumerate(_ops(), 1)
        for row in rows_of(Entry(offset, op, generation=1), log)
        if row["kind"] == "turn_started"
    ]
    assert [row.get("branch_beside") for row in rows] == [None, None, ["t2"], ["t2"]]
    assert "offline=True follows=t1 branch_beside=t2" in line_of(rows[2]).plain


def test_a_snapshot_says_the_same_of_its_turns() -> None:
    folded = Replica()
    for offset, op in enumerate(_ops(), 1):
        folded.apply_op(1, offset, op)
    rows = rows_of(Snapshot(folded.state, 8, 1), Replica())
    assert [row.get("branch_beside") for row in rows] == [None, None, ["t2"], ["t2"]]
    assert [row.get("offline") for row in rows] == [None, None, True, True]
