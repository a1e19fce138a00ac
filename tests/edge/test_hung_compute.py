"""Compute that hangs in a step: the edge's own, and that of a cloud's engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from segue_contract.errors import Overloaded
from tests.support.edge_node import Told, serving, two_clouds
from tests.support.tiny_edge import TinyModel, reply_text

WAIT_S = 30.0


class Hang:
    """Holds the edge's compute thread in a step of one kind."""

    def __init__(self, model: TinyModel, what: str, after: int = 0) -> None:
        self.hangs = threading.Event()
        self._go_on = threading.Event()
        self._what, self._left = what, after
        model.pause = self._pause

    def _pause(self, what: str) -> None:
        if what != self._what:
            return
        self._left -= 1
        if self._left < 0:
            self.hangs.set()
            self._go_on.wait(WAIT_S)

    def end(self) -> None:
        self._go_on.set()


@contextmanager
def hanging(model: TinyModel, what: str, after: int = 0) -> Iterator[Hang]:
    hang = Hang(model, what, after)
    try:
        yield hang
    finally:
        hang.end()


@pytest.mark.parametrize(("what", "after"), [("prefill", 0), ("decode", 4)])
@pytest.mark.parametrize("shape", ["ship", "edge"])
async def test_the_cloud_goes_on_where_the_edge_s_compute_hangs(
    what: str, after: int, shape: str
) -> None:
    model = TinyModel()
    async with serving(model) as (cloud, _, device):
        cloud.script.ready.clear()  # a full batch: the edge would go on decoding
        with hanging(model, what, after):
            async with asyncio.timeout(WAIT_S):
                told = await device.run(plan=shape, max_tokens=40)
    assert told.text == reply_text(cloud.seen.specs[0].prompt, 40)
    made_here = sum(len(frame.tokens) for frame in told.frames if frame.made_by == "edge")
    assert made_here == (5 if what == "decode" else 0)
    assert cloud.seen.hand_overs == [made_here]


async def test_offline_a_hung_edge_sends_its_devices_elsewhere() -> None:
    model = TinyModel()
    async with serving(model) as (cloud, _, device):
        await device.open()
        await cloud.server.stop(0)
        with hanging(model, "decode", 2), pytest.raises(Overloaded):
            async with asyncio.timeout(WAIT_S):
                await device.run(max_tokens=40)


async def test_a_hung_edge_that_lost_its_cloud_says_so_in_its_heartbeats() -> None:
    model, told, lost = TinyModel(), Told(), False
    async with serving(model) as (cloud, _, device):
        cloud.script.ready.clear()
        with hanging(model, "decode", 2) as hang:
            async with asyncio.timeout(WAIT_S):
                async for event in device.stream(plan="ship", max_tokens=40):
                    told.take(event)
                    if len(told.frames) == 3 and not lost:
                        lost = True
                        await asyncio.to_thread(hang.hangs.wait, WAIT_S)
                        await cloud.server.stop(0)
                    if event.heartbeat.stalled:
                        break
                else:
                    pytest.fail("it never said that it hangs")


async def test_a_cloud_whose_engine_hangs_is_left_for_the_next_one() -> None:
    async with two_clouds() as here:
        device, (first, other) = here.device, here.ranked()
        first.script.decode.clear()
        running = asyncio.create_task(device.run(plan="text", max_tokens=40))
        await asyncio.wait_for(first.seen.opened.wait(), WAIT_S)
        first.script.stalled = True
        told = await asyncio.wait_for(running, WAIT_S)
        assert told.text == reply_text(first.seen.specs[0].prompt, 40)
        assert other.seen.specs[0].takeover
        assert told.plan.instance == other.name
        await device.run("t2", plan="text")
        assert len(other.seen.begins) == 1, "the next turn avoids it, too"
        assert len(first.seen.begins) == 1


async def test_a_cloud_alone_is_waited_for_though_its_engine_hangs() -> None:
    async with serving() as (cloud, _, device):
        cloud.script.decode.clear()
        cloud.script.stalled = True
        running = asyncio.create_task(device.run(plan="text"))
        await asyncio.wait_for(cloud.seen.opened.wait(), WAIT_S)
        async with asyncio.timeout(WAIT_S):
            while cloud.seen.beats < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        cloud.script.stalled = False
        cloud.script.decode.set()
        told = await asyncio.wait_for(running, WAIT_S)
    assert told.ended.reason == "length"
    assert [spec.takeover for spec in cloud.seen.specs] == [False]
