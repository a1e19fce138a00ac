"""When a client renews its token, on a clock of the test's."""

from __future__ import annotations

import asyncio
import os

import pytest

from segue._renewing import expires_s, keep_renewed
from segue_contract.errors import Unreachable
from segue_contract.identity.keys import IssuerKey
from segue_contract.identity.principal import Right
from segue_contract.identity.tokens import issue
from segue_contract.limits import EXPIRY_GRACE_S

KEY = IssuerKey.new("acme", os.urandom)
LIFETIME_S = 600.0
CALLS = 40


class Clock:
    """Time passes in `sleep` alone; it ends the work after `CALLS` of it."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0
        self.sleeps = 0

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds
        self.sleeps += 1
        if self.sleeps > CALLS:
            raise asyncio.CancelledError

    def token(self) -> str:
        return issue(
            KEY,
            device="phone",
            sessions=["*"],
            rights=[Right.READ],
            lifetime_s=LIFETIME_S,
            now_s=self.now_s,
            token_id="t",
        )


async def until_cancelled(work: object) -> None:
    with pytest.raises(asyncio.CancelledError):
        await work  # type: ignore[misc]


@pytest.mark.parametrize("kept_for_s", [0.0, LIFETIME_S - 20])
async def test_it_is_renewed_before_the_stream_ends(kept_for_s: float) -> None:
    clock = Clock()
    given, given_at_s = clock.token(), clock.now_s
    under_s = clock.now_s + LIFETIME_S  # when the streams' token runs out
    renewals = 0

    def token() -> str:
        """The app's: it asks its back end for another one after a time."""
        nonlocal given, given_at_s
        if clock.now_s - given_at_s > kept_for_s:
            given, given_at_s = clock.token(), clock.now_s
        return given

    async def renew() -> None:
        nonlocal under_s, renewals
        renewals += 1
        if renewals % 3 == 0:
            raise Unreachable("The node is away for a moment.")
        assert clock.now_s < under_s + EXPIRY_GRACE_S
        under_s = expires_s(token())

    await until_cancelled(keep_renewed(token, renew, now_s=lambda: clock.now_s, sleep=clock.sleep))
    assert renewals > 2
    assert clock.now_s < under_s + EXPIRY_GRACE_S


async def test_whatever_the_apps_function_raises_it_is_asked_again() -> None:
    clock = Clock()
    asked = renewals = 0

    def token() -> str:
        nonlocal asked
        asked += 1
        if asked % 2:
            raise [KeyError, RuntimeError, ValueError, OSError][asked // 2 % 4]("no back end")
        return clock.token()

    async def renew() -> None:
        nonlocal renewals
        renewals += 1
        if renewals == 1:
            raise KeyError("as the call asks for the token")

    await until_cancelled(keep_renewed(token, renew, now_s=lambda: clock.now_s, sleep=clock.sleep))
    assert renewals > 2


async def test_a_token_that_stays_the_same_is_not_sent_again() -> None:
    clock = Clock()
    given = clock.token()

    async def renew() -> None:
        raise AssertionError

    await until_cancelled(
        keep_renewed(lambda: given, renew, now_s=lambda: clock.now_s, sleep=clock.sleep)
    )


@pytest.mark.parametrize("text", ["", "a.b.c", "a.e30.c", "x" * 50, "a.\udcff.c"])
async def test_what_cannot_be_read_has_no_end(text: str) -> None:
    assert expires_s(text) == float("inf")

    async def renew() -> None:
        raise AssertionError

    await keep_renewed(lambda: text, renew)
