"""Parts that fall silent or stop as planned in mid-reply: what a user sees of it is a pause.

Two edges and two clouds, each a real process. A planned stop comes last: who is left serves on.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import segue
from segue_contract.sync.ops import Frame, TurnEnded
from tests.bench.suites._fault_house import House, Kind, house, mend, strike
from tests.support.devices import WAIT_S, Pauses, text_in_log, watching
from tests.support.servers import require_broker, require_valkey

pytestmark = [
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),  # four programs start at once, which takes minutes on a busy machine
]

STORY = "Tell me a long story about a lighthouse keeper and the sea."
TOKENS = {"silent": 60, "planned": 120}  # a planned stop lets turns end for 2.5 s first
SERVER_HOLD_S = 2.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def parts(model_dir: Path) -> AsyncIterator[House]:
    require_valkey()
    require_broker()
    async with house(str(model_dir), edges=2) as running:
        yield running


async def reply_around(parts: House, kind: Kind, name: str) -> segue.Turn:
    """Ask for a reply, break a part in its middle, and compare what was told with the log."""
    addresses = parts.addresses(kind)
    async with (
        segue.Client(addresses, device="phone") as phone,
        watching(addresses[-1], name, "laptop") as laptop,
    ):
        session = await phone.session(name)
        before = parts.cpu_s()
        turn = session.run(STORY, max_tokens=TOKENS[kind.how], seed=5, plan=kind.asked_plan)
        async with turn:
            pauses = Pauses()
            reading = asyncio.create_task(pauses.read(turn))
            await asyncio.wait_for(pauses.begun.wait(), WAIT_S)
            victim = parts.victim(kind, before, turn.address)
            striking = asyncio.create_task(strike(victim, kind))
            try:
                if not kind.others_go_on:
                    await asyncio.sleep(SERVER_HOLD_S)
                    victim.resume()
                reply = await asyncio.wait_for(reading, WAIT_S)
            finally:
                victim.resume()
                await striking
        print(f"{name}: the longest pause was {pauses.longest_s:.2f} s")
        assert reply.reason in ("stop", "length")
        assert await laptop.until_ended(turn.id) == reply.text
        left = next(one for one in parts.clouds if one is not victim)
        assert reply.text == await text_in_log(left.address, name, turn.id)
        await nothing_doubled(left.address, name, turn)
        state = await session.state()
    if kind.part == "cloud":
        assert state.turns[-1].epoch == 2, "the other cloud did not take the turn over"
    return turn


async def nothing_doubled(address: str, name: str, turn: segue.Turn) -> None:
    """Each of the turn's tokens stands in the log once, and so does its end."""
    async with segue.Client(address, device="reader") as client:
        session = await client.session(name)
        found = [item.op for item in await session.read() if isinstance(item, segue.Entry)]
    frames = [op for op in found if isinstance(op, Frame) and op.turn == turn.id]
    indexes = [at for op in frames for at in range(op.index, op.index + len(op.tokens))]
    assert indexes == list(range(len(turn.tokens)))
    assert sum(isinstance(op, TurnEnded) and op.turn == turn.id for op in found) == 1


@pytest.mark.parametrize("plan", ["text", "ship"])
async def test_a_cloud_behind_an_edge_falls_silent(parts: House, plan: str) -> None:
    await reply_around(parts, Kind("silent", "cloud", plan), f"cloud-hangs-{plan}")


async def test_a_cloud_that_a_device_asked_falls_silent(parts: House) -> None:
    turn = await reply_around(parts, Kind("silent", "cloud", direct=True), "direct-hangs")
    assert turn.address == parts.clouds[1].address


@pytest.mark.parametrize("plan", ["text", "ship"])
async def test_an_edge_falls_silent(parts: House, plan: str) -> None:
    """Its connections stand, nothing comes: the device goes on at the next address."""
    turn = await reply_around(parts, Kind("silent", "edge", plan), f"edge-hangs-{plan}")
    assert turn.address == parts.edges[1].address


@pytest.mark.parametrize("part", ["store", "broker"])
async def test_a_server_falls_silent(parts: House, part: str) -> None:
    await reply_around(parts, Kind("silent", part), f"{part}-hangs")


async def test_an_edge_stops_as_planned(parts: House) -> None:
    turn = await reply_around(parts, Kind("planned", "edge"), "edge-stops")
    assert turn.address == parts.edges[1].address


async def test_a_cloud_behind_an_edge_stops_as_planned(parts: House) -> None:
    await reply_around(parts, Kind("planned", "cloud", "text"), "cloud-stops")


async def test_a_cloud_that_a_device_asked_stops_as_planned(parts: House) -> None:
    for cloud in parts.clouds:
        await mend(cloud)
    turn = await reply_around(parts, Kind("planned", "cloud", direct=True), "direct-stops")
    assert turn.address == parts.clouds[1].address
