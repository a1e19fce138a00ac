"""`segue.testing.FakeNode` answers as a real cloud does: one story told over both."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import segue
from segue.errors import SegueError
from segue.events import Entry, Frame, Snapshot
from segue.testing import FakeNode
from segue.testing.script import pieces_of
from segue_contract.servers import Valkey
from segue_contract.sync.ops import Set
from segue_contract.v1 import agent_pb2 as pb
from tests.support.cloud_rpc import cloud_rpc
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tokenizers import tokenizer_of

TEXT = " one two three"


async def _said(work: Any) -> str:
    """The error's code, or what came of it."""
    try:
        return str(await work)
    except SegueError as error:
        return error.code


def _kinds(items: list[Any]) -> list[str]:
    """What came, in order; of several alike one."""
    names = [
        type(one.op).__name__ if isinstance(one, Entry)
        else f"Frame durable={one.durable}" if isinstance(one, Frame)
        else type(one).__name__
        for one in items
    ]  # fmt: skip
    return [name for name, _ in itertools.groupby(names)]


async def story(phone: segue.Client, laptop: segue.Client) -> list[Any]:
    told: list[Any] = []
    told.append(await _said(phone.session("trip", must_exist=True)))
    session = await phone.session("trip")
    told.append(("created", session.created, session.tail.offset))
    other = await laptop.session("trip")
    told.append(("created", other.created))

    items = aiter(other.follow())
    first = await anext(items)
    told.append((type(first).__name__, first.offset))
    async with session.run("Count.", turn="t1") as turn:
        events = [event async for event in turn]
    told.append(_kinds(events))
    assert turn.ended is not None
    told.append(
        (turn.text, turn.ended.reason, turn.ended.usage.completion_tokens, turn.durable_index)
    )
    live = []
    while not live or type(live[-1].op).__name__ != "TurnEnded":
        live.append(await anext(items))
    told.append(_kinds(live))
    told.append([one.offset for one in live] == list(range(1, len(live) + 1)))

    async with session.run("Count.", turn="t1") as again:  # a known id joins
        told.append(((await again.result()).text, again.ended is not None))
    told.append(await _said(session.run("Other.", turn="t1").__aenter__()))
    async with session.run("Cut.", max_tokens=2) as turn:
        told.append(((await turn.result()).reason, len(turn.tokens)))

    before = len(await session.read())
    await session.set("city", "Paris")
    await session.append(Set(id="mine", name="a", value=b"1"), Set(id="", name="a", value=b"2"))
    told.append(len(await session.read()) - before)
    state = await other.state()
    told.append((state.values, [(one.turn == "t1", one.text, one.reason) for one in state.turns]))
    told.append(await _said(session.read(10_000)))
    told.append(await _said(session.stop()))
    told.append(await _said(session.stop("nothing")))

    nobody = pb.ReadRequest(session="trip", device="nobody")
    told.append(await _said(phone._nodes.unary("Read", nobody)))
    told.append(await _said(phone._nodes.unary("Read", pb.ReadRequest(session="x", device="y"))))
    foreign = pb.AppendRequest(session="trip", device="phone", producer="p", epoch=7, first_seq=1,
                               ops=[b"\xc1"])  # fmt: skip
    told.append(await _said(phone._nodes.unary("Append", foreign)))

    told.append([(one.session, one.turns, one.title) for one in await phone.sessions()])
    told.append(await _said(phone.delete_session("nowhere")))
    told.append(await _said(phone.delete_session("trip")))
    told.append(await _said(_next(items)))
    told.append(await _said(other.state()))
    return told


async def _next(items: Any) -> str:
    while True:
        item = await anext(items)
        if isinstance(item, Snapshot):
            return "snapshot"


async def test_one_story_over_both(valkey: Valkey, model_dir: Path) -> None:
    async with asyncio.timeout(120):
        async with FakeNode([TEXT] * 3) as node, node.client("phone") as a, node.client("tv") as b:
            fake = await story(a, b)
        script = tokenizer_of(model_dir).encode(TEXT)
        assert len(script) == len(pieces_of(TEXT)) == 3
        async with (
            cloud_rpc(valkey.url, model_dir, ScriptedEngine(script)) as cloud,
            segue.Client(cloud.address, device="phone") as a,
            segue.Client(cloud.address, device="tv") as b,
        ):
            real = await story(a, b)
    for one, other in zip(fake, real, strict=True):
        assert one == other, (fake, real)
