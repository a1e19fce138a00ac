"""What a device is told of what it said offline, once the log speaks again; and that a turn's id
names one question, whether its edge has a cloud or not. Real log, real gRPC, the tiny model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import segue
from segue_contract.errors import (
    SessionDeleted,
    TurnConflict,
    TurnFailed,
    UnknownTurn,
    Unreachable,
)
from segue_contract.ids import SessionName, TurnName
from segue_contract.servers import Valkey
from segue_contract.sync.branches import branches
from segue_contract.sync.state import SessionState
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.node import EdgeNode
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.edge_node import Device, device_of, edge_node
from tests.support.scripted_engine import ScriptedEngine
from tests.support.slow_proxy import SlowProxy
from tests.support.tiny_edge import MANIFEST, tiny_tokenizer

TRIP = SessionName("default", "trip")
CLOUD_SAYS = "The cloud's own words."
WAIT_S = 30.0


@dataclass
class Place:
    """A cloud, and an edge whose link to it can be cut."""

    cloud: CloudRpc
    proxy: SlowProxy
    edge: EdgeNode
    phone: Device  # of the edge
    session: segue.Session  # the same through the SDK
    direct: Device  # a laptop, of the cloud itself

    def go_offline(self) -> None:
        self.proxy.refuse = True
        self.proxy.cut()

    def come_back(self) -> None:
        self.proxy.refuse = False

    async def state(self) -> SessionState:
        return await self.cloud.log.state(TRIP)

    async def until_delivered(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.edge.outbox):
                await self.edge.outbox.flush()
                await asyncio.sleep(0.05)


@asynccontextmanager
async def place(valkey: Valkey, tmp_path: Path, outbox: Path | None = None) -> AsyncIterator[Place]:
    engine = ScriptedEngine([*CLOUD_SAYS.encode()])
    async with (
        cloud_rpc(
            valkey.url, tmp_path, engine, manifest=MANIFEST, tokenizer=tiny_tokenizer()
        ) as cloud,
        SlowProxy(int(cloud.address.rpartition(":")[2])) as proxy,
        edge_node(f"127.0.0.1:{proxy.port}", outbox=outbox) as edge,
        device_of(edge) as phone,
        segue.Client(edge.server.address, device="phone") as client,
    ):
        session = await client.session("trip")
        direct = Device(cloud.address)
        try:
            await phone.run("t0", "Hello", plan="text")
            yield Place(cloud, proxy, edge, phone, session, direct)
        finally:
            await direct.close()


@pytest.fixture
async def here(valkey: Valkey, tmp_path: Path) -> AsyncIterator[Place]:
    async with place(valkey, tmp_path) as made:
        yield made


async def said_offline(here: Place, turn: str = "t1", prompt: str = "And now?") -> segue.Turn:
    async with here.session.run(prompt, turn=turn, max_tokens=12) as running:
        async for _ in running:
            pass
    assert running.ended is not None
    assert running.ended.pending
    return running


async def settle(turn: segue.Turn) -> list[object]:
    async with asyncio.timeout(WAIT_S):
        return [event async for event in turn.settled()]


async def test_what_the_log_keeps_becomes_durable(here: Place) -> None:
    here.go_offline()
    turn = await said_offline(here)
    shown = turn.text
    settling = asyncio.create_task(settle(turn))
    assert here.edge.outbox.find(TurnName(TRIP, "t1")) is not None
    assert not settling.done()
    here.come_back()
    told = await settling
    assert [type(event) for event in told] == [segue.Durable, segue.Ended]
    assert turn.ended is not None
    assert turn.ended.durable
    assert turn.text == shown == (await here.state()).turns[-1].text


async def test_where_the_log_has_another_reply_the_asker_gets_it(here: Place) -> None:
    here.go_offline()
    turn = await said_offline(here)
    shown = turn.text
    assert (await here.direct.run("t1", "And now?", max_tokens=12)).text == CLOUD_SAYS[:12]
    here.come_back()
    told = await settle(turn)
    assert isinstance(told[0], segue.Rewound)
    assert turn.text == CLOUD_SAYS[:12] != shown
    assert turn.ended is not None
    assert turn.ended.durable
    again = await here.phone.run("t1", "And now?", max_tokens=12)
    assert again.text == CLOUD_SAYS[:12]


async def test_what_the_log_refuses_for_good_is_told_and_the_rest_goes_on(here: Place) -> None:
    here.go_offline()
    refused = await said_offline(here, "t1", "And now?")
    kept = await said_offline(here, "t2", "And then?")
    await here.direct.run("t1", "Something else entirely.", max_tokens=12)
    opened = await here.phone.open()
    assert [(one.turn, one.device, one.title, one.error_code) for one in opened.offline_turns] == [
        ("t1", "phone", "And now?", ""),
        ("t2", "phone", "And then?", ""),
    ]
    here.come_back()
    (told,) = await settle(refused)
    assert isinstance(told, segue.Ended)
    assert told.error is not None
    assert told.error.fields["code"] == "turn_conflict"
    await settle(kept)
    state = await here.state()
    assert [(turn.turn, turn.offline, turn.follows) for turn in state.turns] == [
        ("t0", False, ""),
        ("t1", False, ""),
        ("t2", True, "t0"),
    ]
    (branch,) = branches(state.turns)
    assert (branch.after, branch.beside, branch.turns) == ("t0", ("t1",), ("t2",))
    opened = await here.phone.open()
    assert [(one.turn, one.error_code) for one in opened.offline_turns] == [("t1", "turn_conflict")]
    # A device that comes back to it later is told the same, and nothing is run again.
    again = await here.phone.run("t1", "And now?", max_tokens=12)
    assert (again.ended.reason, again.ended.error_code) == ("error", "turn_conflict")
    # Until it says that its user knows.
    assert await here.session.dismiss("t1", "t2") == 1
    opened = await here.phone.open()
    assert not opened.offline_turns
    # No prompt to come holds it.
    await here.phone.run("t3", "Go on", plan="text")
    prompt = here.cloud.tokenizer.decode(here.cloud.engine.turns[-1].prompt)
    assert "And then?" in prompt
    assert "And now?" not in prompt


async def test_a_session_that_was_deleted_meanwhile_stays_deleted(here: Place) -> None:
    here.go_offline()
    first = await said_offline(here, "t1", "And now?")
    second = await said_offline(here, "t2", "And then?")
    await here.direct.call("DeleteSession", pb.DeleteSessionRequest(session="trip"))
    here.come_back()
    for turn in (first, second):
        (told,) = await settle(turn)
        assert isinstance(told, segue.Ended)
        assert told.error is not None
        assert told.error.fields["code"] == "session_deleted"
    with pytest.raises(SessionDeleted):
        await here.state()
    assert [turn.asked.turn for turn in here.edge.outbox.refused] == ["t1", "t2"]
    here.go_offline()  # nor does it go on at the edge alone
    with pytest.raises(Unreachable):
        await here.phone.open()


async def test_a_refusal_outlives_a_restart(valkey: Valkey, tmp_path: Path) -> None:
    outbox = tmp_path / "outbox"
    async with place(valkey, tmp_path, outbox) as here:
        here.go_offline()
        await said_offline(here, "t1", "And now?")
        await here.direct.run("t1", "Something else entirely.", max_tokens=12)
        here.come_back()
        await here.until_delivered()
        await here.edge.__aexit__(None, None, None)
        async with (
            edge_node(here.cloud.address, outbox=outbox) as edge,
            device_of(edge) as phone,
        ):
            told = await phone.run("t1", "And now?", max_tokens=12, must_exist=True)
    assert (told.ended.reason, told.ended.error_code) == ("error", "turn_conflict")
    assert not told.ended.durable


async def test_a_turn_that_must_exist_is_never_begun(here: Place) -> None:
    for device in (here.phone, here.direct):
        with pytest.raises(UnknownTurn):
            await device.run("t9", "Hello", must_exist=True)
    assert [turn.turn for turn in (await here.state()).turns] == ["t0"]


async def test_an_id_names_one_question_running_ended_and_offline(here: Place) -> None:
    async def conflicts(turn: str, prompt: str, **more: object) -> None:
        with pytest.raises(TurnConflict):
            await here.phone.run(turn, prompt, **more)

    await conflicts("t0", "Something else")
    await conflicts("t0", "Hello", max_tokens=13)
    here.cloud.engine._free = False
    running = here.phone.stream("t1", "And now?", plan="text")
    await running.read()
    await conflicts("t1", "Something else")
    here.cloud.engine.allow(12)
    while await running.read():
        pass
    here.go_offline()
    await conflicts("t1", "Something else")  # ended, and kept by the registry
    here.edge.registry.forget(TurnName(TRIP, "t1"))
    await conflicts("t1", "Something else")  # known to the history alone
    again = await here.phone.run("t1", "And now?")
    assert again.text == CLOUD_SAYS[:12]
    assert again.ended.durable
    await said_offline(here, "t2", "And then?")
    here.edge.registry.forget(TurnName(TRIP, "t2"))
    await conflicts("t2", "Something else")  # waits in the outbox
    kept = await here.phone.run("t2", "And then?")
    assert not kept.ended.durable
    assert len(kept.text) == 12


async def test_a_turn_that_failed_is_told_offline_as_well(here: Place) -> None:
    """The edge knows of it from the log, without the message that no prompt will hold."""
    here.cloud.engine.fail_at = (0, TurnFailed("The engine broke."))
    await here.direct.run("t1", "What is wrong?")
    here.cloud.engine.fail_at = None
    await here.phone.run("t2", "And now?", plan="text")
    here.go_offline()
    again = await here.phone.run("t1", "What is wrong?")
    assert (again.ended.reason, again.ended.error_code) == ("error", TurnFailed.code)
