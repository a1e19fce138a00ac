"""Two tenants whose devices, sessions and turns have the same names, at one edge and one cloud: no
one sees a word of the other. Real log, real gRPC, the tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from segue_contract.errors import InvalidArgument, PermissionDenied, Unauthenticated
from segue_contract.identity.principal import Right
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.sync.state import decode_state
from segue_contract.transport.gate import Gate
from segue_contract.turn.events import Reason
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.node import EdgeNode
from segue_edge.turns.asked import Asked, Shown
from segue_edge.turns.offline.journal import Journal
from segue_edge.turns.offline.outbox import Outbox
from segue_edge.turns.offline.turn import OfflineTurn
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.edge_node import Device, device_of, edge_node
from tests.support.principals import EDGE, KnownTokens
from tests.support.scripted_engine import ScriptedEngine
from tests.support.slow_proxy import SlowProxy
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer

SECRETS = {"acme": "The acme plans.", "umbrella": "The umbrella plans."}
WAIT_S = 30.0


@dataclass
class Place:
    cloud: CloudRpc
    proxy: SlowProxy
    edge: EdgeNode
    tokens: KnownTokens
    phones: dict[str, Device]  # by tenant

    async def text_of(self, tenant: str) -> str:
        reply = await self.phones[tenant].call(
            "Read", pb.ReadRequest(session="trip", device="phone", folded=True)
        )
        state = decode_state(reply.snapshot.state)
        return " ".join(f"{turn.prompt} {''.join(turn.pieces)}" for turn in state.turns)


@pytest.fixture
async def here(valkey: Valkey, tmp_path: Path) -> AsyncIterator[Place]:
    tokens = KnownTokens()
    engine = ScriptedEngine([*b"The cloud's words."])
    gate = Gate("default", tokens, peer_name=lambda _: EDGE)  # the edge alone calls it
    async with (
        cloud_rpc(
            valkey.url, tmp_path, engine, manifest=MANIFEST, tokenizer=tiny_tokenizer(), gate=gate
        ) as cloud,
        SlowProxy(int(cloud.address.rpartition(":")[2])) as proxy,
        edge_node(f"127.0.0.1:{proxy.port}", tokens=tokens) as edge,
        device_of(edge, token=tokens.device("acme")) as acme,
        device_of(edge, token=tokens.device("umbrella")) as umbrella,
    ):
        yield Place(cloud, proxy, edge, tokens, {"acme": acme, "umbrella": umbrella})


async def test_two_tenants_with_the_same_names_never_see_each_others_text(here: Place) -> None:
    for tenant, phone in here.phones.items():
        opened = await phone.open()
        assert (opened.created, opened.tenant) == (True, tenant)
    await asyncio.gather(
        *(here.phones[one].run("t1", SECRETS[one], plan="text") for one in here.phones)
    )
    for tenant in here.phones:
        text = await here.text_of(tenant)
        assert SECRETS[tenant] in text
        assert all(SECRETS[other] not in text for other in SECRETS if other != tenant)
    # out of reach of the cloud too: what waits is each one's own, and so is what is shown again
    here.proxy.refuse = True
    here.proxy.cut()
    for tenant, phone in here.phones.items():
        await phone.run("t2", f"Offline {SECRETS[tenant]}", plan="edge")
    for tenant, phone in here.phones.items():
        opened = await phone.open()
        assert [turn.title for turn in opened.offline_turns] == [f"Offline {SECRETS[tenant]}"]
        assert opened.tenant == tenant
        again = await phone.run("t2", f"Offline {SECRETS[tenant]}", plan="edge")
        assert not again.ended.durable
    here.proxy.refuse = False
    for tenant, phone in here.phones.items():
        async with asyncio.timeout(WAIT_S):  # it is answered once the log has the turn
            settled = await phone.run("t2", f"Offline {SECRETS[tenant]}", must_exist=True)
        assert settled.ended.durable
        text = await here.text_of(tenant)
        assert f"Offline {SECRETS[tenant]}" in text
        assert all(SECRETS[other] not in text for other in SECRETS if other != tenant)
    acme, umbrella = here.phones.values()
    assert (await acme.call("DeleteSession", pb.DeleteSessionRequest(session="trip"))).deleted
    listed = await umbrella.call("ListSessions", pb.ListSessionsRequest())
    assert [one.session for one in listed.sessions] == ["trip"]
    assert SECRETS["umbrella"] in await here.text_of("umbrella")
    assert here.edge.histories.find(SessionName("umbrella", "trip")) is not None


async def test_a_token_covers_its_sessions_and_its_device_alone(here: Place) -> None:
    narrow = here.tokens.device("acme", sessions=("work-*",))
    async with (
        device_of(here.edge, token=narrow) as device,
        device_of(here.edge, token="made-up") as stranger,
        device_of(here.edge, "laptop", narrow) as other,
    ):
        await here.phones["acme"].open("home")
        await device.open("work-1")
        listed = await device.call("ListSessions", pb.ListSessionsRequest())
        assert [one.session for one in listed.sessions] == ["work-1"]
        with pytest.raises(PermissionDenied):
            await device.open("home")
        with pytest.raises(PermissionDenied):
            await device.call("Tails", pb.TailsRequest(device="phone", sessions=["work-1", "home"]))
        with pytest.raises(PermissionDenied):
            await device.run(session="home")
        with pytest.raises(PermissionDenied):
            await other.open("work-1")
        with pytest.raises(Unauthenticated):
            await stranger.open("work-1")
        with pytest.raises(PermissionDenied):  # it is about all sessions of the tenant
            await device.call("ExpireSessions", pb.ExpireSessionsRequest(idle_s=1))


async def test_whoever_may_only_read_makes_no_session_and_stops_nothing(here: Place) -> None:
    reader = here.tokens.device("acme", rights=frozenset({Right.READ}))
    async with device_of(here.edge, token=reader) as device:
        with pytest.raises(Exception, match="no session"):
            await device.open("new")
        with pytest.raises(PermissionDenied):
            await device.call("StopTurn", pb.StopTurnRequest(session="trip", device="phone"))
        with pytest.raises(PermissionDenied):
            await device.run()


async def test_an_import_that_is_refused_is_told_so(here: Place) -> None:
    async def parts() -> AsyncIterator[pb.ImportPart]:
        yield pb.ImportPart(session="home", data=b"")
        await asyncio.Event().wait()  # the device has more to say

    async def nothing() -> AsyncIterator[pb.ImportPart]:
        return
        yield

    narrow = here.tokens.device("acme", sessions=("work-*",))
    async with device_of(here.edge, token=narrow) as device:
        with pytest.raises(PermissionDenied):
            await device.call("ImportSession", parts())
    with pytest.raises(InvalidArgument):
        await here.phones["acme"].call("ImportSession", nothing())


async def test_an_outbox_of_before_is_read(tmp_path: Path) -> None:
    request = pb.RunTurnRequest(
        session="trip", device="phone", turn="t1", prompt="Hello", max_tokens=5
    )
    asked = Asked.of(request, "acme", Shown("secret"))
    turn = OfflineTurn(asked, (1,), (2,), ("x",), Reason.STOP, b"")
    stored = turn.stored()
    assert OfflineTurn.of(1, stored).asked == turn.asked
    assert "secret" not in repr(turn)
    old = {
        name: value
        for name, value in msgspec.to_builtins(stored).items()
        if name not in ("tenant", "token")
    }
    journal = Journal(tmp_path / "outbox")
    assert (tmp_path / "outbox").stat().st_mode & 0o077 == 0
    journal.add(msgspec.convert(old, type(stored)))
    journal.close()

    async def deliver(_: OfflineTurn) -> None:
        raise AssertionError

    outbox = Outbox(deliver, Journal(tmp_path / "outbox"))
    assert outbox.holds(SessionName("default", "trip"))
    assert not outbox.holds(SessionName("acme", "trip"))
    await outbox.close()
