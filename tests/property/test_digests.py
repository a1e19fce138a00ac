"""A follower's digests are the log's, and any other op in their place shows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from segue._digests import Digests
from segue_contract.sync.chain import DIGEST_CHARS, chained

OPS = st.lists(st.binary(max_size=20), max_size=30)


@given(ops=OPS, begin=st.integers(0, 30), bound=st.integers(2, 8))
def test_digests_follow_the_log_from_wherever_it_was_read(
    ops: list[bytes], begin: int, bound: int
) -> None:
    log = [b""]
    for op in ops:
        log.append(chained(log[-1], op))
    begin = min(begin, len(ops))
    digests = Digests(bound)
    digests.start(begin, log[begin])
    for offset in range(begin + 1, len(ops) + 1):
        digests.add(offset, ops[offset - 1])
        kept = range(max(begin, offset - bound + 1), offset + 1)
        assert all(digests.at(one) == log[one] for one in kept)
        assert digests.at(kept.start - 1) is None
        assert not any(digests.contradict(one, ops[one - 1]) for one in kept[1:])
        assert all(digests.contradict(one, ops[one - 1] + b"x") for one in kept[1:])
        assert len(log[offset]) == DIGEST_CHARS


def test_after_a_gap_nothing_is_claimed() -> None:
    digests = Digests()
    digests.start(3, b"abc")
    digests.add(5, b"op")
    assert digests.at(3) is None
    assert digests.at(5) is None
    assert not digests.contradict(5, b"other")
