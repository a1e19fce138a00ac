"""A turn's lease and end wait for the store's replica: real Valkeys, a bad link between them."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from segue_cloud.sessions.keys import SessionKeys
from segue_cloud.sessions.port import Status, TurnHold
from segue_cloud.sessions.store import SCRIPTS, RedisStore
from segue_cloud.sessions.wire import Wire
from segue_contract.errors import StoreUnavailable
from segue_contract.ids import SessionName
from segue_contract.limits import StoreLimits
from segue_contract.servers import Valkey
from segue_contract.sync import ops
from tests.support.store_pair import command, linked_pair

S = SessionName("default", "trip")
WAIT_S = 30.0
LEASE_S = 60.0
END = ops.encode_op(ops.TurnEnded(id="e", turn="t1", epoch=1, reason="stop"))


async def begun(store: RedisStore) -> TurnHold:
    await store.open_session(S)
    start = ops.encode_op(ops.TurnStarted(id="s", turn="t1", epoch=1))
    claim = await store.begin_turn(S, "t1", [start], LEASE_S)
    assert claim.status is Status.OK
    return claim.hold("t1")


async def at_replica(replica: Valkey, *fields: str) -> list[str]:
    """Fields of the session's meta, as the replica has them now."""
    async with command(replica) as wire:
        (values,) = await wire.call(("HMGET", SessionKeys.of(S).meta, *fields))
    return [(value or b"").decode() for value in values]


async def test_the_replica_has_a_lease_and_an_end_when_the_call_returns() -> None:
    """Its link is slow: what nobody waits for arrives later."""
    delay_s = 0.0
    async with asyncio.timeout(WAIT_S), linked_pair(lambda: delay_s) as (primary, replica, _):
        delay_s = 0.1
        store = await RedisStore.connect(f"{primary.url}?wait_ms=1000")
        hold = await begun(store)
        assert await at_replica(replica, "cur", "t:t1") == ["t1", "1|0|"]
        await store.renew_turn(S, hold, 2 * LEASE_S)
        async with command(primary) as wire:
            (lease,) = await wire.call(("HGET", SessionKeys.of(S).meta, "lease"))
        assert await at_replica(replica, "lease") == [lease.decode()]
        taken = (await store.take_over(S, "t1", LEASE_S)).hold("t1")
        assert (await at_replica(replica, "t:t1"))[0].startswith("2|")
        assert (await store.append_turn(S, taken, 1, [END], ends=True)).status is Status.OK
        assert await at_replica(replica, "cur") == [""]
        assert store.replica_waits == {"confirmed": 4, "short": 0, "none": 0}
        await store.close()


async def test_a_store_without_a_replica_is_not_waited_for(valkey: Valkey) -> None:
    store = await RedisStore.connect(valkey.url)
    await begun(store)
    assert store.replica_waits == {"confirmed": 0, "short": 0, "none": 1}
    await store.close()


async def test_a_silent_replica_costs_a_moment_and_is_told_once() -> None:
    async with asyncio.timeout(WAIT_S), linked_pair() as (primary, _, link):
        store = await RedisStore.connect(f"{primary.url}?wait_ms=20")
        link.stall()
        with capture_logs() as logs:
            hold = await begun(store)
            await store.renew_turn(S, hold, LEASE_S)
            assert (await store.append_turn(S, hold, 1, [END], ends=True)).status is Status.OK
        assert [one["event"] for one in logs if one["log_level"] == "warning"] == [
            "replicas_behind"
        ]
        assert store.replica_waits == {"confirmed": 0, "short": 3, "none": 0}
        link.flow()
        await store.close()


async def test_a_repeated_claim_waits_for_what_it_wrote_then() -> None:
    """Over a connection without a write of its own nothing seems to be left to wait for."""
    async with asyncio.timeout(WAIT_S), linked_pair() as (primary, _, link):
        wire = Wire(f"{primary.url}?wait_ms=20", scripts=SCRIPTS)
        store = RedisStore(wire, random_bytes=bytes)  # one claim, repeated
        await begun(RedisStore(wire))
        link.stall()
        first = await store.take_over(S, "t1", LEASE_S)
        async with command(primary) as other:
            await other.call(("CLIENT", "KILL", "TYPE", "normal"))
        again = await store.take_over(S, "t1", LEASE_S)
        assert (again.status, again.epoch) == (Status.OK, first.epoch)
        assert store.replica_waits == {"confirmed": 1, "short": 2, "none": 0}
        link.flow()
        await store.close()


async def test_a_strict_wait_makes_an_error_of_it_until_the_replica_has_it() -> None:
    async with asyncio.timeout(WAIT_S), linked_pair() as (primary, replica, link):
        store = await RedisStore.connect(
            f"{primary.url}?wait=strict&wait_ms=20", limits=StoreLimits(timeout_s=1.0)
        )
        patient = await RedisStore.connect(
            f"{primary.url}?wait=strict&wait_ms=20", limits=StoreLimits(timeout_s=WAIT_S)
        )
        hold = await begun(patient)
        link.stall()
        with pytest.raises(StoreUnavailable, match="NOREPLICAS 0 of 1"):
            await store.renew_turn(S, hold, LEASE_S)
        ending = asyncio.ensure_future(patient.append_turn(S, hold, 1, [END], ends=True))
        while not patient.replica_waits["short"]:  # noqa: ASYNC110 a count, not an event
            await asyncio.sleep(0)
        assert not ending.done()
        link.flow()
        assert (await ending).status is Status.DUP
        assert await at_replica(replica, "cur") == [""]
        await store.close()
        await patient.close()


async def test_a_strict_wait_takes_no_lease_from_a_store_without_replicas(valkey: Valkey) -> None:
    store = await RedisStore.connect(f"{valkey.url}?wait=strict", limits=StoreLimits(timeout_s=1.0))
    with pytest.raises(StoreUnavailable, match="NOREPLICAS"):
        await begun(store)
    await store.close()
