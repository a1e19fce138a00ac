"""Clients, sessions, appends and lists."""

from __future__ import annotations

import pytest

import segue
from segue import errors
from segue_contract.sync.ops import Feedback, Set, UserMessage, decode_op
from tests.support.fake_agent import FakeAgent, FakeLog


async def test_nobody_there_is_a_typed_error() -> None:
    agent = FakeAgent(FakeLog("trip"))
    await agent.start()
    await agent.kill()
    with pytest.raises(errors.Unreachable) as caught:
        async with segue.Client(agent.address, device="phone"):
            pass
    assert caught.value.fields["address"] == agent.address
    assert caught.value.hint


@pytest.mark.parametrize("address", ["", "nowhere", "host:", "host:0", "host:99999", []])
def test_bad_addresses_are_refused_at_once(address: str | list[str]) -> None:
    with pytest.raises(errors.InvalidArgument):
        segue.Client(address, device="phone")


@pytest.mark.parametrize("device", ["a b", "x" * 65, "-x", "größe"])
def test_bad_device_names_are_refused_at_once(device: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        segue.Client("127.0.0.1:1", device=device)


async def test_open_and_list() -> None:
    async with (
        FakeAgent(FakeLog("trip")) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        assert (session.name, session.model, session.created) == ("trip", "fake", True)
        with pytest.raises(errors.UnknownSession):
            await client.session("other", must_exist=True)
        with pytest.raises(errors.InvalidArgument):
            await client.session("a/b")
        (info,) = await client.sessions()
        assert (info.session, info.turns) == ("trip", 2)


async def test_calls_go_to_the_next_address_and_back() -> None:
    log = FakeLog("trip")
    async with (
        FakeAgent(log) as first,
        FakeAgent(log, role="cloud") as second,
        segue.Client([first.address, second.address], device="phone") as client,
    ):
        assert (await client.session("trip")).role == "edge"
        await first.kill()
        assert (await client.session("trip")).role == "cloud"
        await first.start()
        await second.kill()
        session = await client.session("trip")
        assert session.role == "edge"


async def test_append_counts_and_survives_a_stale_epoch() -> None:
    async with (
        FakeAgent(FakeLog("trip")) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        first = await session.set("city", "Paris")
        assert first.offset == 1
        await session.append(
            Set(id="", name="days", value=b"1"), Feedback(id="mine", turn="t1", value="good")
        )
        await session.set("city", "Rome")
        assert [request.first_seq for request in agent.appends] == [1, 2, 4]
        assert len({request.epoch for request in agent.appends}) == 1
        op = decode_op(agent.log.ops[0])
        assert isinstance(op, Set)
        assert (op.device, op.value) == ("phone", b"Paris")
        assert op.id
        assert op.at_ms > 0

        epoch = agent.appends[-1].epoch
        agent.fail_once["Append"] = errors.StaleEpoch("Nobody knows you.", current=0)
        await session.set("city", "Bonn")
        agent.fail_once["Append"] = errors.UnknownDevice("You were forgotten.")
        await session.set("city", "Oslo")
        assert [(one.epoch, one.first_seq) for one in agent.appends[-2:]] == [
            (epoch + 1, 1),
            (epoch + 2, 1),
        ]
        agent.fail_once["Append"] = errors.StoreUnavailable("Maybe written.")
        with pytest.raises(errors.StoreUnavailable):
            await session.set("city", "Kiel")
        await session.set("city", "Oslo")
        assert (agent.appends[-1].epoch, agent.appends[-1].first_seq) == (epoch + 3, 1)
        state = await session.state()
        assert state.values == {"city": b"Oslo", "days": b"1"}


async def test_devices_append_only_what_is_theirs() -> None:
    async with (
        FakeAgent(FakeLog("trip")) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        with pytest.raises(errors.InvalidArgument):
            await session.append(UserMessage(id="x", turn="t", text="not mine to write"))
        with pytest.raises(errors.InvalidArgument):
            await session.append()
        with pytest.raises(errors.InvalidArgument):
            await session.set("", "x")
        much = [Set(id="", name=f"v{number}", value=b"x" * 900_000) for number in range(10)]
        with pytest.raises(errors.InvalidArgument, match="9000"):
            await session.append(*much)
        assert not agent.appends
        await session.append(*much[:9])  # as much as one message takes
        assert len(agent.appends) == 1


async def test_read_pages_and_begins_where_asked() -> None:
    log = FakeLog("trip")
    log.append(*[Set(id=f"o{i}", name="n", value=b"%d" % i) for i in range(10)])
    async with (
        FakeAgent(log, page=3) as agent,
        segue.Client(agent.address, device="phone") as client,
    ):
        session = await client.session("trip")
        items = await session.read(4)
        assert [item.offset for item in items] == [5, 6, 7, 8, 9, 10]
        assert agent.reads == 2
        log.compact()
        log.append(Set(id="late", name="n", value=b"late"))
        snapshot, last = await session.read()
        assert isinstance(snapshot, segue.Snapshot)
        assert (snapshot.offset, last.offset) == (10, 11)
        assert (await session.state()).values == {"n": b"late"}


async def test_a_closed_client_says_so() -> None:
    async with FakeAgent(FakeLog("trip")) as agent:
        async with segue.Client(agent.address, device="phone") as client:
            session = await client.session("trip")
        with pytest.raises(errors.Unreachable, match="closed"):
            await session.state()
