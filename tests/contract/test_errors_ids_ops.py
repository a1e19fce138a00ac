"""What travels between programs comes back as it was: errors, ids, ops, states, topics, plans."""

from __future__ import annotations

import contextlib
import hmac
import random
import re

import grpc
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue_contract import errors, ids, plan, topics
from segue_contract.errors import Internal, InvalidArgument, Overloaded, SegueError
from segue_contract.ids import SessionName
from segue_contract.kv.layout import BLOCK_TOKENS, KvRecipe, block_id, block_ids
from segue_contract.limits import MAX_ERROR_TEXT_BYTES, MAX_ID_CHARS, MAX_OP_BYTES
from segue_contract.sync import ops, state
from segue_contract.sync.state import Cursor

TREE = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, SegueError) and value is not SegueError
]

texts = st.text(max_size=30)
names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,20}[A-Za-z0-9])?", fullmatch=True)
numbers = st.integers(0, 2**63 - 1)


# -- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", TREE, ids=lambda cls: cls.__name__)
def test_every_error_survives_the_wire(cls: type[SegueError]) -> None:
    sent = cls("It broke.", hint="Mend it.", current=7, where="here", share=0.5, known=True)
    got = SegueError.from_bytes(sent.to_bytes())
    assert type(got) is cls
    assert (got.message, got.hint, got.fields) == (sent.message, sent.hint, sent.fields)
    assert str(got) == "It broke. Mend it."


@given(st.text(max_size=20_000), st.dictionaries(names, st.text(max_size=2_000), max_size=12))
def test_an_error_fits_a_header_whatever_it_quotes(text: str, fields: dict[str, str]) -> None:
    sent = errors.InvalidArgument(text, hint=text)
    sent.fields = fields
    data = sent.to_bytes()
    assert len(data) < 5_000
    got = SegueError.from_bytes(data)
    assert type(got) is errors.InvalidArgument
    whole = len(text.encode(errors="replace")) <= MAX_ERROR_TEXT_BYTES
    assert (got.message == text) if whole else got.message.endswith("…")


def test_codes_are_unique_snake_case_and_grpc_knows_each_status() -> None:
    codes = [cls.code for cls in TREE]
    assert len(codes) == len(set(codes)) == len(TREE)
    for cls in TREE:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", cls.code)
        assert hasattr(grpc.StatusCode, cls.grpc_code)
    assert errors.SessionBusy.code == "session_busy"


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    drawn = set(re.findall(r"[A-Z][A-Za-z]+(?=\s*(?:  |·|$))", errors.__doc__, re.MULTILINE))
    assert {cls.__name__ for cls in TREE} <= drawn | {"SegueError"}


@given(data=st.binary(max_size=60))
def test_bytes_that_are_no_error_become_one(data: bytes) -> None:
    assert isinstance(SegueError.from_bytes(data), SegueError)


def test_an_error_of_a_later_version_keeps_its_words() -> None:
    data = msgspec.msgpack.encode(("from_the_future", "New trouble.", "Update.", {"a": 1}))
    got = SegueError.from_bytes(data)
    assert type(got) is Internal
    assert (got.message, got.hint, got.fields) == ("New trouble.", "Update.", {"a": 1})


def test_fields_of_a_peer_may_have_any_name() -> None:
    fields = {"hint": 1, "message": 2, "self": 3, "cls": 4, "code": 5}
    data = msgspec.msgpack.encode(("overloaded", "Full.", "Wait.", fields))
    got = SegueError.from_bytes(data)
    assert type(got) is Overloaded
    assert (got.message, got.hint, got.fields) == ("Full.", "Wait.", fields)


def test_overload_says_when_to_come_back() -> None:
    got = SegueError.from_bytes(Overloaded("Full.", retry_after_s=0.25).to_bytes())
    assert got.retryable
    assert got.fields["retry_after_s"] == 0.25


# -- ids --------------------------------------------------------------------------------------


@given(value=names)
def test_good_ids_pass(value: str) -> None:
    assert ids.check_id(value, "session") == value


@pytest.mark.parametrize(
    "value",
    ["", "a b", "a/b", "a+", "#", "ä", "-a", "a-", ".", "..", "a\n", "a\0", "{a}", "x" * 65],
)
def test_bad_ids_are_refused_with_their_kind(value: str) -> None:
    with pytest.raises(InvalidArgument, match="device") as caught:
        ids.check_id(value, "device")
    assert caught.value.hint


def test_new_ids_are_valid_different_and_of_one_length() -> None:
    source = random.Random(4)
    made = {ids.new_id("turn-", source.randbytes) for _ in range(500)}
    assert len(made) == 500
    assert {len(one) for one in made} == {len("turn-") + 16}
    for one in made:
        assert ids.check_id(one, "turn") == one
    assert len("turn-") + 16 <= MAX_ID_CHARS


@given(parts=st.lists(st.binary(max_size=6), max_size=4), cut=st.integers(0, 6))
def test_digests_tell_part_lists_apart(parts: list[bytes], cut: int) -> None:
    joined = b"".join(parts)
    other = [joined[:cut], joined[cut:]]
    assert (ids.digest(*parts) == ids.digest(*other)) == (parts == other)


# -- blocks and recipes -----------------------------------------------------------------------


def test_block_ids_depend_on_recipe_parent_and_tokens() -> None:
    tokens = list(range(150))
    first, second = block_ids("r", tokens)
    assert first == block_id("r", bytes(16), tokens[:BLOCK_TOKENS])
    assert second == block_id("r", first, tokens[BLOCK_TOKENS : 2 * BLOCK_TOKENS])
    assert block_ids("r", tokens[:63]) == []
    assert block_ids("other", tokens)[0] != first
    assert block_ids("r", [9, *tokens[1:]])[1] != second
    with pytest.raises(ValueError, match="64"):
        block_id("r", first, tokens[:10])


def test_recipes_differ_in_every_field() -> None:
    base = KvRecipe(weights_digest="w", weight_quant="fp32", rope="1e5")
    digests = {base.digest}
    for field in base.__struct_fields__:
        digests.add(msgspec.structs.replace(base, **{field: "changed"}).digest)
    assert len(digests) == 1 + len(base.__struct_fields__)
    assert all(re.fullmatch(r"[0-9a-f]{32}", one) for one in digests)


# -- ops and states ---------------------------------------------------------------------------

samplings = st.builds(
    ops.Sampling,
    temperature=st.floats(0, 10),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 1000),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
)
usages = st.builds(ops.Usage, prompt_tokens=numbers, completion_tokens=numbers)
common = {"id": names, "device": st.just("") | names, "at_ms": numbers}
tokens = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)
all_ops = st.one_of(
    st.builds(ops.UserMessage, **common, turn=names, text=texts),
    st.builds(
        ops.TurnStarted, **common, turn=names, epoch=numbers, model=names, max_tokens=numbers,
        sampling=samplings, stop=st.lists(texts, max_size=3).map(tuple), context_from=names,
        offline=st.booleans(), follows=names,
    ),
    st.builds(
        ops.Frame, **common, turn=names, epoch=numbers, index=numbers, tokens=tokens,
        pieces=st.lists(texts, max_size=5).map(tuple), made_by=st.sampled_from(["edge", "cloud"]),
    ),
    st.builds(
        ops.ToolCall, **common, turn=names, call=names, name=names, arguments=st.binary(max_size=9)
    ),
    st.builds(ops.ToolClaim, **common, call=names),
    st.builds(ops.ToolResult, **common, call=names, result=st.binary(max_size=9)),
    st.builds(
        ops.TurnEnded, **common, turn=names, epoch=numbers, usage=usages, error_message=texts,
        plan=st.binary(max_size=9), error_code=texts,
        reason=st.sampled_from(["stop", "length", "cancelled", "error"]),
    ),
    st.builds(ops.Control, **common, holder=texts, epoch=numbers),
    st.builds(ops.Set, **common, name=names, value=st.binary(max_size=9)),
    st.builds(ops.Doc, **common, name=names, update=st.binary(max_size=9)),
    st.builds(ops.Feedback, **common, turn=names, value=texts),
)  # fmt: skip


@settings(deadline=None)
@given(op=all_ops)
def test_every_op_survives_the_log(op: ops.Op) -> None:
    got = ops.decode_op(ops.encode_op(op))
    assert type(got) is type(op)
    assert got == op


@given(data=st.binary(max_size=80))
def test_bytes_that_are_no_op_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        ops.decode_op(data)


@given(op=all_ops, data=st.data())
def test_a_damaged_op_is_an_op_or_refused(op: ops.Op, data: st.DataObject) -> None:
    raw = bytearray(ops.encode_op(op))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(InvalidArgument):
        assert ops.decode_op(bytes(raw)).id is not None


def test_text_that_is_no_utf8_and_endless_nesting_are_refused() -> None:
    op = ops.Feedback(id="aaaa", turn="t", value="v")
    with pytest.raises(InvalidArgument):
        ops.decode_op(ops.encode_op(op).replace(b"aaaa", b"a\xff\xffa"))
    known = {"kind": "feedback", "id": "a", "turn": "t", "value": "", "later": 0}
    nested = msgspec.msgpack.encode(known)[:-1] + b"\x91" * 100_000 + b"\x00"
    with pytest.raises(InvalidArgument):
        ops.decode_op(nested)


def test_ops_of_later_versions_keep_their_place() -> None:
    later = msgspec.msgpack.encode({"kind": "hologram", "id": "a", "rays": 3})
    got = ops.decode_op(later)
    assert isinstance(got, ops.Unknown)
    assert (got.id, got.original) == ("a", later)
    grown = {"kind": "feedback", "id": "b", "turn": "t", "value": "+", "stars": 5}
    read = ops.decode_op(msgspec.msgpack.encode(grown))
    assert read == ops.Feedback(id="b", turn="t", value="+")


def test_ops_are_capped_both_ways() -> None:
    with pytest.raises(InvalidArgument, match="allowed"):
        ops.encode_op(ops.UserMessage(id="a", turn="t", text="x" * MAX_OP_BYTES))
    with pytest.raises(InvalidArgument, match="limit"):
        ops.decode_op(bytes(MAX_OP_BYTES + 1))


turn_states = st.builds(
    state.TurnState,
    turn=names,
    device=texts,
    prompt=texts,
    epoch=numbers,
    tokens=st.lists(st.integers(0, 2**31), max_size=5),
    pieces=st.lists(texts, max_size=5),
    reason=st.sampled_from(["", "stop"]),
    usage=usages,
    last_offset=numbers,
)


@settings(deadline=None)
@given(
    turns=st.lists(turn_states, max_size=3),
    cursor=st.builds(Cursor, generation=numbers, offset=numbers),
    values=st.dictionaries(names, st.binary(max_size=9), max_size=3),
)
def test_states_survive(
    turns: list[state.TurnState], cursor: Cursor, values: dict[str, bytes]
) -> None:
    whole = state.SessionState(cursor=cursor, turns=turns, values=values, control_epoch=3)
    assert state.decode_state(state.encode_state(whole)) == whole
    assert state.decode_turns(state.encode_turns(turns)) == turns


@pytest.mark.parametrize(
    "decode",
    [
        state.decode_state, state.decode_turns, plan.decode_plan, topics.decode_head,
        topics.decode_log_message,
    ],
)  # fmt: skip
@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x93\x01", b"\xa1x", b"\x92\xa1x\xa1x"])
def test_bytes_of_something_else_are_refused(decode: object, data: bytes) -> None:
    assert callable(decode)
    with pytest.raises(InvalidArgument):
        decode(data)


# -- topics and plans -------------------------------------------------------------------------


def test_topics_are_what_the_access_rules_will_name() -> None:
    trip = SessionName("default", "trip")
    assert topics.log_topic(trip) == "segue/v1/default/trip/log"
    assert topics.head_topic(trip) == "segue/v1/default/trip/head"


@given(generation=numbers, offset=numbers, entries=st.lists(st.binary(max_size=9), max_size=4))
def test_mqtt_payloads_survive(generation: int, offset: int, entries: list[bytes]) -> None:
    message = topics.decode_log_message(topics.encode_log_message(generation, offset, entries))
    assert (message.generation, message.first_offset, message.ops) == (generation, offset, entries)
    cursor = Cursor(generation, offset)
    assert topics.decode_head(topics.encode_head(cursor)) == cursor


@given(body=st.binary(max_size=99), at=st.integers(min_value=0), bit=st.integers(0, 7))
def test_sealed_payloads_open_with_their_key_on_their_topic_as_they_are(
    body: bytes, at: int, bit: int
) -> None:
    trip = SessionName("acme", "trip")
    key, topic = topics.live_key(b"secret", trip, 1), topics.log_topic(trip)
    sealed = topics.seal(key, topic, body)
    assert topics.unseal(key, topic, sealed) == body
    whole = hmac.digest(key, topic.encode() + b"\0" + body, "sha256")
    assert sealed == whole[: topics.TAG_BYTES] + body
    changed = bytearray(sealed)
    changed[at % len(sealed)] ^= 1 << bit
    others = [
        topics.live_key(b"secret", trip, 2),
        topics.live_key(b"secret", SessionName("zeta", "trip"), 1),
        topics.live_key(b"secret", SessionName("acme", "tri"), 1),
        topics.live_key(b"other", trip, 1),
        b"",
    ]
    for tried in [
        (key, topic, bytes(changed)),
        (key, topics.head_topic(trip), sealed),
        (key, topic, sealed[: topics.TAG_BYTES - 1]),
        (key, topic, b""),
        *((other, topic, sealed) for other in others),
    ]:
        with pytest.raises(InvalidArgument):
            topics.unseal(*tried)


def test_plans_survive_and_grow() -> None:
    report = plan.PlanReport(
        shape=plan.Shape.SHIP,
        reason="the edge holds the KV",
        predicted={"ship": plan.Cost(ttft_s=0.1, gap_s=0.2, total_s=3.0)},
        actual=plan.Cost(ttft_s=0.15, total_s=3.5),
        inputs={"rtt_s": 0.01},
        shipped_blocks=3,
    )
    data = plan.encode_plan(report)
    assert plan.decode_plan(data) == report
    grown = msgspec.msgpack.decode(data) | {"moon_phase": 0.5}
    assert plan.decode_plan(msgspec.msgpack.encode(grown)) == report


def test_equal_questions_have_one_digest_however_their_numbers_were_made() -> None:
    asked = ops.Sampling(
        temperature=float("0"), top_p=float("1"), top_k=int("0"), min_p=float("0"), seed=int("0")
    )
    plain = ops.request_digest("Hi", 4, ops.Sampling(), ())
    assert ops.request_digest("Hi", 4, asked, ()) == plain
    assert ops.request_digest("Hi", 4, ops.Sampling(temperature=0, top_p=1), ()) == plain
    others = [
        ops.request_digest("Hi!", 4, asked, ()),
        ops.request_digest("Hi", 5, asked, ()),
        ops.request_digest("Hi", 4, asked, ("x",)),
        *(
            ops.request_digest("Hi", 4, msgspec.structs.replace(asked, **{name: 0.5}), ())
            for name in ("temperature", "top_p", "min_p")
        ),
        *(
            ops.request_digest("Hi", 4, msgspec.structs.replace(asked, **{name: 1}), ())
            for name in ("top_k", "seed")
        ),
    ]
    assert len({plain, *others}) == 1 + len(others)


def test_a_refusal_says_when_to_come_back_where_it_is_known() -> None:
    rate = errors.QuotaExceeded("Too fast.", what="ops_per_s", limit=50, retry_after_s=0.25)
    told = errors.SegueError.from_bytes(rate.to_bytes())
    assert isinstance(told, errors.QuotaExceeded)
    assert told.retry_after_s == 0.25
    assert errors.QuotaExceeded("The session is full.", what="bytes").retry_after_s is None
    for wrong in (-1, float("inf"), float("nan"), True, "soon"):
        assert errors.Overloaded("Full.", retry_after_s=wrong).retry_after_s is None
