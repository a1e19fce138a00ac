"""`Agent` over real gRPC: every bad request gets the error that says what is wrong with it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import segue
from segue_cloud.sessions.keys import SessionKeys
from segue_contract.errors import (
    BadSampling,
    CursorAhead,
    EmptyPrompt,
    InvalidArgument,
    NotLoopback,
    OutcomeUnknown,
    PortInUse,
    PromptTooLong,
    SegueError,
    SequenceGap,
    StaleEpoch,
    UnknownDevice,
    UnknownModel,
    UnknownSession,
)
from segue_contract.ids import SessionName
from segue_contract.limits import MAX_SESSION_DEVICES
from segue_contract.servers import Valkey
from segue_contract.sync.ops import Feedback, Frame, Set, UserMessage, encode_op
from segue_contract.sync.state import decode_state
from segue_contract.transport.channel import open_channel
from segue_contract.transport.server import start_server
from segue_contract.transport.status import error_from_rpc
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.scripted_engine import ScriptedEngine

WAIT_S = 20.0


@pytest.fixture
async def cloud(valkey: Valkey, model_dir: Path) -> AsyncIterator[CloudRpc]:
    async with cloud_rpc(valkey.url, model_dir, ScriptedEngine(range(100, 110))) as running:
        await running.agent.OpenSession(pb.OpenSessionRequest(session="trip", device="phone"))
        yield running


def turn(**changes: Any) -> pb.RunTurnRequest:
    values: dict[str, Any] = {
        "session": "trip", "device": "phone", "turn": "t1", "prompt": "Hello", "max_tokens": 20,
    }  # fmt: skip
    return pb.RunTurnRequest(**(values | changes))


async def run(cloud: CloudRpc, request: pb.RunTurnRequest) -> list[pb.TurnEvent]:
    async with asyncio.timeout(WAIT_S):
        return [event async for event in cloud.agent.RunTurn(request)]


async def news(call: Any) -> pb.AttachEvent:
    """The stream's next event; heartbeats come whenever the machine is slow."""
    while (event := await call.read()).WhichOneof("kind") == "heartbeat":
        pass
    return event


async def refused(call: Callable[[], Awaitable[Any]]) -> SegueError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call()
    error = error_from_rpc(raised.value)
    assert error.message
    details = (raised.value.details() or "").removesuffix("…")
    assert details
    assert str(error).startswith(details)
    return error


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"prompt": ""}, EmptyPrompt),
        ({"prompt": "  \n "}, EmptyPrompt),
        ({"prompt": "x" * 300_000}, PromptTooLong),
        ({"max_tokens": 0}, BadSampling),
        ({"max_tokens": -5}, BadSampling),
        ({"sampling": pb.Sampling(temperature=math.nan)}, BadSampling),
        ({"sampling": pb.Sampling(temperature=-1.0)}, BadSampling),
        ({"sampling": pb.Sampling(top_p=1.5)}, BadSampling),
        ({"stop": [""]}, InvalidArgument),
        ({"plan": "teleport"}, InvalidArgument),
        ({"plan": "ship"}, InvalidArgument),
        ({"session": "no such/session"}, InvalidArgument),
        ({"session": "elsewhere"}, UnknownSession),
        ({"device": "stranger"}, UnknownDevice),
        ({"turn": ""}, InvalidArgument),
    ],
)
async def test_a_bad_turn_is_refused_by_name(
    cloud: CloudRpc, changes: dict[str, Any], error: type[SegueError]
) -> None:
    found = await refused(lambda: run(cloud, turn(**changes)))
    assert type(found) is error
    state = await cloud.log.state(SessionName("default", "trip"))
    assert not state.turns


async def test_a_prompt_that_fills_the_context_ends_the_turn_with_its_error(
    cloud: CloudRpc,
) -> None:
    events = await run(cloud, turn(prompt="word " * 9000))
    assert events[-1].ended.reason == "error"
    assert events[-1].ended.error_code == PromptTooLong.code
    assert "8192" in events[-1].ended.error_message
    assert (await run(cloud, turn(turn="t2")))[-1].ended.reason == "stop"


async def test_unknown_sessions_and_models(cloud: CloudRpc) -> None:
    agent = cloud.agent
    missing = pb.OpenSessionRequest(session="nowhere", device="phone", must_exist=True)
    assert isinstance(await refused(lambda: agent.OpenSession(missing)), UnknownSession)
    model = pb.OpenSessionRequest(session="trip", device="phone", model="gpt-9")
    assert isinstance(await refused(lambda: agent.OpenSession(model)), UnknownModel)
    for char in ("x", "\U0001f600"):  # whatever an error quotes, it arrives as what it is
        long = pb.OpenSessionRequest(session="trip", device="phone", model=char * 100_000)
        assert isinstance(await refused(lambda r=long: agent.OpenSession(r)), UnknownModel)
        shape = turn(plan=char * 100_000)
        assert isinstance(await refused(lambda r=shape: run(cloud, r)), InvalidArgument)
    read = pb.ReadRequest(session="nowhere", device="phone")
    assert isinstance(await refused(lambda: agent.Read(read)), UnknownSession)
    foreign = pb.ReadRequest(session="trip", device="stranger")
    assert isinstance(await refused(lambda: agent.Read(foreign)), UnknownDevice)
    stop = pb.StopTurnRequest(session="trip", device="stranger")
    assert isinstance(await refused(lambda: agent.StopTurn(stop)), UnknownDevice)


async def new_epoch(cloud: CloudRpc) -> int:
    request = pb.OpenSessionRequest(session="trip", device="phone", producer="p1")
    return int((await cloud.agent.OpenSession(request)).epoch)


async def append(cloud: CloudRpc, epoch: int, seq: int, *ops: bytes) -> pb.AppendReply:
    request = pb.AppendRequest(
        session="trip", device="phone", producer="p1", epoch=epoch, first_seq=seq, ops=list(ops)
    )
    reply: pb.AppendReply = await cloud.agent.Append(request)
    return reply


def value(name: str, at: int) -> bytes:
    return encode_op(Set(id=f"s{at}", device="phone", name=name, value=b"x"))


async def test_appends_are_fenced_and_counted(cloud: CloudRpc) -> None:
    one = await new_epoch(cloud)
    first = await append(cloud, one, 1, value("a", 1), value("b", 2))
    assert first.first.offset == 1
    again = await append(cloud, one, 1, value("a", 1), value("b", 2))
    assert again.duplicate
    assert again.first.offset == 1
    gap = await refused(lambda: append(cloud, one, 5, value("c", 5)))
    assert isinstance(gap, SequenceGap)
    assert gap.fields["expected"] == 3
    two = await new_epoch(cloud)
    await append(cloud, two, 1, value("d", 6))
    stale = await refused(lambda: append(cloud, one, 3, value("c", 3)))
    assert isinstance(stale, StaleEpoch)
    assert stale.fields["current"] == two
    state = await cloud.log.state(SessionName("default", "trip"))
    assert sorted(state.values) == ["a", "b", "d"]
    assert state.cursor.offset == 3
    never = await refused(lambda: append(cloud, two + 1, 1, value("e", 7)))
    assert isinstance(never, StaleEpoch), "an epoch that nobody was given"
    other = await refused(lambda: append(cloud, two, 1, value("e", 8)))
    assert isinstance(other, OutcomeUnknown), "other ops under used numbers are no success"


async def test_numbers_out_of_range_are_refused(cloud: CloudRpc) -> None:
    epoch = await new_epoch(cloud)
    for number in (2**53, 10**17, 2**64 - 1):
        assert isinstance(
            await refused(lambda n=number: append(cloud, n, 1, value("a", 1))), InvalidArgument
        )
        assert isinstance(
            await refused(lambda n=number: append(cloud, epoch, n, value("a", 1))), InvalidArgument
        )
        read = pb.ReadRequest(session="trip", device="phone", after=pb.Cursor(offset=number))
        assert isinstance(await refused(lambda r=read: cloud.agent.Read(r)), InvalidArgument)
    assert (await append(cloud, epoch, 1, value("a", 1))).first.offset == 1


async def test_a_cursor_from_the_future_changes_nothing(cloud: CloudRpc) -> None:
    await append(cloud, await new_epoch(cloud), 1, value("a", 1))
    before = await cloud.agent.Read(pb.ReadRequest(session="trip", device="phone"))
    far = pb.Cursor(generation=before.tail.generation, offset=999)
    for _ in range(3):
        read = pb.ReadRequest(session="trip", device="phone", after=far)
        error = await refused(lambda r=read: cloud.agent.Read(r))
        assert isinstance(error, CursorAhead)
        assert error.fields["offset"] == 1
    after = await cloud.agent.Read(pb.ReadRequest(session="trip", device="phone"))
    assert after.tail == before.tail


async def test_a_device_that_the_log_forgot_joins_again_by_itself(cloud: CloudRpc) -> None:
    name = SessionName("default", "trip")
    async with segue.Client(cloud.address, device="quiet") as client:
        session = await client.session("trip")
        for number in range(MAX_SESSION_DEVICES + 8):  # of one millisecond, names decide
            await cloud.log.open_session(name, device=f"d{number}")
        with pytest.raises(UnknownDevice):
            await cloud.log.check_device(name, "quiet")
        assert (await session.state()).values == {}
        await _forget(cloud, "quiet")
        await session.set("city", "Paris")
        await _forget(cloud, "quiet")
        assert not await session.stop()


async def _forget(cloud: CloudRpc, device: str) -> None:
    keys = SessionKeys.of(SessionName("default", "trip"))
    await cloud.log._store._wire.call(("ZREM", keys.devices, device))  # type: ignore[attr-defined]


async def test_a_state_larger_than_a_message_comes_in_parts(cloud: CloudRpc) -> None:
    epoch = await new_epoch(cloud)
    for number in range(12):
        big = encode_op(
            Set(id=f"b{number}", device="phone", name=f"v{number}", value=b"x" * 900_000)
        )
        await append(cloud, epoch, number + 1, big)
    old = pb.Cursor(generation=1, offset=1)
    reply = await cloud.agent.Read(pb.ReadRequest(session="trip", device="phone", after=old))
    assert reply.snapshot.more
    assert reply.snapshot.lost_from == 1
    async with segue.Client(cloud.address, device="laptop") as client:
        session = await client.session("trip")
        assert len((await session.state()).values) == 12
        async with asyncio.timeout(WAIT_S):
            async for item in session.follow():
                assert isinstance(item, segue.Snapshot)
                assert len(item.state.values) == 12
                break


@pytest.mark.parametrize(
    "op",
    [
        b"",
        b"\xff\xff",
        msgspec.msgpack.encode({"kind": "set"}),
        encode_op(Set(id="s", device="laptop", name="a", value=b"in another's name")),
        encode_op(UserMessage(id="u", turn="t", text="I am somebody else")),
        encode_op(Frame(id="f", turn="t", epoch=1, index=0, tokens=(1,), pieces=("a",))),
    ],
)
async def test_what_a_device_may_not_append(cloud: CloudRpc, op: bytes) -> None:
    assert isinstance(await refused(lambda: append(cloud, 1, 1, op)), InvalidArgument)


async def test_a_folded_read_gives_turns_and_not_their_frames(cloud: CloudRpc) -> None:
    await run(cloud, turn())
    reply = await cloud.agent.Read(pb.ReadRequest(session="trip", device="phone", folded=True))
    assert not reply.entries
    assert reply.snapshot.at == reply.tail
    (folded,) = decode_state(reply.snapshot.state).turns
    assert (folded.tokens, folded.ended) == (list(range(100, 110)), True)


async def test_a_stream_that_is_resumed_goes_on_where_the_device_stands(cloud: CloudRpc) -> None:
    epoch = await new_epoch(cloud)
    ops = [
        encode_op(Set(id=f"s{n}", device="phone", name="n", value=b"%d" % n)) for n in range(1, 5)
    ]
    tail = (await append(cloud, epoch, 1, *ops[:3])).tail

    async def attach(generation: int, offset: int) -> Any:
        after = pb.Cursor(generation=generation, offset=offset)
        call = cloud.agent.Attach(
            pb.AttachRequest(session="trip", device="phone", after=after, resume=True)
        )
        first = await news(call)
        assert first.WhichOneof("kind") == "entries"
        assert not first.entries.entries  # it stands
        return call

    async with asyncio.timeout(WAIT_S):
        late, at_the_tail = await attach(tail.generation, 1), await attach(tail.generation, 3)
        assert [one.offset for one in (await news(late)).entries.entries] == [2, 3]
        await append(cloud, epoch, 4, ops[3])
        for call in (late, at_the_tail):
            assert [one.offset for one in (await news(call)).entries.entries] == [4]
            call.cancel()
        lost = await attach(tail.generation - 1, 2)  # of a log that there is no more
        found = (await news(lost)).snapshot
        assert (found.at.offset, found.lost_from) == (4, 1)
        lost.cancel()
        ahead = await attach(tail.generation, 9)
        assert (await news(ahead)).snapshot.at.offset == 4
        ahead.cancel()


async def test_attach_gives_a_snapshot_and_then_everything(cloud: CloudRpc) -> None:
    await run(cloud, turn())
    call = cloud.agent.Attach(pb.AttachRequest(session="trip", device="phone"))
    async with asyncio.timeout(WAIT_S):
        first = await news(call)
        state = decode_state(first.snapshot.state)
        assert state.turns[0].tokens == list(range(100, 110))
        feedback = Feedback(id="f1", device="phone", turn="t1", value="good")
        await append(cloud, await new_epoch(cloud), 1, encode_op(feedback))
        batch = await news(call)
    assert [entry.offset for entry in batch.entries.entries] == [state.cursor.offset + 1]
    call.cancel()


async def test_sessions_are_listed_newest_first(cloud: CloudRpc) -> None:
    await cloud.agent.OpenSession(pb.OpenSessionRequest(session="work", device="phone"))
    await run(cloud, turn(session="work"))
    reply = await cloud.agent.ListSessions(pb.ListSessionsRequest())
    assert [one.session for one in reply.sessions] == ["work", "trip"]
    assert reply.sessions[0].turns == 1


async def test_health_and_reflection(cloud: CloudRpc) -> None:
    channel = open_channel(cloud.address)
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", "segue.v1.Agent", "segue.v1.Decode"):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = (await call.read()).list_services_response
    assert {"segue.v1.Agent", "segue.v1.Decode"} <= {one.name for one in listed.service}
    call.cancel()
    await channel.close()


async def test_listeners_stay_on_this_machine_and_on_free_ports(cloud: CloudRpc) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(NotLoopback):
            await start_server(host, 0, [])
    port = int(cloud.address.rpartition(":")[2])
    with pytest.raises(PortInUse):
        await start_server("127.0.0.1", port, [])


async def test_a_hung_engine_shows_in_the_heartbeats_of_turns_that_wait_for_it(
    valkey: Valkey, model_dir: Path
) -> None:
    engine = ScriptedEngine(range(100, 110), free=False)
    async with cloud_rpc(valkey.url, model_dir, engine) as cloud:
        await cloud.agent.OpenSession(pb.OpenSessionRequest(session="trip", device="phone"))
        stalled: list[bool] = []
        async with asyncio.timeout(WAIT_S):
            async for event in cloud.agent.RunTurn(turn()):
                if event.WhichOneof("kind") == "heartbeat":
                    stalled.append(event.heartbeat.stalled)
                    if stalled == [False]:
                        engine.stalled = True
                    elif stalled[-1]:
                        facts = (await cloud.decode.Probe(dpb.ProbeRequest())).facts
                        assert facts.stalled
                        engine.stalled = False
                        engine.allow(10)
    assert stalled[0] is False
    assert True in stalled
