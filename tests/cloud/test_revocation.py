"""A right that ends: revoked, or run out, on calls that are made and on streams that go on. Real
servers, two instances on one store; the gate's clock is the test's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from segue_cloud.log.session_log import SessionLog
from segue_cloud.rpc.revoking import following_revocations
from segue_cloud.sessions.keys import REVOKED_KEY
from segue_cloud.sessions.port import Bearer, LogOp, Producer, Revocation, Status
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import (
    InvalidArgument,
    PermissionDenied,
    Revoked,
    StoreUnavailable,
    Unauthenticated,
    UnknownSession,
)
from segue_contract.identity.principal import Right
from segue_contract.ids import SessionName
from segue_contract.limits import CLOCK_SKEW_S, EXPIRY_GRACE_S
from segue_contract.servers import Valkey
from segue_contract.sync.ops import Set, encode_op
from segue_contract.transport.bearer import bearer
from segue_contract.transport.gate import Gate
from segue_contract.v1 import agent_pb2 as pb
from tests.support.cloud_rpc import cloud_rpc
from tests.support.edge_node import device_of, edge_node
from tests.support.keyed_clouds import TRIP, WAIT_S, Place, end_of, keyed_clouds, opened
from tests.support.principals import EDGE, KnownTokens
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer


@pytest.fixture
async def here(valkey: Valkey, tmp_path: Path) -> AsyncIterator[Place]:
    async with keyed_clouds(valkey.url, tmp_path) as place:
        yield place


async def test_a_revoked_device_gets_nothing_more_at_any_instance(here: Place) -> None:
    phone, laptop = here.token("phone"), here.token("laptop")
    epochs = {
        name: (await opened(here, token, name)).epoch
        for name, token in (("phone", phone), ("laptop", laptop))
    }
    lost = [await here.attach(at, phone, "phone") for at in (0, 1)]
    kept = await here.attach(1, laptop, "laptop")
    read = pb.ReadRequest(session="trip", device="phone")
    await here.call(1, phone, "Read", read)

    mine = here.token("laptop", rights=frozenset(Right) - {Right.ADMIN})
    asked = pb.RevokeRequest(session="trip", revoked="phone")
    with pytest.raises(PermissionDenied):
        await here.call(0, mine, "Revoke", asked)
    await here.call(0, laptop, "Revoke", asked)

    assert [type(await end_of(stream)) for stream in lost] == [Revoked, Revoked]
    for method, request in (
        ("Read", read),
        ("OpenSession", pb.OpenSessionRequest(session="trip", device="phone")),
        ("Tails", pb.TailsRequest(device="phone", sessions=["trip"])),
    ):
        with pytest.raises(Revoked):
            await here.call(1, phone, method, request)
    # the log itself refuses, whatever an instance has heard of it
    op = LogOp.of(Set(id="a", device="phone", name="a", value=b""))
    log = here.clouds[1].log
    for name, status in (("phone", Status.REVOKED), ("laptop", Status.OK)):
        bears = Bearer(name, int((time.time() - 60) * 1000))
        producer = Producer(name, epochs[name], 1, bears)
        assert (await log.append(TRIP, producer, [op])).status is status
    with pytest.raises(Revoked):
        await log.check_device(TRIP, "phone", Bearer("phone", 1))
    # the other device goes on, and so does this one with a token of later
    async with asyncio.timeout(WAIT_S):
        while (await kept.read()).WhichOneof("kind") != "entries":
            pass
    kept.cancel()
    later = here.token("phone", age_s=-CLOCK_SKEW_S - 5)
    await here.call(1, later, "Read", read)


async def test_who_may_only_read_fences_no_writer(here: Place) -> None:
    laptop = here.token("laptop")
    epoch = (await opened(here, laptop, "laptop")).epoch
    reader = here.token("phone", rights=frozenset({Right.READ, Right.STOP}))
    request = pb.OpenSessionRequest(session="trip", device="phone", producer="laptop")
    assert (await here.call(1, reader, "OpenSession", request)).epoch == 0
    op = encode_op(Set(id="a", device="laptop", name="a", value=b""))
    append = pb.AppendRequest(
        session="trip", device="laptop", producer="laptop", epoch=epoch, first_seq=1, ops=[op]
    )
    await here.call(0, laptop, "Append", append)


async def test_a_token_of_an_issuer_whose_clock_is_ahead_is_void_as_well(here: Place) -> None:
    """Such a token is taken, up to half a minute before its time; it outlived a revocation."""
    laptop, ahead = here.token("laptop"), here.token("phone", age_s=-25)
    await opened(here, ahead, "phone")
    await opened(here, laptop, "laptop")
    stream = await here.attach(1, ahead, "phone")
    await here.call(0, laptop, "Revoke", pb.RevokeRequest(session="trip", revoked="phone"))
    assert type(await end_of(stream)) is Revoked
    bears = Bearer("phone", int((time.time() + 25) * 1000))
    with pytest.raises(Revoked):
        await here.clouds[0].log.check_device(TRIP, "phone", bears)


async def test_a_device_is_revoked_for_all_sessions_that_begin_so(here: Place) -> None:
    phone = here.token("phone", sessions=("tr*", "other"))
    laptop = here.token("laptop")
    for session in ("trip", "trap", "other"):
        for token, device in ((phone, "phone"), (laptop, "laptop")):
            request = pb.OpenSessionRequest(session=session, device=device)
            await here.call(0, token, "OpenSession", request)
    stream = await here.attach(1, phone, "phone")
    some = here.token("laptop", sessions=("tri*", "trap"))
    with pytest.raises(PermissionDenied):
        await here.call(0, some, "Revoke", pb.RevokeRequest(session="tr*", revoked="phone"))
    for bad in ("", "*tr", "t*r", "tr**"):
        with pytest.raises((InvalidArgument, PermissionDenied)):
            await here.call(0, laptop, "Revoke", pb.RevokeRequest(session=bad, revoked="phone"))
    await here.call(0, laptop, "Revoke", pb.RevokeRequest(session="tr*", revoked="phone"))

    assert type(await end_of(stream)) is Revoked
    bears = Bearer("phone", int((time.time() - 60) * 1000))
    log = here.clouds[1].log
    for session in ("trip", "trap"):
        with pytest.raises(Revoked):
            await log.check_device(SessionName("acme", session), "phone", bears)
    await log.check_device(SessionName("acme", "other"), "phone", bears)
    # nor does it make such sessions: here no gate is asked
    new = SessionName("acme", "tree")
    with pytest.raises(Revoked):
        await log.open_session(new, device="phone", bearer=bears)
    with pytest.raises(UnknownSession):
        await log.open_session(new, must_exist=True)
    later = Bearer("phone", int((time.time() + CLOCK_SKEW_S + 5) * 1000))
    assert (await log.open_session(new, device="phone", bearer=later)).created
    assert (await log.open_session(SessionName("b", "tree"), device="phone", bearer=bears)).created
    assert (await here.call(0, phone, "Read", pb.ReadRequest(session="other", device="phone"))).tail


async def test_all_hear_of_a_revocation_before_its_sessions_are_marked(
    valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And these are, although whoever asked for it left meanwhile."""
    store = await RedisStore.connect(valkey.url)
    await store.open_session(TRIP, device="phone")
    reached, goes_on, marked = asyncio.Event(), asyncio.Event(), asyncio.Event()
    call_each = store._wire.call_each

    async def held(*commands: Any) -> Any:
        reached.set()
        await goes_on.wait()
        found = await call_each(*commands)
        marked.set()
        return found

    monkeypatch.setattr(store._wire, "call_each", held)
    asked = asyncio.create_task(store.revoke(SessionName("acme", "*"), "phone"))
    await asyncio.wait_for(reached.wait(), WAIT_S)
    told, _ = await store.revocations(0)
    assert [(one.session.session, one.device) for one in told] == [("*", "phone")]
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    bears = Bearer("phone", int((time.time() - 60) * 1000))
    await store.check_device(TRIP, "phone", bears)
    goes_on.set()
    await asyncio.wait_for(marked.wait(), WAIT_S)
    with pytest.raises(Revoked):
        await store.check_device(TRIP, "phone", bears)
    await store.close()


async def test_a_session_that_was_made_as_the_device_was_revoked_is_void_for_it(
    valkey: Valkey,
) -> None:
    """The revocation looked for sessions before this one was there."""
    store = await RedisStore.connect(valkey.url)
    await store.revoke(SessionName("acme", "*"), "phone")
    await store.open_session(TRIP, device="phone")
    bears = Bearer("phone", int((time.time() - 60) * 1000))
    await store.check_device(TRIP, "phone", bears)
    with pytest.raises(Revoked):
        await store._revoked.check_made(TRIP, bears)
    with pytest.raises(Revoked):
        await store.check_device(TRIP, "phone", bears)
    await store.close()


async def test_revocations_are_heard_of_after_any_error() -> None:
    heard = asyncio.Event()
    told = [Revocation(TRIP, "phone", 1000)]
    outcomes: list[Any] = [
        [],
        ValueError("?"),
        StoreUnavailable("It is away."),
        KeyError("?"),
        told,
    ]

    class Log:
        async def revocations(self, since_ms: int) -> tuple[list[Revocation], int]:
            outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
            if isinstance(outcome, Exception):
                raise outcome
            return outcome, 1000

    class Told(Gate):
        def revoke(self, tenant: str, session: str, device: str, before_s: float) -> None:
            assert (tenant, session, device, before_s) == ("acme", "trip", "phone", 1.0)
            heard.set()

    async with following_revocations(cast(SessionLog, Log()), Told("default"), every_s=0.0):
        await asyncio.wait_for(heard.wait(), WAIT_S)


async def test_a_revocation_is_read_for_some_time_and_no_longer() -> None:
    """And where an instance could not look for long, nothing that came meanwhile is left out."""
    looked, marks, now_ms = asyncio.Queue[list[int]](1), [1_030_000], 1_000_000
    away = False

    class Log:
        async def revocations(self, since_ms: int) -> tuple[list[Revocation], int]:
            found, fails = [at for at in marks if at >= since_ms], away
            await looked.put([] if fails else found)
            if fails:
                raise StoreUnavailable("It is away.")
            return [Revocation(TRIP, "phone", at) for at in found], now_ms

    async def read() -> list[int]:
        for _ in range(3):  # one lies in the queue, one waits for it, one saw an earlier time
            await asyncio.wait_for(looked.get(), WAIT_S)
        return await asyncio.wait_for(looked.get(), WAIT_S)

    gate = Gate("default")
    log = cast(SessionLog, Log())
    async with following_revocations(log, gate, every_s=0.0, now_s=lambda: now_ms / 1000):
        assert await read() == marks
        now_ms += 30_000
        assert await read() == marks, "another instance may write one that is older"
        now_ms += 3600_000
        assert await read() == []
        away = True
        await read()
        marks.append(now_ms + 1)
        now_ms += 600_000
        away = False
        async with asyncio.timeout(WAIT_S):
            while await looked.get() != marks[1:]:
                pass
        assert gate.watermarks.last == 2


async def test_what_another_version_wrote_hides_no_revocation(here: Place, valkey: Valkey) -> None:
    await opened(here, here.token("phone"), "phone")
    store = await RedisStore.connect(valkey.url)
    now_ms = (await store.revoke(TRIP, "phone")).before_ms
    for member in (b"\xff", b"{}", b'["acme","trip"]'):
        await store._wire.call(("ZADD", REVOKED_KEY, now_ms, member))
    assert [one.device for one in (await store.revocations(now_ms))[0]] == ["phone"]
    await store.close()


async def test_a_stream_ends_some_time_after_its_token_unless_that_is_renewed(here: Place) -> None:
    ends_s = here.now_s + 100
    short = [here.token(name, expires_s=ends_s) for name in ("phone", "laptop")]
    await opened(here, short[0], "phone")
    await opened(here, short[1], "laptop")
    lost, kept = [
        await here.attach(0, token, name)
        for token, name in zip(short, ("phone", "laptop"), strict=True)
    ]
    narrow = here.token("laptop", expires_s=ends_s + 1000, sessions=("other",))
    assert (await here.call(0, narrow, "Renew", pb.RenewRequest())).calls == 1  # its own
    renewed = here.token("laptop", expires_s=ends_s + 1000)
    assert (await here.call(0, renewed, "Renew", pb.RenewRequest())).calls == 2
    here.now_s = ends_s + 1
    with pytest.raises(Unauthenticated):
        await here.call(0, short[0], "Read", pb.ReadRequest(session="trip", device="phone"))
    here.now_s = ends_s + EXPIRY_GRACE_S + 1
    ended = await end_of(lost)
    assert type(ended) is Unauthenticated
    op = encode_op(Set(id="b", device="laptop", name="b", value=b""))
    reply = await here.call(
        0,
        renewed,
        "OpenSession",
        pb.OpenSessionRequest(session="trip", device="laptop", producer="q"),
    )
    append = pb.AppendRequest(
        session="trip", device="laptop", producer="q", epoch=reply.epoch, first_seq=1, ops=[op]
    )
    await here.call(0, renewed, "Append", append)
    async with asyncio.timeout(WAIT_S):
        while (await kept.read()).WhichOneof("kind") != "entries":
            pass
    kept.cancel()


async def test_streams_through_an_edge_end_as_well(valkey: Valkey, tmp_path: Path) -> None:
    tokens = KnownTokens()
    engine = ScriptedEngine([*b"words"])
    gate = Gate("default", tokens, peer_name=lambda _: EDGE)
    phone, laptop = (tokens.device("acme", name, issued_s=1.0) for name in ("phone", "laptop"))
    async with (
        cloud_rpc(
            valkey.url, tmp_path, engine, manifest=MANIFEST, tokenizer=tiny_tokenizer(), gate=gate
        ) as cloud,
        edge_node(cloud.address, tokens=tokens) as edge,
        device_of(edge, token=phone) as device,
        device_of(edge, "laptop", laptop) as other,
    ):
        await device.open()
        await other.open()
        stream = device.stub.Attach(
            pb.AttachRequest(session="trip", device="phone"), metadata=bearer(phone)
        )
        assert (await stream.read()).WhichOneof("kind") == "snapshot"
        await other.call("Revoke", pb.RevokeRequest(session="trip", revoked="phone"))
        assert type(await end_of(stream)) is Revoked
        with pytest.raises(Revoked):
            await device.run()
        with pytest.raises(Revoked):
            await device.open()
        await other.run("t2", plan="text")
