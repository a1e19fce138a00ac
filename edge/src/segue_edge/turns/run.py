"""The life of one turn on the edge (ARCHITECTURE.md, The life of a turn).

    begin ─► plan ─┬─ text: relay the cloud's frames
                   ├─ ship: prefill, KV up, first token, bridge, hand over, relay
                   └─ edge: prefill, decode here, tokens up
    the stream breaks ─► take over at the next cloud; none for long ─► finish here, offline

A turn is a task of the node. Devices read its feed; their coming and going changes nothing.
"""

from __future__ import annotations

import asyncio

import structlog

from segue_contract.errors import Internal, PromptTooLong, SegueError, Unreachable
from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.plan import PlanReport, Shape, encode_plan
from segue_contract.sync.state import TurnState
from segue_contract.telemetry import EVENT_TURN
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.planner.ledger import ledger_line
from segue_edge.turns.asked import Asked
from segue_edge.turns.begin import Begun, begin, check_fits
from segue_edge.turns.deps import EdgeDeps
from segue_edge.turns.edge_part import EdgePart
from segue_edge.turns.feed import TurnFeed
from segue_edge.turns.follow import follow_cloud
from segue_edge.turns.link import TurnLink
from segue_edge.turns.measure import Measure
from segue_edge.turns.outbox import OfflineTurn
from segue_edge.turns.planning import NOTHING_YET, Planned, needs_edge, plan_turn
from segue_edge.turns.reply import Reply
from segue_edge.turns.takeover import take_over
from segue_edge.uplink.clouds import Cloud
from segue_edge.uplink.stream import TurnStream

log = structlog.get_logger("segue.turn")


class TurnRun:
    """`run` is the whole life. Attributes: `feed` for readers; `stopping` for an offline turn."""

    def __init__(self, asked: Asked, deps: EdgeDeps) -> None:
        self.asked = asked
        self.feed = TurnFeed()
        self.stopping = asyncio.Event()
        self.refused = False  # it never began: the same turn id may be tried again
        self.offline = False
        self._deps = deps
        self._measure = Measure()
        self._reply = Reply(epoch=0)
        self._began = False
        self._early: EdgePart | None = None

    async def run(self) -> None:
        """Serve the turn; every way it can fail ends in the feed."""
        try:
            await self._run()
        except asyncio.CancelledError:
            self._fail(Unreachable("This edge is shutting down.", hint="Read the turn elsewhere."))
            raise
        except SegueError as error:
            self._fail(error)
        except Exception as error:
            log.error("turn_failed", turn=self.asked.turn, exc_info=error)
            self._fail(
                Internal(
                    f"The turn failed with an unexpected {type(error).__name__}.",
                    hint="See the edge's log; try again.",
                )
            )
        finally:
            self.feed.close()

    def _fail(self, error: SegueError) -> None:
        self.refused = not self._began
        if self._began:
            log.warning("turn_broke", turn=self.asked.turn, error=str(error))
        self.feed.close(error)

    async def _run(self) -> None:
        try:
            begun = await begin(self._deps, self.asked, self._start_early)
            self._measure.mark("begun")
            await self._run_begun(begun)
        finally:
            self._drop_early()

    def _drop_early(self) -> None:
        if self._early is not None:
            self._early.cancel()
            self._early = None

    def _start_early(self, cloud: Cloud, prompt: list[int]) -> None:
        """Prefill what will most likely be the prompt while the cloud is still being asked."""
        guess = Begun(cloud, prompt)
        max_tokens, fits = self._max_tokens(guess)
        if not fits:
            return
        planned = plan_turn(self._deps, self.asked, guess, max_tokens, NOTHING_YET)
        if needs_edge(planned.plan.shape):
            self._early = self._part(prompt, planned, max_tokens)
            self._early.start_prefill()

    def _part(self, prompt: list[int], planned: Planned, max_tokens: int) -> EdgePart:
        return EdgePart(
            self._deps, self.asked, prompt, planned, self._measure, self._reply, self._show,
            max_tokens,
        )  # fmt: skip

    async def _run_begun(self, begun: Begun) -> None:
        self._began = True
        if self._early is not None and (begun.joined or not self._early.computes(begun.prompt)):
            self._drop_early()
        if begun.joined:
            assert begun.cloud is not None
            await follow_cloud(self._deps.clouds, self.asked, self.feed)
            return
        self._reply.epoch = begun.epoch
        started = pb.TurnStarted(turn=self.asked.turn, epoch=begun.epoch, offset=begun.offset)
        self.feed.publish(pb.TurnEvent(started=started))
        max_tokens, fits = self._max_tokens(begun)
        early = self._early.under_way if self._early is not None else NOTHING_YET
        planned = plan_turn(self._deps, self.asked, begun, max_tokens, early)
        self._measure.mark("planned")
        shape = planned.plan.shape if fits else Shape.TEXT
        if self._early is not None and not self._early.adopt(planned):
            self._drop_early()
        if begun.cloud is None:
            await self._finish_offline(begun, planned, max_tokens)
            return
        await self._serve(begun, begun.cloud, planned, shape, max_tokens)

    def _max_tokens(self, begun: Begun) -> tuple[int, bool]:
        """What the context leaves of max_tokens. A turn that is begun and too long still goes to
        the cloud, which ends it in the log with the error."""
        asked = self.asked.request.max_tokens
        try:
            return min(asked, check_fits(self._deps, begun.prompt)), True
        except PromptTooLong:
            return asked, False

    # -- with a cloud --------------------------------------------------------------------------

    async def _serve(
        self, begun: Begun, cloud: Cloud, planned: Planned, shape: Shape, max_tokens: int
    ) -> None:
        part, self._early = self._early, None
        if part is None and needs_edge(shape):
            part = self._part(begun.prompt, planned, max_tokens)
            part.start_prefill()  # before the stream: the first token depends on nothing else
        spec = self._spec(begun, planned, shape, max_tokens)
        try:
            ended = await self._first_attempt(cloud, spec, part, planned)
        except SegueError as error:
            if isinstance(error, Unreachable):
                cloud.failed(error)
            log.info("uplink_broke", turn=self.asked.turn, cloud=cloud.target, error=str(error))
            recovered = await take_over(
                self._deps, self.asked, spec, self._reply, self._show_all, error
            )
            if recovered is None:
                if part is not None:
                    part.cancel()
                await self._finish_offline(begun, planned, max_tokens)
                return
            cloud, ended = recovered
        finally:
            if part is not None:
                part.cancel()
        await self._end(begun, cloud, planned, ended)

    async def _first_attempt(
        self, cloud: Cloud, spec: dpb.TurnSpec, part: EdgePart | None, planned: Planned
    ) -> pb.TurnEnded:
        async with TurnStream(cloud, spec, self._deps.clouds.pacer) as stream:
            link = TurnLink(cloud, stream, self._reply, self._show_all, self._measure)
            speaking: asyncio.Task[None] | None = None
            if part is None:
                stream.control(self._plan_note(planned))
            else:
                speaking = asyncio.create_task(
                    part.speak(link, lambda: self._plan_note(planned)), name="edge part"
                )
            try:
                return await link.relay(speaking)
            finally:
                if speaking is not None:
                    speaking.cancel()
                    await asyncio.gather(speaking, return_exceptions=True)

    def _spec(self, begun: Begun, planned: Planned, shape: Shape, max_tokens: int) -> dpb.TurnSpec:
        request = self.asked.request
        return dpb.TurnSpec(
            session=request.session,
            device=request.device,
            turn=request.turn,
            epoch=begun.epoch,
            prompt=begun.prompt,
            blocks=planned.ids,
            recipe=self._deps.recipe,
            max_tokens=max_tokens,
            sampling=request.sampling,
            stop=request.stop,
            shape=shape.value,
            ship_blocks=len(planned.ids) if shape is Shape.SHIP else 0,
            edge_cached_tokens=planned.report.edge_cached_blocks * BLOCK_TOKENS,
        )

    def _plan_note(self, planned: Planned) -> dpb.RunRequest:
        return dpb.RunRequest(plan=dpb.PlanNote(plan=encode_plan(self._report(planned))))

    # -- without one ---------------------------------------------------------------------------

    async def _finish_offline(self, begun: Begun, planned: Planned, max_tokens: int) -> None:
        """Make the rest of the reply here; the log gets the turn when a cloud is back."""
        self.offline = self._measure.offline = True
        self._deps.outbox.check_room()
        self._drop_early()  # it may have sampled; the reply may have grown since
        part = self._part(begun.prompt, planned, max_tokens)
        try:
            part.start_prefill()
            reason = await part.speak_alone(self.stopping) or "cancelled"
        finally:
            part.cancel()
        report = self._report(planned)
        report.shape = Shape.EDGE.value
        ended = pb.TurnEnded(
            epoch=self._reply.epoch,
            reason=reason,
            usage=pb.Usage(
                prompt_tokens=len(begun.prompt),
                completion_tokens=self._reply.next_index,
                edge_cached_tokens=report.edge_cached_blocks * BLOCK_TOKENS,
            ),
            plan=encode_plan(report),
            next_index=self._reply.next_index,
            durable=False,
        )
        self._deps.outbox.add(
            OfflineTurn(
                self.asked,
                tuple(begun.prompt),
                tuple(self._reply.tokens),
                tuple(self._reply.pieces),
                reason,
                ended.plan,
                begun=begun.cloud is not None,
            )
        )
        await self._close(begun, ended, report)

    # -- the end -------------------------------------------------------------------------------

    async def _end(self, begun: Begun, cloud: Cloud, planned: Planned, ended: pb.TurnEnded) -> None:
        report = self._report(planned)
        report.instance = cloud.instance
        final = pb.TurnEnded()
        final.CopyFrom(ended)
        final.plan = encode_plan(report)
        history = self._deps.histories.of(self.asked.session)
        if report.shape == Shape.EDGE.value:  # it computed nothing: what it said when it opened
            held = begun.prompt[: report.cloud_cached_blocks * BLOCK_TOKENS]
        else:
            held = [*begun.prompt, *self._reply.tokens]
        history.cloud_now_holds(cloud.instance, held)
        await self._close(begun, final, report)

    async def _close(self, begun: Begun, ended: pb.TurnEnded, report: PlanReport) -> None:
        self.feed.publish(pb.TurnEvent(ended=ended))
        self.feed.close()
        request = self.asked.request
        if ended.reason != "error":
            self._deps.histories.of(request.session).add(
                TurnState(
                    turn=request.turn,
                    device=request.device,
                    prompt=request.prompt,
                    epoch=self._reply.epoch,
                    tokens=list(self._reply.tokens),
                    pieces=list(self._reply.pieces),
                    reason=ended.reason,
                )
            )
            self._deps.speeds.reply.observe(self._reply.next_index)
            self._deps.warmer.add(request.session, [*begun.prompt, *self._reply.tokens])
        facts = {
            "session": request.session,
            "turn": request.turn,
            "end": ended.reason,
            "tokens": self._reply.next_index,
            "phases": self._measure.phases,
        }
        log.info(EVENT_TURN, **facts, **_summary(report))
        await self._deps.ledger.append(ledger_line(report, **facts))

    def _report(self, planned: Planned) -> PlanReport:
        return self._measure.complete(planned.report, self._deps.manifest.geometry.kv)

    def _show(self, event: pb.TurnEvent) -> None:
        if event.WhichOneof("kind") == "frame":
            self._measure.saw_tokens(len(event.frame.tokens), event.frame.made_by or "cloud")
        self.feed.publish(event)

    def _show_all(self, events: list[pb.TurnEvent]) -> None:
        for event in events:
            self._show(event)


def _summary(report: PlanReport) -> dict[str, object]:
    """The report's figures that a log line carries; the ledger has all of it."""
    actual = report.actual
    assert actual is not None
    return {
        "shape": report.shape,
        "forced": report.forced,
        "reason": report.reason,
        "first_token_by": report.first_token_by,
        "instance": report.instance,
        "predicted_ms": {name: round(c.total_s * 1e3, 1) for name, c in report.predicted.items()},
        "ttft_ms": round(actual.ttft_s * 1e3, 1),
        "gap_ms": round(actual.gap_s * 1e3, 1),
        "total_ms": round(actual.total_s * 1e3, 1),
        "regret_ms": round(report.regret_s * 1e3, 1),
        "overhead_ms": round(report.overhead_s * 1e3, 1),
        "prompt_tokens": report.prompt_tokens,
        "edge_cached_blocks": report.edge_cached_blocks,
        "cloud_cached_blocks": report.cloud_cached_blocks,
        "shipped_blocks": report.shipped_blocks,
        "shipped_bytes": report.shipped_bytes,
        "bridge_tokens": report.bridge_tokens,
        "offline": report.offline,
    }
