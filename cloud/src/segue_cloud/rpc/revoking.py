"""Tokens that were made void: what the log is told of its callers, and what the gate of the log."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import structlog

from segue_cloud.log.session_log import SessionLog
from segue_cloud.sessions.port import Bearer, Revocation
from segue_contract.errors import SegueError
from segue_contract.identity.principal import Kind
from segue_contract.limits import GATE_LOOK_S, REVOKED_KEPT_S, WATERMARKS_TOLD
from segue_contract.transport.gate import Gate, caller
from segue_contract.transport.together import in_background
from segue_contract.v1 import decode_pb2 as dpb

log = structlog.get_logger("segue.revoking")

# Another instance may write what is older than what was read: its write was repeated, or the store
# that took over has an earlier clock.
_OVERLAP_MS = 60_000


def caller_bearer() -> Bearer | None:
    """The caller's token, as the log compares it; None where it has none."""
    who = caller()
    return Bearer(who.name, int(who.issued_s * 1000)) if who.kind is Kind.DEVICE else None


def tell(gate: Gate, revocation: Revocation) -> None:
    """From now on the gate refuses these tokens, and ends what goes on under them."""
    session = revocation.session
    gate.revoke(session.tenant, session.session, revocation.device, revocation.before_ms / 1000)


def revoked_since(gate: Gate, request: dpb.ProbeRequest) -> dict[str, Any]:
    """What this instance heard of since an edge asked last, as fields of a ProbeReply."""
    after = request.revoked_after if request.revoked_of == gate.life else 0
    marks = [
        dpb.RevokedTokens(
            tenant=mark.tenant,
            sessions=mark.sessions,
            device=mark.device,
            before_ms=math.ceil(mark.before_s * 1000),
            place=mark.place,
        )
        for mark in gate.watermarks.after(after, WATERMARKS_TOLD)
    ]
    return {"revoked": marks, "revoked_of": gate.life}


@contextlib.asynccontextmanager
async def following_revocations(
    session_log: SessionLog,
    gate: Gate,
    *,
    every_s: float = GATE_LOOK_S,
    now_s: Callable[[], float] = time.time,
) -> AsyncIterator[None]:
    """While inside, the gate learns within `every_s` what any instance revoked.

    Raises:
        StoreUnavailable: what was revoked before cannot be read.
    """
    since_ms = await _look(session_log, gate, int((now_s() - REVOKED_KEPT_S) * 1000))

    async def follow(since_ms: int) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                since_ms = await _look(session_log, gate, since_ms)
            except Exception as error:  # nothing more would be revoked here
                known = isinstance(error, SegueError)
                log.warning("revocations_unread", error=str(error), exc_info=not known)
            gate.forget_revoked(now_s() - REVOKED_KEPT_S)

    async with in_background(follow(since_ms), "revocations"):
        yield


async def _look(session_log: SessionLog, gate: Gate, since_ms: int) -> int:
    """Returns from when on to look the next time: it goes with the store's clock, whether or not
    anything is revoked, so that each is read for some time and no longer."""
    found, now_ms = await session_log.revocations(since_ms)
    for revocation in found:
        tell(gate, revocation)
    return now_ms - _OVERLAP_MS
