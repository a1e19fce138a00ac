"""A turn merged from previews and log entries: the log's text, whatever came before it."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue_contract.errors import InvalidArgument
from segue_contract.turn.events import Durable, Frame, Rewound
from segue_contract.turn.merge import Merged, Merger

Push = Frame


class Screen:
    """What a user sees who does exactly what the merger says."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.durable = 0
        self.rewinds: list[int] = []

    def show(self, events: list[Merged]) -> None:
        for event in events:
            match event:
                case Frame():
                    assert event.index == len(self.pieces), "a hole or a repetition on the screen"
                    self.pieces.extend(event.pieces)
                    if event.durable and self.durable == event.index:
                        self.durable = len(self.pieces)
                case Durable():
                    assert event.next_index <= len(self.pieces)
                    self.durable = event.next_index
                case Rewound():
                    assert self.durable <= event.index < len(self.pieces)
                    del self.pieces[event.index :]
                    self.rewinds.append(event.index)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def frame(epoch: int, index: int, tokens: list[int], pieces: Sequence[str], durable: bool) -> Frame:
    return Frame(epoch, index, tuple(tokens), tuple(pieces), durable)


def cut(random: Random, tokens: list[int], pieces: list[str], first: int) -> list[tuple[int, int]]:
    """Overlapping pieces [a, b) that cover [first, len(tokens))."""
    spans = []
    at = first
    while at < len(tokens):
        end = min(len(tokens), at + random.randrange(1, 6))
        spans.append((max(first, at - random.randrange(3)), end))
        at = end
    return spans


@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 60),
    durable_share=st.floats(0, 1),
    same_sampler=st.booleans(),
)
def test_any_order_duplicates_overlaps_and_a_failover_give_the_logs_text(
    seed: int, length: int, durable_share: float, same_sampler: bool
) -> None:
    random = Random(seed)
    # Epoch 1 made all tokens, but the log got only the first ones of them; epoch 2 goes on there.
    survived = int(length * durable_share)
    old = [random.randrange(50) for _ in range(length)]
    new = old if same_sampler else old[:survived] + [100 + i for i in range(length - survived)]
    words = {token: f"<{token}>" for token in (*old, *new)}

    def frames(tokens: list[int], epoch: int, first: int, last: int, durable: bool) -> list[Push]:
        return [
            Frame(epoch, a, tuple(tokens[a:b]), tuple(words[t] for t in tokens[a:b]), durable)
            for a, b in cut(random, tokens[:last], [], first)
        ]

    log = frames(new, 1, 0, survived, True) + frames(new, 2, survived, length, True)
    previews = frames(old, 1, 0, length, False) + frames(new, 2, survived, length, False)
    arrivals = log + [one for one in previews + log if random.random() < 0.7]
    random.shuffle(arrivals)

    merger, screen = Merger(), Screen()
    end_at = random.randrange(len(arrivals) + 1)
    for number, arrival in enumerate(arrivals):
        if number == end_at:
            screen.show(merger.end(length))
        screen.show(merger.push(arrival))
        merger.check_integrity()
        assert screen.text == merger.text
        assert screen.durable == merger.durable_index
    screen.show(merger.end(length))

    assert merger.tokens == new
    assert screen.text == "".join(words[token] for token in new)
    assert merger.complete
    assert merger.durable_index == length
    if same_sampler:
        assert screen.rewinds == [], "nothing changed, so nothing may be taken back"
    assert all(index >= survived for index in screen.rewinds)


def test_a_preview_that_never_became_durable_is_taken_back() -> None:
    merger, screen = Merger(), Screen()
    screen.show(merger.push(frame(1, 0, [1, 2, 3, 4], list("abcd"), False)))
    screen.show(merger.push(frame(1, 0, [1, 2], list("ab"), True)))
    assert (screen.text, screen.durable) == ("abcd", 2)
    screen.show(merger.push(frame(2, 2, [3, 9], list("cx"), True)))
    assert screen.rewinds == [3]
    assert screen.text == "abcx"
    screen.show(merger.push(frame(1, 4, [5], ["e"], False)))
    assert screen.text == "abcx", "an epoch that is over goes on talking"


def test_an_announced_rewind_and_the_end_drop_what_is_void() -> None:
    merger, screen = Merger(), Screen()
    screen.show(merger.push(frame(1, 0, [1, 2, 3], list("abc"), False)))
    screen.show(merger.confirm(1))
    screen.show(merger.rewind(2, 1))
    assert (screen.text, screen.rewinds) == ("a", [1])
    screen.show(merger.push(frame(2, 1, [7, 8], list("yz"), False)))
    screen.show(merger.end(2))
    assert screen.text == "ay"
    assert merger.complete
    assert screen.rewinds == [1, 2]


def test_a_durable_token_is_final() -> None:
    merger = Merger()
    merger.push(frame(1, 0, [1], ["a"], True))
    assert merger.push(frame(5, 0, [2], ["b"], True)) == []
    assert merger.text == "a"


def test_a_log_that_lost_tokens_takes_back_what_was_durable() -> None:
    merger, screen = Merger(), Screen()
    screen.show(merger.push(frame(1, 0, [1, 2, 3], "abc", True)))
    told = merger.rewind(2, 1)
    assert told == [Rewound(2, 1)]
    assert (merger.text, merger.durable_index) == ("a", 1)
    assert merger.push(frame(2, 1, [8, 9], "yz", True)) == [frame(2, 1, [8, 9], "yz", True)]
    merger.check_integrity()


@pytest.mark.parametrize(("index", "tokens"), [(-1, [1]), (1 << 30, [1]), (0, [1, 2])])
def test_impossible_frames_are_refused(index: int, tokens: list[int]) -> None:
    with pytest.raises(InvalidArgument):
        Merger().push(frame(1, index, tokens, ["x"], True))
