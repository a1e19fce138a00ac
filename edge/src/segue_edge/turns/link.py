"""One turn's stream seen from the turn: facts, readiness, frames, stop, end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from segue_contract.errors import Unreachable
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.measure import Measure
from segue_edge.turns.reply import Reply
from segue_edge.uplink.clouds import Cloud
from segue_edge.uplink.stream import TurnStream

_LINK_BOUND = 0.7  # KV was on its way for this part of the time: the link, not the prefill, limited

ShowAll = Callable[[list[pb.TurnEvent]], None]


class TurnLink:
    """`relay` reads the stream to the turn's end.

    Attributes:
        opened: the cloud's answer to `open`.
        silence: set when the edge must make no more tokens: the cloud is ready or the turn stops.
        ready, stopped: which of the two.
    """

    def __init__(
        self, cloud: Cloud, stream: TurnStream, reply: Reply, show: ShowAll, measure: Measure
    ) -> None:
        self.cloud = cloud
        self.stream = stream
        self.opened: asyncio.Future[dpb.Opened] = asyncio.get_running_loop().create_future()
        self.silence = asyncio.Event()
        self.ready = False
        self.stopped = False
        self.heed_ready = True  # False for shape edge: the edge decodes to the end
        self.progressed = False
        self._advanced = asyncio.Event()
        self._reply = reply
        self._show = show
        self._measure = measure

    async def relay(self, speaking: asyncio.Task[None] | None = None) -> pb.TurnEnded:
        """Show what the cloud says until it says that the turn has ended.

        Args:
            speaking: the edge's own part; if it fails, this call fails with its error.

        Raises:
            SegueError: the stream broke before the end, or the cloud refused it.
        """
        reading = asyncio.create_task(self._read(), name="uplink reader")
        try:
            if speaking is not None:
                await asyncio.wait({reading, speaking}, return_when=asyncio.FIRST_COMPLETED)
                if speaking.done() and not reading.done():
                    speaking.result()
            return await reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            if not self.opened.done():
                self.opened.cancel()

    async def wait_durable(self, next_index: int) -> None:
        """Return when tokens before `next_index` are known to be in the log."""
        while self._reply.durable < next_index:
            self._advanced.clear()
            await self._advanced.wait()

    async def _read(self) -> pb.TurnEnded:
        async for message in self.stream.replies():
            self.progressed = True
            kind = message.WhichOneof("kind")
            if kind == "frame":
                self._show(self._reply.accept(message.frame))
                self._advanced.set()
            elif kind == "durable":
                notice = message.durable
                self._show([self._reply.mark_durable(notice.next_index, notice.offset)])
                self._advanced.set()
            elif kind == "opened":
                self._take_opened(message.opened)
            elif kind == "ready":
                self._take_ready(message.ready)
            elif kind == "stop":
                self.stopped = True
                self.silence.set()
            elif kind == "ended":
                return message.ended
        raise Unreachable("The cloud closed the turn's stream before its end.")

    def _take_opened(self, opened: dpb.Opened) -> None:
        self.cloud.take_facts(opened.facts)
        self._reply.epoch = max(self._reply.epoch, opened.epoch)
        self._measure.cloud_cached_blocks = opened.have_blocks
        self._measure.mark("opened")
        if not self.opened.done():
            self.opened.set_result(opened)

    def _take_ready(self, ready: dpb.Ready) -> None:
        self._measure.mark("ready")
        self.ready = True
        if self.heed_ready:
            self.silence.set()
        if ready.receive_s > 0:
            limited = self.stream.busy_s < _LINK_BOUND * ready.receive_s
            self.cloud.view.goodput.observe(
                ready.received_bytes, ready.receive_s, app_limited=limited
            )
