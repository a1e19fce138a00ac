"""A turn's way to the clouds: one stream at a time, and the KV that goes over it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Coroutine, Iterator
from typing import Any

import structlog

from segue_contract.errors import Overloaded, SegueError, Unreachable
from segue_contract.ids import SessionName
from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.plan import Shape
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns.cloud import successor
from segue_edge.turns.cloud.link import CloudLink, Emit, follow
from segue_edge.turns.cloud.spec import Sent, TurnFacts, run_request, turn_spec
from segue_edge.turns.compute.model_port import PrefixCachePort
from segue_edge.turns.compute.tools import EdgeTools
from segue_edge.turns.measure import Measure
from segue_edge.turns.state import signals as s
from segue_edge.uplink.clouds import Cloud, CloudSet
from segue_edge.uplink.sender import KvSender
from segue_edge.uplink.stream import TurnStream

log = structlog.get_logger("segue.turn")


class CloudSide:
    """Performs what the turn's state asks for of a cloud. `cloud`: the last one that was asked."""

    def __init__(
        self, facts: TurnFacts, tools: EdgeTools, clouds: CloudSet, measure: Measure, emit: Emit
    ) -> None:
        self.cloud = facts.begun.cloud
        self._facts = facts
        self._tools = tools
        self._clouds = clouds
        self._measure = measure
        self._emit = emit
        self._link: CloudLink | None = None
        self._round: Iterator[Cloud] = iter(())
        self._ready: Cloud | None = None  # the one that prepared the turn last
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def sent_kv_bytes(self) -> int:
        """Over the stream that is open now."""
        return self._link.stream.sent_kv_bytes if self._link is not None else 0

    def open(
        self, wanted: s.Open | s.TakeOver | s.Follow, shape: Shape, sender: KvSender | None
    ) -> None:
        """Open the stream in a task of its own; what becomes of it comes as signals.

        Args:
            sender: the prompt's KV as this node's prefill makes it, for an `Open` that ships.
        """
        cloud = self._cloud_for(wanted)
        if cloud is None:
            self._emit(s.NoMoreClouds(wanted.link))
            return
        self.cloud = cloud
        match wanted:
            case s.Follow():
                asked = self._facts.asked
                following = follow(
                    wanted.link, cloud, asked, wanted.from_index, self._emit, self._prepare
                )
                self._spawn(following, "follow")
            case s.TakeOver():
                self._take_over(wanted, cloud)
            case s.Open():
                spec = turn_spec(self._facts, shape, self._tools.recipe)
                link = self._start(wanted.link, cloud, spec, self._measure)
                if sender is not None:
                    self._spawn(self._ship(wanted.link, link, sender), "ship")

    def send(self, wanted: Sent, plan: bytes) -> None:
        link = self._link
        if link is None:
            return
        with contextlib.suppress(Unreachable):  # the link says why
            link.stream.control(run_request(wanted, plan))
        if isinstance(wanted, s.HandOver) and wanted.last:
            link.stream.finish()

    def close(self) -> list[asyncio.Task[None]]:
        """Leave the stream; returns what was cancelled."""
        self._link = None
        tasks, self._tasks = list(self._tasks), set()
        for task in tasks:
            task.cancel()
        return tasks

    # -- inside --------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"{name} {self._facts.asked.turn}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start(self, number: int, cloud: Cloud, spec: dpb.TurnSpec, measure: Measure) -> CloudLink:
        stream = TurnStream(cloud, spec, self._clouds.pacer, self._facts.asked.token)
        # Where this edge makes the whole reply, another cloud has nothing to compute.
        prepare = self._prepare if spec.shape != Shape.EDGE.value else None
        link = self._link = CloudLink(number, cloud, stream, spec, self._emit, measure, prepare)
        self._spawn(link.run(), "link")
        return link

    def _cloud_for(self, wanted: s.Open | s.TakeOver | s.Follow) -> Cloud | None:
        session = self._facts.asked.session
        if isinstance(wanted, s.Open):
            return self._facts.begun.cloud
        if self._ready is not None or (isinstance(wanted, s.TakeOver) and wanted.fresh):
            self._round = self._in_order(session)
        cloud = next(self._round, None)
        if cloud is None and isinstance(wanted, s.Follow):  # the log can be read at any, again
            self._round = self._in_order(session)
            cloud = next(self._round, None)
        return cloud

    def _in_order(self, session: SessionName) -> Iterator[Cloud]:
        """As ranked, but for the one that is ready for this turn."""
        ranked = self._clouds.ranked(session)
        ready, self._ready = self._ready, None
        first = [ready] if ready is not None and ready.healthy else []
        return itertools.chain(first, (one for one in ranked if one not in first))

    async def _prepare(self, leaving: bool) -> None:
        self._ready = await successor.prepare(
            self._clouds, self.cloud, self._facts.asked, leaving=leaving
        )

    def _take_over(self, wanted: s.TakeOver, cloud: Cloud) -> None:
        """With the prompt's KV where all of it is still in this node's cache."""
        planned = self._facts.planned
        assert planned is not None
        ships = wanted.ship and bool(planned.ids) and self._tools.may_ship(cloud.recipes)
        ships = ships and self._cache.lookup(planned.ids) == len(planned.ids)
        shape = Shape.SHIP if ships else Shape.TEXT
        spec = turn_spec(self._facts, shape, self._tools.recipe, wanted)
        link = self._start(wanted.link, cloud, spec, Measure())
        if ships:
            self._spawn(self._ship_again(wanted.link, link, planned.ids), "ship")

    @property
    def _cache(self) -> PrefixCachePort:
        return self._tools.cache.of(self._facts.asked.session.tenant)

    async def _ship(self, number: int, link: CloudLink, sender: KvSender) -> None:
        """A block that cannot be sent costs time, not the turn: the cloud computes it."""
        assert self._facts.planned is not None
        opened = await asyncio.shield(link.opened)
        per_token = self._tools.speeds.kv_bytes_per_token
        missing = max(0, len(self._facts.planned.ids) - opened.have_blocks)
        try:
            with link.cloud.shipping(int(per_token.value * BLOCK_TOKENS) * missing):
                await sender.run(link.stream, opened.have_blocks)
        except SegueError as error:
            log.warning("kv_not_shipped", turn=self._facts.asked.turn, error=str(error))
            self._emit(s.ShipFailed(number))
        finally:
            self._measure.note_shipped(sender.sent_blocks, sender.sent_bytes)
        if sender.sent_blocks:
            per_token.observe(sender.sent_bytes / sender.sent_blocks / BLOCK_TOKENS)

    async def _ship_again(self, number: int, link: CloudLink, blocks: list[bytes]) -> None:
        """Send what an instance lacks that takes the turn over."""
        opened = await asyncio.shield(link.opened)
        sender = self._tools.sender(blocks)
        try:
            for index, block in enumerate(blocks):
                kept = self._cache.get(block)
                if kept is None:  # evicted since: the cloud computes the rest
                    raise Overloaded("The prefix cache dropped a block of the prompt.")
                sender.offer(index, *kept)
            await sender.run(link.stream, opened.have_blocks)
        except SegueError as error:
            log.info("kv_not_shipped", turn=self._facts.asked.turn, error=str(error))
            self._emit(s.ShipFailed(number))
