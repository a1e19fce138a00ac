"""A client that looks for the nearest edge."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import segue
from segue import errors
from segue._finding import Finding
from segue._nearest import Nearest
from segue._nodes import Nodes
from segue_contract.errors import InvalidArgument
from segue_contract.limits import EDGES_KEPT, MAX_ADDRESSES, MAX_EDGES_MEASURED, NEAR_SAMPLES
from segue_contract.v1 import agent_pb2 as pb
from tests.support.fake_agent import FakeAgent, FakeLog

FAR, NEAR, NEARER = 0.080, 0.020, 0.004


def test_the_nearest_is_first_and_the_given_ones_stay() -> None:
    near = Nearest(["given:1", "other:1"])
    assert near.order() == ["given:1", "other:1"]
    near.saw("given:1", FAR)
    near.saw("edge:1", NEAR)
    near.saw("edge:2", NEARER)
    near.saw("other:1", None)
    assert near.order() == ["edge:2", "edge:1", "given:1", "other:1"]


def test_it_moves_for_something_and_not_for_noise() -> None:
    near = Nearest(["a:1"])
    near.saw("a:1", 0.020)
    near.saw("b:1", 0.015)  # too little of a share
    assert near.order()[0] == "a:1"
    near = Nearest(["a:1"])
    near.saw("a:1", 0.0010)
    near.saw("b:1", 0.0001)  # a tenth, but less than anybody notices
    assert near.order()[0] == "a:1"
    near.saw("a:1", 0.5)  # one slow answer
    assert near.order()[0] == "a:1"
    for _ in range(NEAR_SAMPLES):
        near.saw("a:1", 0.5)
    assert near.order()[0] == "b:1"
    near.saw("b:1", None)  # it does not answer: no patience
    assert near.order()[0] == "a:1"


_SEEN = st.tuples(
    st.sampled_from(["a:1", "b:1", "c:1", "d:1", "e:1", "f:1", "g:1"]),
    st.none() | st.floats(1e-4, 2.0),
)


@given(st.lists(_SEEN, max_size=60))
def test_the_order_is_always_usable(seen: list[tuple[str, float | None]]) -> None:
    near = Nearest(["a:1", "b:1"])
    for address, round_trip_s in seen:
        near.saw(address, round_trip_s)
        order = near.order()
        assert {"a:1", "b:1"} <= {*order}
        assert len(order) == len({*order}) <= EDGES_KEPT + 2
        known = [
            s for s in map(near.round_trip_s, (f"{one}:1" for one in "abcdefg")) if s is not None
        ]
        first = near.round_trip_s(order[0])
        assert first is not None or not known
        assert near.order() == order  # without news nobody moves


class World:
    """Round trips as the test says; stands for `Nodes`."""

    def __init__(self, far: dict[str, float | None]) -> None:
        self.far = far
        self.told = list(far)
        self.orders: list[list[str]] = []
        self.asked = 0

    def node_at(self, address: str) -> str:
        if address == "bad":
            raise InvalidArgument("no address")
        return address

    async def round_trip_s(self, node: str) -> float:
        found = self.far.get(node)
        if found is None:
            raise errors.Unreachable("away")
        return found

    async def prefer(self, addresses: list[str]) -> None:
        self.orders.append(addresses)

    async def forget_spares(self) -> None: ...

    async def unary(self, verb: str, request: Any) -> pb.NodesReply:
        assert verb == "Nodes"
        self.asked += 1
        if not self.told:
            raise errors.Unreachable("away")
        return pb.NodesReply(edges=[pb.NodeAddress(url=url) for url in self.told])


async def test_it_goes_on_looking_and_moves() -> None:
    world = World({"given:1": FAR, "one:1": NEAR, "two:1": None, "bad": NEAR})
    rounds = 0

    async def sleep(seconds: float) -> None:
        nonlocal rounds
        assert seconds > 0
        rounds += 1
        if rounds == 2:
            world.far["one:1"] = 1.0  # it got slow
        if rounds == 40:
            world.far["three:1"] = NEARER
            world.told.append("three:1")
        if rounds == 70:
            raise asyncio.CancelledError

    finding = Finding(world, ["given:1"], sleep=sleep, random=Random(7))  # type: ignore[arg-type]
    await finding.first()
    assert world.orders == [["one:1", "given:1"]]
    with pytest.raises(asyncio.CancelledError):
        await finding.run()
    firsts = [order[0] for order in world.orders]
    assert firsts[1] == "one:1"
    assert firsts[2 + NEAR_SAMPLES] == "given:1"
    assert firsts[-1] == "three:1"
    assert world.asked == 3


async def test_a_large_site_is_measured_in_part() -> None:
    world = World({f"edge{n}:1": NEAR for n in range(200)})
    finding = Finding(world, ["edge0:1"], random=Random(7))  # type: ignore[arg-type]
    await finding.look(ask=True)
    assert len(finding._watched) <= EDGES_KEPT + 1 < MAX_EDGES_MEASURED < MAX_ADDRESSES * 4
    world.told = []
    await finding.look(ask=True)  # nobody answers: what is known stays
    assert len(finding._watched) >= EDGES_KEPT


async def test_a_client_uses_what_it_was_told_of() -> None:
    log = FakeLog("trip")
    async with (
        asyncio.timeout(60),
        FakeAgent(log, role="cloud") as cloud,
        FakeAgent(log) as edge,
        segue.Client(cloud.address, device="phone", find_edges=True) as client,
    ):
        cloud.edges = [edge.address, "nonsense", "127.0.0.1:1"]
        assert client._finding is not None
        await client._finding.look(ask=True)
        assert {node.address for node in client._nodes.order()} == {cloud.address, edge.address}
        session = await client.session("trip")
        await cloud.kill()
        await session.set("a", "1")  # it goes on at the edge that was found
        assert edge.appends
        await cloud.start()


async def test_what_runs_at_a_node_goes_on_there_when_another_is_preferred() -> None:
    log = FakeLog("trip")
    async with asyncio.timeout(60), FakeAgent(log) as one, FakeAgent(log) as other:
        nodes = Nodes([one.address])
        first = await nodes.connect()
        copy = nodes.with_options(nodes.options)
        await nodes.prefer([other.address])
        assert [node.address for node in copy.order()] == [other.address]
        assert first.channel is not None
        assert await nodes.round_trip_s(first) > 0
        await nodes.prefer([one.address, other.address])
        assert nodes.node_at(one.address) is first
        await nodes.prefer([other.address])
        await nodes.forget_spares()
        assert first.channel is None
        await nodes.close()
