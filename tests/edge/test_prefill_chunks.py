"""Prefill chunks: what they must cover, and what they leave for the end."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from segue_edge.prefill.chunks import LARGE_CHUNK, LONGEST_RUN, SMALL_CHUNK, chunk_size, chunks


@given(st.integers(0, 4000), st.integers(1, 8192), st.sampled_from([64, 128, 256, 512]))
def test_chunks_cover_the_prompt_without_gap_or_overlap(
    start: int, new_tokens: int, chunk: int
) -> None:
    cut = chunks(start, start + new_tokens, chunk)
    assert cut[0][0] == start
    assert cut[-1][1] == start + new_tokens
    for (_, end), (begin, _) in itertools.pairwise(cut):
        assert end == begin
        assert end % 64 == 0
    sizes = [end - begin for begin, end in cut]
    assert min(sizes) > 0
    assert max(sizes) < chunk + 64
    if chunk <= LARGE_CHUNK:
        assert max(sizes) <= LONGEST_RUN


@given(st.integers(512, 8192))
def test_most_kv_exists_before_the_last_chunk(tokens: int) -> None:
    last = chunks(0, tokens)[-1][0]
    assert last // 64 >= 0.8 * (tokens // 64)


def test_a_short_prompt_is_one_chunk() -> None:
    assert chunks(0, 200) == [(0, 200)]
    assert chunks(100, 200) == [(100, 200)]
    assert chunks(448, 500) == [(448, 500)]


def test_a_slow_link_gets_small_chunks() -> None:
    assert chunk_size(prefill_s=0.4, wire_s=0.05) == LARGE_CHUNK
    assert chunk_size(prefill_s=0.4, wire_s=0.5) == SMALL_CHUNK
