"""Sessions with something in them, for tests of sessions as wholes."""

from __future__ import annotations

import segue
from segue_cloud.sessions.port import Producer
from segue_cloud.sessions.store import RedisStore
from segue_contract.ids import SessionName
from segue_contract.sync.ops import Set, encode_op
from segue_contract.sync.state import SessionState

WAIT_S = 20.0
TRIP = SessionName("default", "trip")


async def talk(client: segue.Client, name: str = "trip", turn: str = "t1") -> segue.Session:
    session = await client.session(name)
    async with session.run("Hello", max_tokens=6, turn=turn) as running:
        await running.result()
    await session.set("theme", "dark")
    return session


def said(state: SessionState) -> dict[str, object]:
    """What a session holds, without where in which log it stands."""
    return {
        "turns": [(turn.turn, turn.prompt, turn.tokens, turn.text, turn.reason) for turn in
                  state.turns],
        "values": state.values,
        "docs": state.docs,
    }  # fmt: skip


async def append_many(store: RedisStore, session: SessionName, count: int, size: int = 8) -> None:
    opened = await store.open_session(session, device="phone", producer="p")
    for start in range(0, count, 100):
        ops = [
            encode_op(Set(id=f"s{i}", device="phone", name=f"n{i % 7}", value=b"v" * size))
            for i in range(start, min(start + 100, count))
        ]
        await store.append(session, Producer("p", opened.epoch, start + 1), ops)
