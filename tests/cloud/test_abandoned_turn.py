"""A turn whose owner let its lease run out, and which a new turn of the session ends."""

from __future__ import annotations

from segue_cloud.log.session_log import SessionLog
from segue_cloud.sessions.store import RedisStore
from segue_contract.ids import SessionName
from segue_contract.limits import StoreLimits
from segue_contract.servers import Valkey
from segue_contract.sync.ops import Frame, TurnEnded, TurnStarted, decode_op
from segue_contract.sync.state import Cursor, find_turn

S = SessionName("default", "trip")


async def test_its_end_says_how_many_tokens_the_log_keeps(valkey: Valkey) -> None:
    """A reader would take tokens back, for good, that stand in the log."""
    store = await RedisStore.connect(
        valkey.url, limits=StoreLimits(lease_s=0.0)
    )  # run out as soon as it is given
    log = SessionLog(store)
    await log.open_session(S, device="phone")
    claim = await log.begin_turn(S, "t1", [TurnStarted(id="s1", turn="t1", epoch=1)], 0.0)
    frame = Frame(id="f1", turn="t1", epoch=1, index=0, tokens=(7, 8), pieces=("a", "b"))
    await log.append_turn(S, claim.hold("t1"), 1, [frame])
    await log.begin_turn(S, "t2", [TurnStarted(id="s2", turn="t2", epoch=1)], 0.0)
    page = await log.read(S, Cursor(), 100)
    ends = [op for op in map(decode_op, (e.op for e in page.entries)) if isinstance(op, TurnEnded)]
    kept = find_turn(await log.state(S), "t1")
    assert kept is not None
    assert [(end.turn, end.usage.completion_tokens) for end in ends] == [("t1", len(kept.tokens))]
    await store.close()
