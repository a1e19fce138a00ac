"""Where a session's turns part, against a model that remembers what each side had seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from segue_contract.sync.branches import Branch, branch_of, branches
from segue_contract.sync.state import TurnState


def turn(name: str, follows: str | None = None, reason: str = "stop") -> TurnState:
    tokens = [] if reason == "error" else [1]
    offline = follows is not None
    return TurnState(
        turn=name, reason=reason, tokens=tokens, offline=offline, follows=follows or ""
    )


def test_only_what_others_said_meanwhile_makes_a_branch() -> None:
    turns = [turn("a"), turn("b", "a"), turn("c"), turn("d", "b"), turn("e", "d"), turn("f")]
    assert branches(turns) == [Branch("b", ("c",), ("d", "e"))]
    assert branch_of(turns, "e") == Branch("b", ("c",), ("d", "e"))
    assert branch_of(turns, "b") is branch_of(turns, "f") is None


def test_a_branch_may_begin_before_everything() -> None:
    assert branches([turn("a"), turn("b", "")]) == [Branch("", ("a",), ("b",))]
    assert branches([turn("b", "")]) == []


def test_a_question_that_failed_is_beside_nothing() -> None:
    assert branches([turn("a"), turn("b", reason="error"), turn("c", "a")]) == []


def test_a_turn_after_one_that_the_log_lost_begins_no_branch() -> None:
    assert branches([turn("a"), turn("c", "lost"), turn("d", "d")]) == []


@given(st.lists(st.tuples(st.booleans(), st.booleans())))
def test_a_turn_is_in_a_branch_exactly_if_somebody_had_not_seen_the_one_before(
    said: list[tuple[bool, bool]],
) -> None:
    """One edge: offline turns follow its newest; an online one begins when all was delivered."""
    log: list[TurnState] = []
    newest = ""
    expected = set()
    for number, (offline, elsewhere) in enumerate(said):
        if elsewhere:  # another node: this edge learns of it when it begins online
            log.append(turn(f"x{number}"))
        name = f"t{number}"
        before = log[-1].turn if log else ""
        if offline and (before != newest or newest in expected):
            expected.add(name)
        log.append(turn(name, newest if offline else None))
        newest = name
    assert {name for branch in branches(log) for name in branch.turns} == expected
