"""A turn's stream: values to and from protobuf, the feed's readers, text across makers."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue_contract.errors import InvalidArgument, Unreachable
from segue_contract.limits import MAX_NEW_TOKENS
from segue_contract.sync import ops
from segue_contract.sync.state import TurnState
from segue_contract.transport.turn_feed import TurnFeed
from segue_contract.turn.events import (
    Durable,
    Ended,
    Frame,
    MadeBy,
    Reason,
    Rewound,
    Started,
    TurnEvent,
)
from segue_contract.turn.feed import Feed, trim
from segue_contract.turn.from_log import op_event, turn_events
from segue_contract.turn.text import ReplyText
from segue_contract.turn.wire import from_wire, to_wire
from segue_contract.v1 import agent_pb2 as pb
from tests.support.tiny_edge import tiny_tokenizer

_epoch = st.integers(0, 2**53)
_index = st.integers(0, MAX_NEW_TOKENS)
_usage = st.builds(ops.Usage, prompt_tokens=st.integers(0, 9), completion_tokens=st.integers(0, 9))


@st.composite
def _frames(draw: st.DrawFn) -> Frame:
    tokens = draw(st.lists(st.integers(0, 2**32 - 1), max_size=5))
    pieces = draw(st.lists(st.text(max_size=3), min_size=len(tokens), max_size=len(tokens)))
    return Frame(
        draw(_epoch),
        draw(st.integers(0, MAX_NEW_TOKENS - len(tokens))),
        tuple(tokens),
        tuple(pieces),
        draw(st.booleans()),
        draw(_epoch),
        draw(st.sampled_from(MadeBy)),
    )


_events: st.SearchStrategy[TurnEvent] = st.one_of(
    st.builds(Started, st.text(max_size=9), _epoch, _epoch),
    _frames(),
    st.builds(Durable, _index, _epoch),
    st.builds(Rewound, _epoch, _index),
    st.builds(
        Ended,
        reason=st.sampled_from(Reason),
        next_index=_index,
        epoch=_epoch,
        usage=_usage,
        plan=st.binary(max_size=9),
        offset=_epoch,
        error_code=st.text(max_size=9),
        error_message=st.text(max_size=9),
        durable=st.booleans(),
    ),
)


@given(_events)
def test_every_event_survives_the_wire(event: TurnEvent) -> None:
    assert from_wire(pb.TurnEvent.FromString(to_wire(event).SerializeToString())) == event


@pytest.mark.parametrize(
    "wire",
    [
        pb.TurnEvent(frame=pb.TokenFrame(index=0, tokens=[1, 2], pieces=["x"])),
        pb.TurnEvent(frame=pb.TokenFrame(index=1 << 30, tokens=[1], pieces=["x"])),
        pb.TurnEvent(frame=pb.TokenFrame(index=0, tokens=[1], pieces=["x"], made_by="moon")),
        pb.TurnEvent(durable=pb.TurnDurable(next_index=1 << 31)),
        pb.TurnEvent(rewound=pb.TurnRewound(index=1 << 31)),
        pb.TurnEvent(ended=pb.TurnEnded(reason="tired")),
        pb.TurnEvent(ended=pb.TurnEnded(reason="stop", next_index=1 << 30)),
    ],
)
def test_an_event_that_is_none_is_a_typed_error(wire: pb.TurnEvent) -> None:
    with pytest.raises(InvalidArgument):
        from_wire(wire)


@given(st.binary(max_size=60))
def test_any_bytes_give_an_event_or_a_typed_error(data: bytes) -> None:
    try:
        wire = pb.TurnEvent.FromString(data)
    except Exception:  # protobuf's own refusal
        return
    try:
        from_wire(wire)
    except InvalidArgument:
        pass


def test_a_kind_of_a_later_version_says_nothing() -> None:
    assert from_wire(pb.TurnEvent.FromString(b"\xfa\x07\x02hi")) is None
    assert from_wire(pb.TurnEvent()) is None


# -- the feed -----------------------------------------------------------------------------------


def frame(index: int, text: str, *, durable: bool = True, epoch: int = 1) -> Frame:
    return Frame(epoch, index, tuple(map(ord, text)), tuple(text), durable)


def test_a_reader_that_comes_back_gets_what_it_lacks() -> None:
    assert trim(frame(0, "abcd"), 2) == frame(2, "cd")
    assert trim(frame(0, "abcd"), 4) is None
    assert trim(frame(4, "e"), 2) == frame(4, "e")
    assert trim(Durable(2), 2) is None
    assert trim(Durable(3), 2) == Durable(3)


def test_what_was_taken_back_before_the_readers_place_comes_again() -> None:
    feed = Feed()
    for event in (frame(0, "abcd"), Rewound(2, 1), frame(1, "xyz", epoch=2)):
        feed.publish(event)
    reader = feed.reader(3)
    told = list(iter(reader.next, None))
    assert told == [frame(3, "d"), Rewound(2, 1), frame(1, "xyz", epoch=2)]


def test_nothing_follows_an_end() -> None:
    feed = Feed()
    feed.publish(Ended(reason=Reason.STOP, next_index=0))
    with pytest.raises(AssertionError):
        feed.publish(frame(0, "a"))


async def collect(feed: TurnFeed, from_index: int = 0) -> list[TurnEvent]:
    return [event async for event in feed.read(from_index)]


async def test_every_reader_gets_everything_whenever_it_comes() -> None:
    feed = TurnFeed()
    early = asyncio.create_task(collect(feed))
    feed.publish(frame(0, "ab"))
    await asyncio.sleep(0)
    middle = asyncio.create_task(collect(feed, 1))
    end = Ended(reason=Reason.STOP, next_index=2)
    feed.publish(end)
    feed.close()
    assert await early == [frame(0, "ab"), end]
    assert await middle == [frame(1, "b"), end]
    assert await collect(feed, 2) == [end]


async def test_a_turn_that_fails_fails_its_readers() -> None:
    feed = TurnFeed()
    feed.close(Unreachable("gone"))
    feed.close()
    with pytest.raises(Unreachable):
        await collect(feed)


# -- from the log -------------------------------------------------------------------------------


def test_a_folded_turn_reads_like_the_one_that_ran() -> None:
    turn = TurnState(turn="t", epoch=3, tokens=[1, 2], pieces=["a", "b"], reason="length")
    turn.last_offset = 9
    started, tokens, end = turn_events(turn, 1)
    assert started == Started("t", 3, 9)
    assert tokens == Frame(3, 1, (2,), ("b",), True, 9)
    assert isinstance(end, Ended)
    assert (end.reason, end.next_index, end.durable) == (Reason.LENGTH, 2, True)
    running = TurnState(turn="t", epoch=3)
    assert turn_events(running) == [Started("t", 3, 0)]


def test_ops_that_are_no_event_are_left_out() -> None:
    assert op_event(ops.Set(id="1", name="a", value=b""), 4) is None
    made = ops.Frame(id="1", turn="t", epoch=1, index=0, tokens=(1,), pieces=("a",))
    assert op_event(made, 4) == Frame(1, 0, (1,), ("a",), True, 4)


# -- text ---------------------------------------------------------------------------------------


@given(text=st.text("abX", max_size=12), cut=st.integers(0, 12))
def test_a_second_maker_stops_where_one_alone_would(text: str, cut: int) -> None:
    """Whatever the first maker showed stays; the second neither repeats nor misses a token."""
    tokenizer, tokens = tiny_tokenizer(), [ord(c) for c in text]
    whole = ReplyText(tokenizer, ["aX"], ())
    alone = list(whole.push(tokens).pieces)
    alone += whole.flush().pieces

    first = ReplyText(tokenizer, ["aX"], ())
    shown = first.push(tokens[:cut])
    pieces, made = list(shown.pieces), list(shown.tokens)
    if not shown.stopped:  # what it held back was never made
        second = ReplyText(tokenizer, ["aX"], made)
        pieces += second.push(tokens[len(made) :]).pieces
        pieces += second.flush().pieces
    assert "".join(pieces) == "".join(alone)
