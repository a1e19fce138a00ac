"""The pure parts of the SDK: log view, reply view, inbox."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from segue._inbox import Batch, Head, Inbox, Link, Overflow, RawEntry, Tail
from segue._log import LogView
from segue._reply import ReplyView
from segue.events import Frame, Rewound
from segue_contract.sync.ops import Set, Unknown, encode_op
from segue_contract.sync.state import Cursor, SessionState
from tests.support.fake_agent import durable, ended, frame, started

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def raw(offset: int, generation: int = 1) -> RawEntry:
    data = encode_op(Set(id=f"o{offset}", name="n", value=b"%d" % offset))
    return RawEntry(generation, offset, data)


@given(st.lists(st.integers(1, 12), max_size=60), st.integers(0, 2**32))
def test_any_order_and_repetition_yields_each_entry_once(offsets: list[int], seed: int) -> None:
    offsets = [*offsets, *range(1, 13)]
    random.Random(seed).shuffle(offsets)
    view = LogView(1)
    out = [entry.offset for offset in offsets for entry in view.offer([raw(offset)])]
    assert out == list(range(1, 13))
    assert not view.behind
    assert view.state.values == {"n": b"12"}


def test_a_snapshot_overtakes_early_entries() -> None:
    view = LogView(1)
    assert [e.offset for e in view.offer([raw(1), raw(5), raw(8)])] == [1]
    assert view.behind
    snapshot = view.load(SessionState(cursor=Cursor(1, 6)))
    assert snapshot is not None
    assert snapshot.offset == 6
    assert [e.offset for e in view.offer([raw(7), raw(5)])] == [7, 8]
    assert view.load(SessionState(cursor=Cursor(1, 3))) is None


def test_an_unreadable_entry_keeps_its_place() -> None:
    view = LogView(1)
    first, second = view.offer([RawEntry(1, 1, b"\xc1 rubbish"), raw(2)])
    assert isinstance(first.op, Unknown)
    assert second.offset == 2


def test_another_generation_waits_for_a_snapshot() -> None:
    view = LogView(1)
    list(view.offer([raw(1), raw(2)]))
    assert list(view.offer([raw(3, generation=2)])) == []
    assert view.behind
    assert view.load(SessionState(cursor=Cursor(2, 2))) is not None
    assert [e.offset for e in view.offer([raw(3, generation=2), raw(3)])] == [3]
    view.read_to(Cursor(2, 3))
    assert not view.behind


def test_any_other_generation_is_news_also_a_lower_one() -> None:
    """A store that was wiped, and whose clock went back."""
    view = LogView(9)
    list(view.offer([raw(1, generation=9), raw(2, generation=9)]))
    view.saw_head(Cursor(4, 1))
    assert view.behind
    assert view.load(SessionState(cursor=Cursor(4, 1))) is not None
    assert not view.behind


def test_the_log_itself_says_where_it_ends() -> None:
    view = LogView(1)
    list(view.offer([raw(1), raw(9)]))
    view.saw_head(Cursor(7, 99))  # somebody's error, or a store that lost its newest entries
    view.read_to(Cursor(1, 1))
    assert not view.behind
    assert [e.offset for e in view.offer([raw(n) for n in range(2, 9)])] == list(range(2, 9))
    assert view.cursor.offset == 8, "the entry that the log never had is forgotten"


def test_a_full_inbox_keeps_its_links_and_says_overflow() -> None:
    inbox = Inbox(max_entries=4)
    inbox.put(Link(True))
    for offset in range(1, 7):
        inbox.put(Batch((raw(offset),)))
        inbox.put(Head(Cursor(1, offset)))
    kinds = [type(item) for item in inbox._items]
    assert kinds == [Link, Overflow, Batch, Head]
    inbox.check_integrity()


@given(st.data())
def test_an_inbox_stays_within_its_bounds_and_loses_nothing_silently(data: st.DataObject) -> None:
    """Whatever comes while the reader sleeps: what it may have to read is never forgotten."""
    inbox = Inbox(max_entries=6, max_bytes=200)
    items = st.one_of(
        st.builds(
            lambda size, count: Batch(tuple(RawEntry(1, 1, b"x" * size) for _ in range(count))),
            st.integers(0, 120),
            st.integers(0, 3),
        ),
        st.builds(lambda offset: Head(Cursor(1, offset)), st.integers(0, 9)),
        st.builds(lambda up: Link(up), st.booleans()),
        st.just(Overflow()),
        st.builds(lambda offset: Tail(Cursor(1, offset), True), st.integers(0, 9)),
    )
    put = data.draw(st.lists(items, max_size=30))
    for item in put:
        inbox.put(item)
        inbox.check_integrity()
    kept = list(inbox._items)
    links = [item for item in put if isinstance(item, Link)]
    assert [item for item in kept if isinstance(item, Link)] == links[-1:]
    lost = [item for item in put if isinstance(item, Batch | Head) and item not in kept]
    later = [item for item in kept if isinstance(item, Head | Overflow)]
    assert not lost or later or not any(isinstance(item, Batch) for item in lost)


async def test_a_full_inbox_is_full_of_bytes_as_well() -> None:
    inbox = Inbox(max_bytes=1000)
    large = RawEntry(1, 1, b"x" * 400)
    for _ in range(2):
        inbox.put(Batch((large,)))
    assert [type(item) for item in inbox._items] == [Batch, Batch]
    assert await inbox.get(0.0) == Batch((large,))
    inbox.put(Batch((large,)))  # what was taken counts no more
    assert [type(item) for item in inbox._items] == [Batch, Batch]
    inbox.put(Batch((large,)))
    assert [type(item) for item in inbox._items] == [Overflow]


def test_large_entries_that_came_too_early_are_left_to_the_log() -> None:
    view = LogView(1)
    large = encode_op(Set(id="l", name="l", value=b"x" * 2000))
    assert [entry.offset for entry in view.offer((raw(1), RawEntry(1, 3, large), raw(4)))] == [1]
    assert [entry.offset for entry in view.offer((raw(2),))] == [2]
    assert view.behind
    assert [entry.offset for entry in view.offer((RawEntry(1, 3, large),))] == [3, 4]


@given(st.data())
def test_a_reply_over_any_broken_streams_is_whole(data: st.DataObject) -> None:
    """Streams that break anywhere, previews that were never durable, repeated frames."""
    view = ReplyView("t")
    shown: list[str] = []

    def take(wire: object) -> None:
        for event in view.take(wire):  # type: ignore[arg-type]
            if isinstance(event, Rewound):
                del shown[event.index :]
            elif isinstance(event, Frame):
                assert event.index == len(shown)
                shown.extend(event.pieces)
        assert "".join(shown) == view.merger.text
        view.merger.check_integrity()

    take(started("t"))
    epoch = 1
    for _ in range(data.draw(st.integers(0, 4))):
        index = view.resume_index
        length = data.draw(st.integers(0, len(WORDS) - index))
        previews = data.draw(st.booleans())
        words = WORDS[index : index + length]
        if previews:
            words = [f"{word}{epoch}" for word in words]
        for place, word in enumerate(words):
            take(frame(index + place, word, epoch=epoch, durable=not previews))
        epoch += previews
    index = view.resume_index
    take(frame(index, " ".join(WORDS[index:]), epoch=epoch, durable=False))
    take(durable(len(WORDS)))
    take(ended(len(WORDS), epoch=epoch))
    assert view.ended is not None
    assert "".join(shown).split() == WORDS


def test_a_log_that_lost_entries_and_grew_to_the_same_offset_again_is_news() -> None:
    view = LogView(1)
    list(view.offer([raw(1), raw(2)]))
    state = SessionState(cursor=Cursor(2, 2), values={"other": b"1"})
    view.read_to(Cursor(2, 2), follows=False)
    snapshot = view.load(state)
    assert snapshot is not None
    assert (snapshot.generation, view.state.values) == (2, {"other": b"1"})


def test_an_entry_kept_under_a_lost_generation_is_not_taken_for_the_next_one() -> None:
    view = LogView(1)
    list(view.offer([raw(1), raw(3)]))
    following = RawEntry(2, 2, raw(2).op)  # read from the log, which lost what was kept
    view.follow_on(following)
    assert [entry.offset for entry in view.offer([following])] == [2]
    assert view.cursor == Cursor(2, 2)
    replaced = RawEntry(2, 3, encode_op(Set(id="o3b", name="other", value=b"b")))
    assert [entry.op.id for entry in view.offer([replaced])] == ["o3b"]
