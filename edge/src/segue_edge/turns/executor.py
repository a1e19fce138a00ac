"""Performs what a turn's state asks for, and brings it the signals that follow."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any

import msgspec
import structlog

from segue_contract.errors import Internal, Overloaded, SegueError, Unreachable
from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.plan import PlanReport, Shape, encode_plan
from segue_contract.sync.ops import Usage
from segue_contract.transport.turn_feed import TurnFeed
from segue_contract.turn.events import Ended, Frame, Reason, TurnEvent
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.turns import signals as s
from segue_edge.turns.asked import Asked
from segue_edge.turns.begin import Begun
from segue_edge.turns.edge_part import EdgePart
from segue_edge.turns.link import CloudLink, follow
from segue_edge.turns.measure import Measure
from segue_edge.turns.offline.outbox import Outbox
from segue_edge.turns.offline.turn import OfflineTurn
from segue_edge.turns.planning import Planned
from segue_edge.turns.prefill_job import Prefill
from segue_edge.turns.tools import EdgeTools
from segue_edge.turns.turn import TurnState
from segue_edge.uplink.clouds import Cloud, CloudSet
from segue_edge.uplink.sender import KvSender
from segue_edge.uplink.stream import TurnStream

log = structlog.get_logger("segue.turn")


class TurnExecutor:
    """One turn's tasks: a maker, a link, what ships KV over it, pauses. `run` is its whole life.

    Args:
        part: a prefill of this prompt that has begun, if any; it is this executor's from now on.
        planned: None for a turn that is only followed.
        follows: the session's turn before this one, as far as this node knows; "" for none.
    """

    def __init__(
        self,
        state: TurnState,
        asked: Asked,
        begun: Begun,
        planned: Planned | None,
        max_tokens: int,
        part: EdgePart | None,
        *,
        tools: EdgeTools,
        clouds: CloudSet,
        outbox: Outbox,
        feed: TurnFeed,
        measure: Measure,
        follows: str = "",
    ) -> None:
        self.cloud = begun.cloud
        self.ended: Ended | None = None
        self._state = state
        self._asked = asked
        self._begun = begun
        self._planned = planned
        self._max_tokens = max_tokens
        self._part = part
        self._tools = tools
        self._clouds = clouds
        self._outbox = outbox
        self._feed = feed
        self._measure = measure
        self._follows = follows
        self._room = begun.room
        self._link: CloudLink | None = None
        self._round: Iterator[Cloud] = iter(())
        self._signals: asyncio.Queue[s.Signal] = asyncio.Queue()  # a turn's tokens bound it
        self._tasks: set[asyncio.Task[None]] = set()
        self._link_tasks: set[asyncio.Task[None]] = set()

    def stop(self) -> None:
        """A device stops the turn, and no cloud serves it."""
        self._emit(s.StopAsked())

    async def run(self, first: Sequence[s.Instruction]) -> None:
        """Perform `first` and what follows until the turn is closed."""
        try:
            self._perform_all(first)
            while not self._state.closed:
                signal = await self._signals.get()
                self._perform_all(self._state.on(signal, time.monotonic()))
        finally:
            if self._part is not None:
                self._part.cancel()
            tasks = self._tasks | self._link_tasks
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._room is not None:
                self._room.free()

    def _emit(self, signal: s.Signal) -> None:
        self._signals.put_nowait(signal)

    def _spawn(
        self, work: Coroutine[Any, Any, None], name: str, tasks: set[asyncio.Task[None]]
    ) -> None:
        task = asyncio.create_task(work, name=f"{name} {self._asked.turn}")
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    # -- instructions --------------------------------------------------------------------------

    def _perform_all(self, instructions: Sequence[s.Instruction]) -> None:
        for instruction in instructions:
            self._perform(instruction)

    def _perform(self, instruction: s.Instruction) -> None:
        match instruction:
            case s.Show():
                self._show(instruction.event)
            case s.MakeTokens():
                self._make(instruction)
            case s.HaltMaker():
                if self._part is not None:
                    (self._part.cancel if instruction.drop else self._part.halt)()
            case s.SendTokens() | s.SendPlan() | s.HandOver() | s.SendEnd():
                self._send(instruction)
            case s.Open() | s.TakeOver() | s.Follow():
                self._open(instruction)
            case s.CloseLink():
                self._close_link()
            case s.Wait():
                self._spawn(self._wait(instruction.seconds), "pause", self._tasks)
            case s.KeepRoom():
                self._keep_room()
            case s.FreeRoom():
                if self._room is not None:
                    self._room.free()
                    self._room = None
            case s.Store():
                self._spawn(self._store(instruction.reason), "store", self._tasks)
            case s.Close():
                if instruction.error is not None:
                    log.warning("turn_broke", turn=self._asked.turn, error=str(instruction.error))
                self._feed.close(instruction.error)

    async def _wait(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._emit(s.Woke())

    def _show(self, event: TurnEvent) -> None:
        if isinstance(event, Frame):
            self._measure.saw_tokens(len(event.tokens), event.made_by)
        elif isinstance(event, Ended):
            event = self.ended = self._with_plan(event)
        self._feed.publish(event)

    def _with_plan(self, ended: Ended) -> Ended:
        """What was measured here is the last word on a turn that was planned here."""
        report = self.report()
        if report is None or not ended.durable:
            return ended
        return msgspec.structs.replace(ended, plan=encode_plan(report))

    def report(self) -> PlanReport | None:
        """The plan with what was measured so far; None for a turn that was not planned here."""
        if self._planned is None:
            return None
        report = self._measure.complete(self._planned.report, self._tools.manifest.geometry.kv)
        if self.cloud is not None:
            report.instance = self.cloud.instance
        if self._state.offline:
            report.shape = Shape.EDGE.value
        return report

    # -- the maker -----------------------------------------------------------------------------

    def _make(self, wanted: s.MakeTokens) -> None:
        assert self._planned is not None
        part, self._part = self._part, None
        if part is None or not part.computes(self._begun.prompt, wanted.made):
            if part is not None:
                part.cancel()
            part = EdgePart(
                self._tools,
                self._asked,
                self._begun.prompt,
                self._planned,
                self._max_tokens,
                wanted.made,
            )
        self._part = part
        self._spawn(self._run_maker(wanted.maker, part), "edge part", self._tasks)

    async def _run_maker(self, maker: int, part: EdgePart) -> None:
        def say(index: int, tokens: tuple[int, ...], pieces: tuple[str, ...]) -> None:
            self._emit(s.Made(maker, index, tokens, pieces))

        try:
            reason = await self._tools.stalls.guard(part.make(say, self._on_prefilled))
        except SegueError as error:
            self._emit(s.MakerFailed(maker, error))
        except Exception as error:
            log.error("edge_part_failed", turn=self._asked.turn, exc_info=error)
            failure = Internal(
                f"The edge failed with an unexpected {type(error).__name__}.",
                hint="See the edge's log.",
            )
            self._emit(s.MakerFailed(maker, failure))
        else:
            if reason is not None:
                self._emit(s.MakerEnded(maker, reason))

    def _on_prefilled(self, prefill: Prefill) -> None:
        self._measure.mark("prefilled")
        self._measure.model_s = prefill.model_s
        self._measure.edge_cached_blocks = prefill.cached_tokens // BLOCK_TOKENS
        if self._link is not None:
            self._measure.shipped_before_prefill_end = self._link.stream.sent_kv_bytes

    # -- the link ------------------------------------------------------------------------------

    def _open(self, wanted: s.Open | s.TakeOver | s.Follow) -> None:
        cloud = self._cloud_for(wanted)
        if cloud is None:
            self._emit(s.NoMoreClouds(wanted.link))
            return
        self.cloud = cloud
        if isinstance(wanted, s.Follow):
            following = follow(
                wanted.link, cloud, self._asked.request, wanted.from_index, self._emit
            )
            self._spawn(following, "follow", self._link_tasks)
            return
        again = wanted if isinstance(wanted, s.TakeOver) else None
        spec = self._spec(again, cloud)
        measure = self._measure if again is None else Measure()
        stream = TurnStream(cloud, spec, self._clouds.pacer)
        link = self._link = CloudLink(wanted.link, cloud, stream, spec, self._emit, measure)
        self._spawn(link.run(), "link", self._link_tasks)
        if again is not None:
            if spec.ship_blocks:
                self._spawn(self._ship_again(wanted.link, link, spec), "ship", self._link_tasks)
        elif self._part is not None and self._part.sender is not None:
            shipping = self._ship(wanted.link, link, self._part.sender)
            self._spawn(shipping, "ship", self._link_tasks)

    def _cloud_for(self, wanted: s.Open | s.TakeOver | s.Follow) -> Cloud | None:
        session = self._asked.session
        if isinstance(wanted, s.Open):
            return self._begun.cloud
        if isinstance(wanted, s.Follow):
            return next(iter(self._clouds.ranked(session)), None)
        if wanted.fresh:
            self._round = iter(self._clouds.ranked(session))
        return next(self._round, None)

    def _close_link(self) -> None:
        self._link = None
        for task in self._link_tasks:
            task.cancel()
        self._link_tasks = set()

    def _spec(self, again: s.TakeOver | None, cloud: Cloud) -> dpb.TurnSpec:
        request, planned = self._asked.request, self._planned
        assert planned is not None
        shape = self._state.shape
        if again is not None:
            ships = again.ship and bool(planned.ids) and self._tools.may_ship(cloud.recipes)
            ships = ships and self._tools.cache.lookup(planned.ids) == len(planned.ids)
            shape = Shape.SHIP if ships else Shape.TEXT
        return dpb.TurnSpec(
            session=request.session,
            device=request.device,
            turn=request.turn,
            epoch=self._begun.epoch,
            prompt=self._begun.prompt,
            blocks=planned.ids,
            recipe=self._tools.recipe,
            max_tokens=self._max_tokens,
            sampling=request.sampling,
            stop=request.stop,
            shape=shape.value,
            ship_blocks=len(planned.ids) if shape is Shape.SHIP else 0,
            edge_cached_tokens=planned.report.edge_cached_blocks * BLOCK_TOKENS,
            takeover=again is not None,
            known_tokens=again.known if again is not None else (),
        )

    def _send(self, wanted: s.SendTokens | s.SendPlan | s.HandOver | s.SendEnd) -> None:
        link = self._link
        if link is None:
            return
        match wanted:
            case s.SendTokens():
                frame = wanted.frame
                made = dpb.EdgeTokens(index=frame.index, tokens=frame.tokens, pieces=frame.pieces)
                message = dpb.RunRequest(tokens=made)
            case s.SendPlan():
                if self._part is not None and self._part.sender is not None:
                    self._measure.bridge_tokens = max(0, self._state.maker_index - 1)
                    self._note_shipped(self._part.sender)
                report = self.report()
                assert report is not None
                message = dpb.RunRequest(plan=dpb.PlanNote(plan=encode_plan(report)))
            case s.HandOver():
                message = dpb.RunRequest(hand_over=dpb.HandOver(next_index=wanted.next_index))
            case s.SendEnd():
                ended = dpb.EdgeEnded(reason=wanted.reason, next_index=wanted.next_index)
                message = dpb.RunRequest(ended=ended)
        with contextlib.suppress(Unreachable):  # the link says why
            link.stream.control(message)
        if isinstance(wanted, s.HandOver) and wanted.last:
            link.stream.finish()

    async def _ship(self, number: int, link: CloudLink, sender: KvSender) -> None:
        """A block that cannot be sent costs time, not the turn: the cloud computes it."""
        assert self._planned is not None
        opened = await asyncio.shield(link.opened)
        per_token = self._tools.speeds.kv_bytes_per_token
        missing = max(0, len(self._planned.ids) - opened.have_blocks)
        try:
            with link.cloud.shipping(int(per_token.value * BLOCK_TOKENS) * missing):
                await sender.run(link.stream, opened.have_blocks)
        except SegueError as error:
            log.warning("kv_not_shipped", turn=self._asked.turn, error=str(error))
            self._emit(s.ShipFailed(number))
        finally:
            self._note_shipped(sender)
        if sender.sent_blocks:
            per_token.observe(sender.sent_bytes / sender.sent_blocks / BLOCK_TOKENS)

    def _note_shipped(self, sender: KvSender) -> None:
        self._measure.shipped_blocks = sender.sent_blocks
        self._measure.shipped_bytes = sender.sent_bytes

    async def _ship_again(self, number: int, link: CloudLink, spec: dpb.TurnSpec) -> None:
        """Send what an instance lacks that takes the turn over."""
        opened = await asyncio.shield(link.opened)
        blocks = list(spec.blocks)
        sender = self._tools.sender(blocks)
        try:
            for index, block in enumerate(blocks):
                kept = self._tools.cache.get(block)
                if kept is None:  # evicted since: the cloud computes the rest
                    raise Overloaded("The prefix cache dropped a block of the prompt.")
                sender.offer(index, *kept)
            await sender.run(link.stream, opened.have_blocks)
        except SegueError as error:
            log.info("kv_not_shipped", turn=self._asked.turn, error=str(error))
            self._emit(s.ShipFailed(number))

    # -- offline -------------------------------------------------------------------------------

    def _keep_room(self) -> None:
        try:
            self._room = self._room or self._outbox.reserve()
        except SegueError as error:
            self._emit(s.NoRoom(error))
            return
        self._measure.offline = True
        self._emit(s.RoomKept())

    async def _store(self, reason: Reason) -> None:
        assert self._room is not None
        state, tokens = self._state, tuple(self._state.tokens)
        self._measure.offline = True
        report = self.report()
        assert report is not None
        plan = encode_plan(report)
        room, self._room = self._room, None
        await room.keep(
            OfflineTurn(
                self._asked,
                tuple(self._begun.prompt),
                tokens,
                tuple(state.pieces),
                reason,
                plan,
                begun=state.in_log,
                follows=self._follows,
            )
        )
        usage = Usage(
            prompt_tokens=len(self._begun.prompt),
            completion_tokens=len(tokens),
            edge_cached_tokens=report.edge_cached_blocks * BLOCK_TOKENS,
        )
        ended = Ended(
            epoch=state.epoch,
            reason=reason,
            usage=usage,
            plan=plan,
            next_index=len(tokens),
            durable=False,
        )
        self._emit(s.Stored(ended))
