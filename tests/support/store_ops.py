"""Ops and turns that tests put into a store by its own calls."""

from __future__ import annotations

from segue_cloud.sessions.keys import SessionKeys
from segue_cloud.sessions.port import (
    RawPage,
    Status,
    StoredEntry,
    TurnHold,
)
from segue_cloud.sessions.store import RedisStore
from segue_contract.ids import SessionName
from segue_contract.sync import ops
from segue_contract.sync.state import Cursor

S, NOWHERE = SessionName("default", "trip"), SessionName("default", "nowhere")


def unpack(page: RawPage) -> tuple[Cursor, list[StoredEntry]]:
    return page.tail, page.entries


def op(text: str) -> bytes:
    return ops.encode_op(ops.Set(id=text, name=text, value=text.encode()))


async def texts(store: RedisStore, session: SessionName = S) -> list[str]:
    _, entries = unpack(await store.read(session, Cursor(1, 0), 10_000))
    assert [entry.cursor.offset for entry in entries] == list(range(1, len(entries) + 1))
    found = [ops.decode_op(entry.op) for entry in entries]
    return [one.name for one in found if isinstance(one, ops.Set)]


async def another_life(store: RedisStore) -> None:
    """As after a fail-over: the session began under another server's life."""
    await store._wire.call(("HSET", SessionKeys.of(S).meta, "life", "another"))


def opening(turn: str) -> list[bytes]:
    return [
        ops.encode_op(ops.UserMessage(id=f"u{turn}", turn=turn, text=f"ask {turn}")),
        ops.encode_op(ops.TurnStarted(id=f"s{turn}", turn=turn, epoch=1)),
    ]


async def begin(store: RedisStore, turn: str, lease_s: float) -> TurnHold:
    claim = await store.begin_turn(S, turn, opening(turn), lease_s, title=f"ask {turn}")
    assert claim.status is Status.OK
    return claim.hold(turn)
