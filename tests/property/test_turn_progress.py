"""Whoever says what in which order: no token twice or left out, one maker at a time, one end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from segue_cloud.turns.progress import Maker, ReplyProgress
from segue_contract.errors import InvalidArgument

MOST = 12
EVENTS = st.one_of(
    st.tuples(st.just("tokens"), st.integers(0, MOST), st.integers(0, 5)),
    st.tuples(st.just("hand_over"), st.integers(0, MOST), st.just(0)),
    st.tuples(st.just("ended"), st.integers(0, MOST), st.just(0)),
    st.tuples(st.sampled_from(["lost", "stop"]), st.just(0), st.just(0)),
)


@given(st.booleans(), st.integers(0, 4), st.lists(EVENTS, max_size=20))
def test_the_edge_makes_a_prefix_of_the_reply_and_nothing_after_it(
    edge: bool, made: int, events: list[tuple[str, int, int]]
) -> None:
    progress = ReplyProgress(tuple(range(made)), max_tokens=MOST, vocab=100, edge=edge)
    for kind, index, size in events:
        before, maker = list(progress.tokens), progress.maker
        taken: tuple[int, ...] = ()
        try:
            if kind == "tokens":
                tokens = tuple(range(index, index + size))
                taken, pieces = progress.edge_tokens(index, tokens, tuple("x" for _ in tokens))
                assert len(taken) == len(pieces)
            elif kind == "hand_over":
                progress.hand_over(index)
            elif kind == "ended":
                progress.edge_ended("stop", index)
            elif kind == "lost":
                progress.edge_lost()
            else:
                progress.stop()
        except InvalidArgument:
            assert (progress.tokens, progress.maker) == (before, maker), "a bad message did it"
        progress.check_integrity()
        assert progress.tokens == before + list(taken)
        assert progress.tokens == list(range(len(progress.tokens)))
        if maker is not Maker.EDGE:
            assert not taken
            assert progress.maker is maker, "only the edge's part can end by what the edge says"
    if progress.maker is Maker.CLOUD:
        progress.cloud_tokens((50,))
        progress.end("length")
        progress.end("stop")
        assert (progress.reason, progress.tokens[-1]) == ("length", 50)
