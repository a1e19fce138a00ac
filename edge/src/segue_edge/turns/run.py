"""One turn on the edge, from what a device asked to its end.

    begin ─► plan ─► TurnState decides, TurnExecutor performs ─► remember, write down

A turn is a task of the node. Devices read its feed; their coming and going changes nothing.
What happens when something fails on the way: `segue_edge.turns.state.turn`.
"""

from __future__ import annotations

import asyncio
import time

import structlog

from segue_contract.errors import Internal, PromptTooLong, SegueError, Unreachable
from segue_contract.limits import EdgeTurnLimits
from segue_contract.plan import Shape
from segue_contract.sync.state import TurnState as LoggedTurn
from segue_contract.transport.turn_feed import TurnFeed
from segue_contract.turn.from_log import turn_events
from segue_edge.turns.asked import Asked
from segue_edge.turns.closing import TurnClosing
from segue_edge.turns.cloud.begin import Begun, TurnOpening
from segue_edge.turns.cloud.spec import TurnFacts
from segue_edge.turns.compute.edge_part import EdgePart
from segue_edge.turns.compute.tools import EdgeTools
from segue_edge.turns.executor import TurnExecutor
from segue_edge.turns.history import HistoryCache
from segue_edge.turns.measure import Measure
from segue_edge.turns.offline.outbox import Outbox
from segue_edge.turns.planning import NOTHING_YET, TurnPlanner, needs_edge
from segue_edge.turns.state.turn import TurnState
from segue_edge.uplink.clouds import Cloud, CloudSet

log = structlog.get_logger("segue.turn")


class TurnRun:
    """`run` is the whole life. Attributes: `feed` for readers."""

    def __init__(
        self,
        asked: Asked,
        *,
        opening: TurnOpening,
        planner: TurnPlanner,
        tools: EdgeTools,
        clouds: CloudSet,
        histories: HistoryCache,
        outbox: Outbox,
        closing: TurnClosing,
        limits: EdgeTurnLimits,
    ) -> None:
        self.asked = asked
        self.feed = TurnFeed()
        self._opening = opening
        self._planner = planner
        self._tools = tools
        self._clouds = clouds
        self._histories = histories
        self._outbox = outbox
        self._closing = closing
        self._limits = limits
        self._measure = Measure()
        self._state: TurnState | None = None
        self._executor: TurnExecutor | None = None
        self._early: EdgePart | None = None

    @property
    def offline(self) -> bool:
        """No cloud serves it, so that only this node can stop it."""
        return self._state is not None and self._state.offline

    @property
    def stalled(self) -> bool:
        """It waits for this node's compute, and that hangs."""
        waits = self._state is not None and self._state.waits_for_maker
        return waits and self._tools.stalls.stalled

    @property
    def whole(self) -> bool:
        """Its end was shown: a device that comes back may be told all of it from here."""
        return self.feed.events.ended is not None

    def stop(self) -> None:
        """End an offline turn soon, with reason "cancelled"."""
        if self._executor is not None:
            self._executor.stop()

    async def run(self) -> None:
        """Serve the turn; every way it can fail ends in the feed."""
        try:
            await self._run()
        except asyncio.CancelledError:
            leaving = Unreachable("This edge is shutting down.", hint="Read the turn elsewhere.")
            self.feed.close(leaving)
            raise
        except SegueError as error:
            self.feed.close(error)
        except Exception as error:
            log.error("turn_failed", turn=self.asked.turn, exc_info=error)
            self.feed.close(
                Internal(
                    f"The turn failed with an unexpected {type(error).__name__}.",
                    hint="See the edge's log; try again.",
                )
            )
        finally:
            self.feed.close()

    async def _run(self) -> None:
        if self.asked.request.must_exist:
            await self._follow(Begun(None, [], joined=True))
            return
        try:
            begun = await self._opening.begin(self.asked, self._start_early)
            self._measure.mark("begun")
            if begun.ended is not None:
                for event in turn_events(begun.ended):
                    self.feed.publish(event)
            elif begun.joined:
                await self._follow(begun)
            else:
                await self._serve(begun)
        finally:
            if self._early is not None:
                self._early.cancel()

    def _start_early(self, cloud: Cloud, prompt: list[int]) -> None:
        """Prefill what will most likely be the prompt while the cloud is still being asked."""
        guess = Begun(cloud, prompt)
        max_tokens, fits = self._max_tokens(guess)
        if not fits:
            return
        planned = self._planner.plan(self.asked, guess, max_tokens, NOTHING_YET)
        if needs_edge(planned.plan.shape):
            self._early = EdgePart(self._tools, self.asked, prompt, planned, max_tokens)
            self._early.start_prefill()

    def _max_tokens(self, begun: Begun) -> tuple[int, bool]:
        """What the context leaves of max_tokens. A turn that is begun and too long still goes to
        the cloud, which ends it in the log with the error."""
        asked = self.asked.request.max_tokens
        try:
            return min(asked, self._opening.check_fits(begun.prompt)), True
        except PromptTooLong:
            return asked, False

    async def _follow(self, begun: Begun) -> None:
        """Another node runs the turn, or ran it."""
        state = self._state = TurnState(self.asked.turn, 0, 0, Shape.TEXT, self._limits)
        executor = self._executor = TurnExecutor(
            state,
            TurnFacts(self.asked, begun),
            tools=self._tools,
            clouds=self._clouds,
            outbox=self._outbox,
            feed=self.feed,
            measure=self._measure,
        )
        await executor.run(state.join(time.monotonic()))

    async def _serve(self, begun: Begun) -> None:
        early = self._early
        if early is not None and not early.computes(begun.prompt):
            early.cancel()
            early = None
        max_tokens, fits = self._max_tokens(begun)
        under_way = early.under_way if early is not None else NOTHING_YET
        planned = self._planner.plan(self.asked, begun, max_tokens, under_way)
        self._measure.mark("planned")
        if early is not None and not early.adopt(planned):
            early.cancel()
            early = None
        shape = planned.plan.shape if fits else Shape.TEXT
        epoch, offset = begun.epoch, begun.offset
        state = self._state = TurnState(self.asked.turn, epoch, offset, shape, self._limits)
        executor = self._executor = TurnExecutor(
            state,
            TurnFacts(self.asked, begun, planned, max_tokens),
            early,
            tools=self._tools,
            clouds=self._clouds,
            outbox=self._outbox,
            feed=self.feed,
            measure=self._measure,
            follows=self._histories.of(self.asked.session).newest,
        )
        now = time.monotonic()
        if begun.cloud is None:
            self._measure.offline = True
            await executor.run(state.begin_offline(now))
        else:
            await executor.run(state.begin(now))
        await self._close(begun, state, executor)

    async def _close(self, begun: Begun, state: TurnState, executor: TurnExecutor) -> None:
        ended, report = executor.ended, executor.report()
        if ended is None or report is None:
            return
        request = self.asked.request
        turn = LoggedTurn(
            turn=request.turn,
            device=request.device,
            prompt=request.prompt,
            epoch=state.epoch,
            tokens=list(state.tokens),
            pieces=list(state.pieces),
            max_tokens=request.max_tokens,
            sampling=self.asked.sampling,
            stop=self.asked.stop,
            reason=ended.reason,
            context_from=begun.context_from,
        )
        self._closing.remember(self.asked, begun.prompt, turn, ended, report)
        await self._closing.write_down(self.asked, ended, report, self._measure)
