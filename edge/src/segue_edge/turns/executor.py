"""Performs what a turn's state asks for, and brings it the signals that follow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec
import structlog

from segue_contract.errors import Internal, SegueError
from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.plan import PlanReport, Shape, encode_plan
from segue_contract.sync.ops import Usage
from segue_contract.transport.turn_feed import TurnFeed
from segue_contract.turn.events import Ended, Frame, Reason, TurnEvent
from segue_edge.turns.cloud.side import CloudSide
from segue_edge.turns.cloud.spec import Sent, TurnFacts
from segue_edge.turns.compute.edge_part import EdgePart
from segue_edge.turns.compute.prefill_job import Prefill
from segue_edge.turns.compute.tools import EdgeTools
from segue_edge.turns.measure import Measure
from segue_edge.turns.offline.outbox import Outbox
from segue_edge.turns.offline.turn import OfflineTurn
from segue_edge.turns.state import signals as s
from segue_edge.turns.state.turn import TurnState
from segue_edge.uplink.clouds import CloudSet
from segue_edge.uplink.sender import KvSender

log = structlog.get_logger("segue.turn")


class TurnExecutor:
    """One turn's tasks: a maker, a link, what ships KV over it, pauses. `run` is its whole life.

    Args:
        part: a prefill of this prompt that has begun, if any; it is this executor's from now on.
        follows: the session's turn before this one, as far as this node knows; "" for none.
    """

    def __init__(
        self,
        state: TurnState,
        facts: TurnFacts,
        part: EdgePart | None = None,
        *,
        tools: EdgeTools,
        clouds: CloudSet,
        outbox: Outbox,
        feed: TurnFeed,
        measure: Measure,
        follows: str = "",
    ) -> None:
        self.ended: Ended | None = None
        self._state = state
        self._asked = facts.asked
        self._begun = facts.begun
        self._planned = facts.planned
        self._max_tokens = facts.max_tokens
        self._part = part
        self._tools = tools
        self._side = CloudSide(facts, tools, clouds, measure, self._emit)
        self._outbox = outbox
        self._feed = feed
        self._measure = measure
        self._follows = follows
        self._room = facts.begun.room
        self._signals: asyncio.Queue[s.Signal] = asyncio.Queue()  # a turn's tokens bound it
        self._tasks: set[asyncio.Task[None]] = set()

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
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, *self._side.close(), return_exceptions=True)
            if self._room is not None:
                self._room.free()

    def _emit(self, signal: s.Signal) -> None:
        self._signals.put_nowait(signal)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"{name} {self._asked.turn}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def _sender(self) -> KvSender | None:
        return self._part.sender if self._part is not None else None

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
                self._side.open(instruction, self._state.shape, self._sender)
            case s.CloseLink():
                self._side.close()
            case s.Wait():
                self._spawn(self._wait(instruction.seconds), "pause")
            case s.KeepRoom():
                self._keep_room()
            case s.FreeRoom():
                if self._room is not None:
                    self._room.free()
                    self._room = None
            case s.Store():
                self._spawn(self._store(instruction.reason), "store")
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
        if self._side.cloud is not None:
            report.instance = self._side.cloud.instance
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
        self._spawn(self._run_maker(wanted.maker, part), "edge part")

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
        self._measure.shipped_before_prefill_end = self._side.sent_kv_bytes

    # -- the cloud -----------------------------------------------------------------------------

    def _send(self, wanted: Sent) -> None:
        plan = b""
        if isinstance(wanted, s.SendPlan):
            if self._sender is not None:
                self._measure.bridge_tokens = max(0, self._state.maker_index - 1)
                self._measure.note_shipped(self._sender.sent_blocks, self._sender.sent_bytes)
            report = self.report()
            assert report is not None
            plan = encode_plan(report)
        self._side.send(wanted, plan)

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
