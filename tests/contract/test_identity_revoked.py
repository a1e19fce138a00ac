"""The pure parts of revocation and of bad tokens, against plain models."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue_contract.errors import Overloaded, Revoked, Unauthenticated
from segue_contract.identity.bad_tokens import BadTokens, address_of
from segue_contract.identity.principal import Kind, Principal, covers, local
from segue_contract.identity.revoked import Watermarks
from segue_contract.limits import (
    BAD_TOKEN_KEPT_S,
    BAD_TOKENS_BURST,
    BAD_TOKENS_OF_ALL,
    BAD_TOKENS_PER_S,
)

NAMES = st.sampled_from(["a", "ab", "abc", "b.1", "b.2"])
PATTERNS = st.one_of(NAMES, st.sampled_from(["*", "a*", "ab*", "b.*"]))
DEVICES = st.sampled_from(["phone", "laptop"])
MARK = st.tuples(st.sampled_from(["x", "y"]), PATTERNS, DEVICES, st.integers(1, 9))


@given(
    st.lists(MARK, max_size=12),
    st.integers(0, 9),
    st.lists(PATTERNS, min_size=1, max_size=3),
    NAMES,
    st.integers(0, 9),
)
def test_a_token_is_void_where_a_later_watermark_covers_the_session(
    marks: list[tuple[str, str, str, int]],
    forgotten: int,
    sessions: list[str],
    session: str,
    issued: int,
) -> None:
    known = Watermarks()
    for mark in marks:
        known.add(*mark)
    known.forget(forgotten)
    latest: dict[tuple[str, str, str], int] = {}
    for tenant, pattern, device, before in marks:
        latest[tenant, pattern, device] = max(before, latest.get((tenant, pattern, device), 0))
    mine = [
        pattern
        for (tenant, pattern, device), before in latest.items()
        if (tenant, device) == ("x", "phone") and before > issued and before >= forgotten
    ]
    who = Principal(Kind.DEVICE, "x", "phone", tuple(sessions), frozenset(), issued_s=float(issued))
    void = any(covers(pattern, session) for pattern in mine)
    assert known.is_void(who, session) is void
    whole = all(any(covers(mark, one) for mark in mine) for one in sessions)
    for named, wanted in (((session,), void), ((), bool(mine) and whole)):
        if wanted:
            with pytest.raises(Revoked):
                known.check(who, named)
        else:
            known.check(who, named)
    known.check(local("x", "phone"), (session,))
    # whoever asks for what is new gets each once, in order
    kept = {key for key, before in latest.items() if before >= forgotten}
    told, place = [], 0
    while some := known.after(place, 2):
        told += some
        place = some[-1].place
    assert {(one.tenant, one.sessions, one.device) for one in told} == kept
    assert len(told) == len(kept) == len(known)
    assert [one.place for one in told] == sorted(one.place for one in told)


def test_what_is_raised_again_is_news_and_the_oldest_goes_first() -> None:
    known = Watermarks(most=2)
    assert known.add("x", "a", "phone", 1.0)
    assert known.add("x", "b", "phone", 1.0)
    assert not known.add("x", "a", "phone", 1.0)
    assert known.add("x", "a", "phone", 2.0)
    assert [one.sessions for one in known.after(2, 9)] == ["a"]
    assert known.add("x", "c", "phone", 1.0)
    assert [one.sessions for one in known.after(0, 9)] == ["a", "c"]


def test_bad_tokens_cost_bounded_work() -> None:
    bad, work = BadTokens(kept=8, peers=4), 0

    def verify() -> Any:
        nonlocal work
        work += 1
        raise Unauthenticated("It is bad.", hint="Ask.")

    seconds, per_s = 10, int(3 * BAD_TOKENS_PER_S)
    for number in range(per_s * seconds):
        known = (Unauthenticated,) if number < BAD_TOKENS_BURST else (Unauthenticated, Overloaded)
        with pytest.raises(known):
            bad.checked("10.0.0.1", f"t{number}", number / per_s, verify)
    assert work == pytest.approx(BAD_TOKENS_BURST + BAD_TOKENS_PER_S * seconds, abs=2)
    last_s = seconds - 1 / per_s
    assert bad.checked("10.0.0.2", "good", last_s, lambda: 7) == 7
    with contextlib.suppress(Unauthenticated, Overloaded):
        bad.checked("10.0.0.1", "last", last_s, verify)
    with pytest.raises(Overloaded):
        bad.checked("10.0.0.1", "good", last_s, lambda: 7)
    for number in range(50):
        with pytest.raises(Unauthenticated, match="bad"):
            bad.checked(f"10.0.1.{number}", f"u{number}", 100.0, verify)
    assert (len(bad._refused), len(bad._peers)) == (8, 4)
    # the same one again is told the same, for a moment
    before = work
    with pytest.raises(Unauthenticated) as told:
        bad.checked("10.0.9.9", "u49", 100.0, lambda: 7)
    assert (told.value.message, told.value.hint, work) == ("It is bad.", "Ask.", before)
    assert bad.checked("10.0.9.9", "u49", 100.0 + BAD_TOKEN_KEPT_S, lambda: 7) == 7


def test_bad_tokens_lock_nobody_out_behind_the_same_address() -> None:
    """Fifty a second for a minute, and each second a device there renews its token."""
    bad = BadTokens()

    def verify() -> Any:
        raise Unauthenticated("It is bad.")

    for number in range(50 * 60):
        with pytest.raises(Unauthenticated):
            bad.checked("10.0.0.1", f"t{number}", number / 50, verify)
        if number % 50 == 0:
            assert bad.checked("10.0.0.1", f"good{number}", number / 50, lambda: 7) == 7


def test_bad_tokens_of_many_addresses_cost_bounded_work() -> None:
    bad, work = BadTokens(), 0

    def verify() -> Any:
        nonlocal work
        work += 1
        raise Unauthenticated("It is bad.")

    most = BAD_TOKENS_OF_ALL * BAD_TOKENS_BURST
    for number in range(2 * most):
        with pytest.raises((Unauthenticated, Overloaded)):
            bad.checked(f"10.0.0.{number}", f"t{number}", 1.0, verify)
    assert work == most


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.1:4711", "10.0.0.1"),
        ("ipv6:[2001:db8::1]:4711", "2001:db8::/64"),
        ("ipv6:%5B2001:db8::ffff%5D:4711", "2001:db8::/64"),
        ("ipv6:[::ffff:10.0.0.1]:4711", "10.0.0.1"),
        ("unix:/run/x", "unix:/run/x"),
        ("", ":"),
    ],
)
def test_a_peer_is_its_address_without_the_port(peer: str, address: str) -> None:
    assert address_of(peer) == address
