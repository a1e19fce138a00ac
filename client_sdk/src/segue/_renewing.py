"""A token that the app renews: what goes on under the old one is put under the new one in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import msgspec

from segue_contract import base64url
from segue_contract.errors import UNREADABLE
from segue_contract.limits import RENEW_LEAD_S, RENEW_PAUSE_S

Sleep = Callable[[float], Awaitable[object]]


class _Claims(msgspec.Struct):
    exp: float


def expires_s(token: str) -> float:
    """Unix seconds when the token runs out, as it says itself; inf where it cannot be read. Nodes
    verify it, not its bearer."""
    _, _, rest = token.partition(".")
    payload, _, _ = rest.partition(".")
    try:
        return msgspec.json.decode(base64url.decode(payload), type=_Claims).exp
    except (*UNREADABLE, ValueError):
        return float("inf")


async def keep_renewed(
    token: Callable[[], str],
    renew: Callable[[], Awaitable[object]],
    *,
    now_s: Callable[[], float] = time.time,
    sleep: Sleep = asyncio.sleep,
) -> None:
    """Ask `token` again some time before it runs out, and `renew` with what it gives then. Runs
    until it is cancelled, or the token has no end.

    `token` may give the same one for as long as it likes: it is asked again every few seconds, also
    after it, or `renew`, failed in whatever way: every other call of the client says that, too.
    """
    while (ends_s := _first_end_s(token)) is None:
        await sleep(RENEW_PAUSE_S)
    while ends_s < float("inf"):
        left_s = ends_s - now_s()
        await sleep(max(RENEW_PAUSE_S, left_s - min(RENEW_LEAD_S, left_s / 2)))
        try:
            fresh_s = expires_s(token())
            if fresh_s > ends_s:
                await renew()
                ends_s = fresh_s
        except Exception:  # the app's function asks its back end, in its own way
            continue


def _first_end_s(token: Callable[[], str]) -> float | None:
    try:
        return expires_s(token())
    except Exception:
        return None
