"""Replicas of one log are equal, however its entries arrive."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue_contract.errors import InvalidArgument
from segue_contract.sync import ops
from segue_contract.sync.replica import Applied, Replica
from segue_contract.sync.state import (
    Cursor,
    SessionState,
    TurnState,
    decode_state,
    decode_state_in_slices,
    encode_state,
    encode_state_in_slices,
)


@dataclass(frozen=True)
class Entry:
    generation: int
    offset: int
    op: ops.Op | bytes


def make_log(seed: int, turns: int) -> tuple[list[Entry], dict[str, str]]:
    """A log as the store would sequence it, and each turn's text, known beforehand."""
    random = Random(seed)
    written: list[ops.Op] = []
    texts: dict[str, str] = {}
    for number in range(turns):
        turn = f"t{number}"
        pieces = [f"{turn}.{i} " for i in range(random.randrange(1, 30))]
        texts[turn] = "".join(pieces)
        written.append(
            ops.UserMessage(id=f"u{number}", device="phone", turn=turn, text=f"ask {number}")
        )
        epoch, index = 1, 0
        written.append(ops.TurnStarted(id=f"s{number}", turn=turn, epoch=epoch))
        while index < len(pieces):
            if random.random() < 0.15:
                epoch += 1
                written.append(ops.TurnStarted(id=f"s{number}.{epoch}", turn=turn, epoch=epoch))
            # A frame may repeat what the log has; an older epoch's words must not count.
            start = random.randrange(max(0, index - 3), index + 1)
            end = min(len(pieces), index + random.randrange(1, 5))
            written.append(_frame(turn, epoch, start, pieces[start:end]))
            index = max(index, end)
            if epoch > 1 and random.random() < 0.3:
                written.append(_frame(turn, epoch - 1, index, ["stale"]))
            if random.random() < 0.2:
                written.append(ops.Set(id=f"v{len(written)}", name="x", value=bytes([index])))
        written.append(ops.TurnEnded(id=f"e{number}", turn=turn, epoch=epoch, reason="stop"))
        if random.random() < 0.5:
            written.append(_frame(turn, epoch, index, ["after the end"]))
            written.append(ops.TurnEnded(id="again", turn=turn, epoch=epoch, reason="error"))
    log = [Entry(7, offset, ops.encode_op(op)) for offset, op in enumerate(written, 1)]
    return log, texts


def _frame(turn: str, epoch: int, index: int, pieces: list[str]) -> ops.Frame:
    tokens = tuple(range(index, index + len(pieces)))
    return ops.Frame(
        id=f"f{turn}.{epoch}.{index}", turn=turn, epoch=epoch, index=index,
        tokens=tokens, pieces=tuple(pieces),
    )  # fmt: skip


def apply(replica: Replica, entry: Entry) -> Applied:
    return replica.apply_op(entry.generation, entry.offset, entry.op)


def apply_all(replica: Replica, entries: list[Entry]) -> Applied:
    """The first outcome that needs the log, or what the last entry gave."""
    outcome = Applied.DUPLICATE
    for entry in entries:
        outcome = apply(replica, entry)
        if outcome in (Applied.GAP, Applied.NEW_GENERATION):
            break
    return outcome


@given(seed=st.integers(0, 2**32), turns=st.integers(1, 4), read_page=st.integers(1, 50))
def test_any_order_with_duplicates_and_losses_gives_the_same_text(
    seed: int, turns: int, read_page: int
) -> None:
    log, texts = make_log(seed, turns)
    random = Random(seed + 1)
    arrivals = [entry for entry in log for _ in range(random.choice((0, 1, 1, 2)))]
    for _ in range(len(arrivals)):
        a, b = random.randrange(len(arrivals)), random.randrange(len(arrivals))
        arrivals[a], arrivals[b] = arrivals[b], arrivals[a]
    replica = Replica()
    for entry in arrivals:
        before = encode_state(replica.state)
        outcome = apply(replica, entry)
        if outcome is not Applied.APPLIED:
            assert encode_state(replica.state) == before, "a refused entry changed something"
        if outcome is Applied.GAP and random.random() < 0.3:
            after = replica.cursor.offset
            apply_all(replica, log[after : after + read_page])
        replica.check_integrity()
    apply_all(replica, log[replica.cursor.offset :])

    assert replica.cursor == Cursor(7, len(log))
    assert {turn.turn: turn.text for turn in replica.state.turns} == texts
    assert all(turn.reason == "stop" for turn in replica.state.turns)
    straight = Replica()
    assert apply_all(straight, log) is Applied.APPLIED
    assert encode_state(straight.state) == encode_state(replica.state)


@given(seed=st.integers(0, 2**32), share=st.floats(0, 1))
def test_a_snapshot_and_the_rest_equal_the_whole(seed: int, share: float) -> None:
    log, _ = make_log(seed, 3)
    cut = int(len(log) * share)
    early = Replica()
    apply_all(early, log[:cut])
    late = Replica(decode_state(encode_state(early.state)))
    for entry in log:  # with everything it knows already once more
        assert apply(late, entry) in (Applied.APPLIED, Applied.DUPLICATE)
    late.check_integrity()
    whole = Replica()
    apply_all(whole, log)
    assert encode_state(late.state) == encode_state(whole.state)


def test_gaps_and_generations_change_nothing() -> None:
    replica = Replica()
    first = ops.Set(id="a", name="n", value=b"1")
    second = ops.Set(id="b", name="n", value=b"2")
    assert apply(replica, Entry(3, 2, second)) is Applied.GAP
    assert apply(replica, Entry(3, 1, first)) is Applied.APPLIED
    assert apply(replica, Entry(4, 2, second)) is Applied.NEW_GENERATION
    assert apply(replica, Entry(2, 2, second)) is Applied.DUPLICATE
    assert replica.cursor == Cursor(3, 1)
    assert replica.state.values == {"n": b"1"}
    replica.load(SessionState(cursor=Cursor(4, 1)))
    assert apply(replica, Entry(4, 2, second)) is Applied.APPLIED
    assert replica.state.values == {"n": b"2"}


def test_nothing_under_an_ended_turns_id_rewrites_it() -> None:
    replica = Replica()
    turn = [
        ops.UserMessage(id="u", device="phone", turn="t", text="the question"),
        ops.TurnStarted(id="s", turn="t", epoch=1, max_tokens=9),
        ops.Frame(id="f", turn="t", epoch=1, index=0, tokens=(5,), pieces=("yes",)),
        ops.TurnEnded(id="e", turn="t", epoch=1, reason="stop"),
    ]
    again = [
        ops.UserMessage(id="u2", device="laptop", turn="t", text="another question"),
        ops.TurnStarted(id="s2", turn="t", epoch=1, max_tokens=7),
        ops.Frame(id="f2", turn="t", epoch=2, index=1, tokens=(6,), pieces=("no",)),
        ops.TurnEnded(id="e2", turn="t", epoch=2, reason="error"),
    ]
    for offset, op in enumerate(turn, 1):
        replica.apply_op(1, offset, op)
    before = encode_state(replica.state)
    for offset, op in enumerate(again, 5):
        assert replica.apply_op(1, offset, op) is Applied.APPLIED
    replica.load_cursor(Cursor(1, 4))
    assert encode_state(replica.state) == before


def test_bytes_that_are_no_op_are_refused_and_keep_their_place() -> None:
    replica = Replica()
    with pytest.raises(InvalidArgument):
        apply(replica, Entry(1, 1, b"\xc1"))
    assert replica.cursor.offset == 0
    later = ops.Set(id="later", name="n", value=b"")
    assert apply(replica, Entry(1, 1, later)) is Applied.APPLIED


def test_first_claim_first_result_and_highest_control_epoch_win() -> None:
    replica = Replica()
    written: list[ops.Op] = [
        ops.ToolClaim(id="1", device="phone", call="c"),
        ops.ToolClaim(id="2", device="laptop", call="c"),
        ops.ToolResult(id="3", device="phone", call="c", result=b"one"),
        ops.ToolResult(id="4", device="laptop", call="c", result=b"two"),
        ops.Control(id="5", holder="phone", epoch=2),
        ops.Control(id="6", holder="laptop", epoch=1),
        ops.Doc(id="7", name="d", update=b"x"),
        ops.Doc(id="8", name="d", update=b"y"),
        ops.Unknown(id="9"),
        ops.Feedback(id="10", turn="nobody", value="good"),
    ]
    for offset, op in enumerate(written, 1):
        assert apply(replica, Entry(1, offset, op)) is Applied.APPLIED
    state = replica.state
    assert state.claims == {"c": "phone"}
    assert state.results == {"c": b"one"}
    assert (state.control_holder, state.control_epoch) == ("phone", 2)
    assert state.docs == {"d": [b"x", b"y"]}
    assert state.turns == []


def test_who_waits_is_seen_until_it_begins_is_gone_or_lost_its_place() -> None:
    replica = Replica()
    written: list[ops.Op] = []

    def waits() -> list[str]:
        return [one.turn for one in replica.state.waiting]

    def write(*some: ops.Op) -> list[str]:
        for op in some:
            written.append(op)
            assert replica.apply_op(1, len(written), op) is Applied.APPLIED
        return waits()

    def waiting(turn: str) -> ops.Op:
        return ops.TurnWaiting(id=f"w{turn}", turn=turn, device="phone", text=turn.upper())

    def begins(turn: str) -> ops.Op:
        return ops.UserMessage(id=f"u{turn}", turn=turn, device="phone", text=turn)

    assert write(begins("t0"), waiting("t0")) == [], "it began before the log heard that it waits"
    assert write(*(waiting(turn) for turn in ("t1", "t2", "t3", "t1"))) == ["t1", "t2", "t3"]
    assert write(ops.TurnWithdrawn(id="x2", turn="t2")) == ["t1", "t3"]
    assert write(waiting("t4"), begins("t3")) == ["t4"], "t1 came before, and lost its place"
    assert decode_state(encode_state(replica.state)) == replica.state
    assert write(begins("t5")) == [], "who begins without a wait finds nobody waiting"


@given(seed=st.integers(0, 2**32), slice_bytes=st.integers(1, 400))
def test_a_state_coded_in_slices_is_the_same(seed: int, slice_bytes: int) -> None:
    """And damaged bytes are the same typed error."""
    random = Random(seed)
    state = SessionState(
        cursor=Cursor(3, 9),
        turns=[
            TurnState(turn=f"t{n}", prompt="p" * random.randrange(90), tokens=[n], pieces=["x"])
            for n in range(random.randrange(20))
        ],
        values={"v": b"1"},
        docs={"d": [b"1", b"2"]},
        claims={"c": "phone"},
        results={"c": b"r"},
        control_holder="phone",
        control_epoch=2,
    )
    again = None
    encoding = encode_state_in_slices(state, slice_bytes)
    pauses = 0
    while again is None:
        try:
            next(encoding)
            pauses += 1
        except StopIteration as done:
            again = done.value
    assert decode_state(again) == state
    assert pauses >= sum(len(turn.prompt) for turn in state.turns) // (slice_bytes + 150)
    data = bytearray(encode_state(state) if seed % 2 else again)

    def sliced() -> tuple[int, SessionState]:
        steps, decoding = 0, decode_state_in_slices(bytes(data), slice_bytes)
        while True:
            try:
                next(decoding)
            except StopIteration as done:
                return steps, done.value
            steps += 1

    steps, found = sliced()
    assert found == state
    assert steps >= sum(len(turn.prompt) for turn in state.turns) // (slice_bytes + 150)
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    try:
        expected: SessionState | None = decode_state(bytes(data))
    except InvalidArgument:
        expected = None
    if expected is None:
        with pytest.raises(InvalidArgument):
            sliced()
    else:
        assert sliced()[1] == expected
