"""A tenant's quotas at a real server and log: refused before anything is written, for it alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from segue_cloud.tenants.usage import UNLIMITED, TenantUsage
from segue_contract.errors import QuotaExceeded, UnknownSession
from segue_contract.ids import SessionName
from segue_contract.limits import TenantQuotas
from segue_contract.servers import Valkey
from segue_contract.sync.ops import Set, encode_op
from segue_contract.transport.bearer import bearer
from segue_contract.transport.gate import Gate
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.principals import KnownTokens
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer

WAIT_S = 20.0


@dataclass
class Place:
    cloud: CloudRpc
    tokens: KnownTokens
    quotas: dict[str, TenantQuotas]

    def said(self, tenant: str, device: str = "phone") -> Any:
        return bearer(self.tokens.device(tenant, device))

    async def open(self, tenant: str, session: str, device: str = "phone", **more: Any) -> int:
        request = pb.OpenSessionRequest(session=session, device=device, producer=device, **more)
        reply = await _call(self.cloud.agent.OpenSession, request, self.said(tenant, device))
        return int(reply.epoch)

    async def append(self, tenant: str, epoch: int, seq: int, size: int = 1, ops: int = 1) -> None:
        data = [
            encode_op(Set(id=f"o{seq + one}", device="phone", name="x", value=b"x" * size))
            for one in range(ops)
        ]
        request = pb.AppendRequest(
            session="s", device="phone", producer="phone", epoch=epoch, first_seq=seq, ops=data
        )
        await _call(self.cloud.agent.Append, request, self.said(tenant))

    async def turn(self, tenant: str, session: str, turn: str, busy: int = 0) -> None:
        """Ask, and read to the first event but heartbeats."""
        request = pb.RunTurnRequest(
            session=session, device="phone", turn=turn, prompt="Hello", max_tokens=4,
            when_busy=busy,
        )  # fmt: skip
        call = self.cloud.agent.RunTurn(request, timeout=WAIT_S, metadata=self.said(tenant))
        try:
            while (event := await call.read()) is not grpc.aio.EOF:
                if event.WhichOneof("kind") != "heartbeat":
                    return
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error


async def _call(verb: Any, request: Any, metadata: Any) -> Any:
    try:
        return await verb(request, timeout=WAIT_S, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error


@pytest.fixture
async def here(valkey: Valkey, tmp_path: Path) -> AsyncIterator[Place]:
    tokens, quotas = KnownTokens(), dict[str, TenantQuotas]()
    usage = TenantUsage(lambda tenant: quotas.get(tenant, UNLIMITED), time.monotonic)
    async with cloud_rpc(
        valkey.url, tmp_path, ScriptedEngine([5, 6, 7, 8], free=False),
        manifest=MANIFEST, tokenizer=tiny_tokenizer(), gate=Gate("default", tokens), usage=usage,
    ) as cloud:  # fmt: skip
        yield Place(cloud, tokens, quotas)


async def test_sessions_of_a_tenant_are_counted_by_the_store(here: Place) -> None:
    here.quotas["acme"] = replace(UNLIMITED, sessions=2)
    for session in ("one", "two"):
        await here.open("acme", session)
    with pytest.raises(QuotaExceeded) as refused:
        await here.open("acme", "three")
    assert refused.value.fields["what"] == "sessions"
    assert "retry_after_s" not in refused.value.fields
    await here.open("acme", "one")
    await here.open("other", "three")
    with pytest.raises(UnknownSession):
        await here.open("acme", "three", must_exist=True)
    listed = await here.cloud.agent.ListSessions(
        pb.ListSessionsRequest(), metadata=here.said("acme")
    )
    assert sorted(one.session for one in listed.sessions) == ["one", "two"]
    await _call(
        here.cloud.agent.DeleteSession,
        pb.DeleteSessionRequest(session="one"),
        here.said("acme"),
    )
    await here.open("acme", "three")


async def test_devices_ops_and_bytes(here: Place) -> None:
    here.quotas["acme"] = replace(UNLIMITED, devices=1, ops_per_s=1.0, bytes_per_s=1000.0)
    epoch = await here.open("acme", "s")
    with pytest.raises(QuotaExceeded) as refused:
        await here.open("acme", "s", "tablet")
    assert refused.value.fields["what"] == "devices"
    await here.append("acme", epoch, 1, ops=9)
    with pytest.raises(QuotaExceeded) as refused:
        await here.append("acme", epoch, 10, ops=9)
    assert refused.value.fields["what"] == "ops_per_s"
    assert 0 < refused.value.fields["retry_after_s"] <= 10
    here.quotas["acme"] = replace(UNLIMITED, bytes_per_s=1000.0)
    await here.append("acme", epoch, 10, size=8000)
    with pytest.raises(QuotaExceeded) as refused:
        await here.append("acme", epoch, 11, size=8000)
    assert refused.value.fields["what"] == "bytes_per_s"
    await here.append("other", await here.open("other", "s"), 1, size=8000)
    # What was refused left no trace: the same sequence number is the next one.
    here.quotas["acme"] = UNLIMITED
    await here.append("acme", epoch, 11, size=8000)


async def test_followed_sessions_are_counted_while_they_are_followed(here: Place) -> None:
    here.quotas["acme"] = replace(UNLIMITED, attaches=1)
    for tenant in ("acme", "other"):
        await here.open(tenant, "s")
    request = pb.AttachRequest(session="s", device="phone")
    first = here.cloud.agent.Attach(request, timeout=WAIT_S, metadata=here.said("acme"))
    assert await _first(first) == "snapshot"
    second = here.cloud.agent.Attach(request, timeout=WAIT_S, metadata=here.said("acme"))
    with pytest.raises(QuotaExceeded):
        await _first(second)
    other = here.cloud.agent.Attach(request, timeout=WAIT_S, metadata=here.said("other"))
    assert await _first(other) == "snapshot"
    # who joins a turn follows a session, too; whoever begins it does not count twice
    turn = pb.RunTurnRequest(session="s", device="phone", turn="t1", prompt="Hello", max_tokens=4)
    begun = here.cloud.agent.RunTurn(turn, timeout=WAIT_S, metadata=here.said("acme"))
    assert await _first(begun) == "started"
    with pytest.raises(QuotaExceeded):
        await _first(here.cloud.agent.RunTurn(turn, timeout=WAIT_S, metadata=here.said("acme")))
    for call in (first, other, begun):
        call.cancel()
    here.cloud.engine.allow(100)


async def test_turns_at_once_and_tokens_hold_up_their_own_tenant_alone(here: Place) -> None:
    here.quotas["acme"] = replace(UNLIMITED, turns=1)
    for tenant in ("acme", "other"):
        for session in ("one", "two"):
            await here.open(tenant, session)
    await here.turn("acme", "one", "t1")
    before = (await here.cloud.log.tails([_name("acme", "two")]))[0]
    with pytest.raises(QuotaExceeded) as refused:
        await here.turn("acme", "two", "t2")
    assert refused.value.fields["what"] == "turns"
    assert (await here.cloud.log.tails([_name("acme", "two")]))[0] == before, "it was written"
    await here.turn("other", "one", "t1")
    await here.turn("other", "two", "t2")
    await here.turn("acme", "one", "t1")  # a turn that runs is joined, not counted
    owner = here.cloud.manager.owned(_name("acme", "one"), "t1")
    assert owner is not None
    here.quotas["acme"] = replace(UNLIMITED, tokens_per_min=4.0)
    here.cloud.engine.allow(100)
    async with asyncio.timeout(WAIT_S):
        await owner.ended.wait()
    with pytest.raises(QuotaExceeded) as refused:
        await here.turn("acme", "two", "t2")
    assert refused.value.fields["what"] == "tokens_per_min"
    here.quotas["acme"] = UNLIMITED
    await here.turn("acme", "two", "t2")


async def _first(call: Any) -> str:
    """What the stream says first, but for heartbeats."""
    try:
        while (kind := (await call.read()).WhichOneof("kind")) == "heartbeat":
            pass
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    return str(kind)


def _name(tenant: str, session: str) -> SessionName:
    return SessionName(tenant, session)
