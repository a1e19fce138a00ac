"""What the edge itself does in a turn: prefill, KV up, first token, bridge, hand-over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from segue_contract.errors import SegueError
from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.plan import Shape
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.compute import Priority
from segue_edge.turns.asked import Asked
from segue_edge.turns.deps import EdgeDeps
from segue_edge.turns.link import TurnLink
from segue_edge.turns.measure import Measure
from segue_edge.turns.model_port import Array
from segue_edge.turns.planning import Planned, UnderWay
from segue_edge.turns.prefill_job import Prefill, PrefillJob
from segue_edge.turns.reply import Reply
from segue_edge.turns.voice import INTERRUPTED, Voice
from segue_edge.uplink.sender import KvSender

log = structlog.get_logger("segue.turn")

BRIDGE_ROOM = 64  # tokens: a longer bridge makes the buffer grow once

PlanNote = Callable[[], dpb.RunRequest]


class EdgePart:
    """One prefill and what follows from it. `start_prefill` first; `cancel` in any case at last.

    Args:
        show: puts an event before the devices.
        max_tokens: for the whole reply, tokens already in `reply` included.
    """

    def __init__(
        self,
        deps: EdgeDeps,
        asked: Asked,
        prompt: list[int],
        planned: Planned,
        measure: Measure,
        reply: Reply,
        show: Callable[[pb.TurnEvent], None],
        max_tokens: int,
    ) -> None:
        self._deps = deps
        self._asked = asked
        self._tokens = [*prompt, *reply.tokens]
        self._planned = planned
        self._measure = measure
        self._reply = reply
        self._show = show
        self._max_tokens = max_tokens
        self._job: PrefillJob | None = None
        self._link: TurnLink | None = None
        self._sender: KvSender | None = None
        if planned.plan.shape is Shape.SHIP:
            self._sender = KvSender(deps.recipe, planned.ids, deps.encoder, deps.encode)

    def start_prefill(self) -> None:
        """Queue the prefill. Raises Overloaded where the compute queue is full."""
        loop = asyncio.get_running_loop()
        sender = self._sender

        def on_block(index: int, k: Array, v: Array) -> None:
            assert sender is not None
            with contextlib.suppress(RuntimeError):  # the loop closed meanwhile
                loop.call_soon_threadsafe(sender.offer, index, k, v)

        self._job = PrefillJob(
            self._deps.model,
            self._deps.cache,
            self._tokens,
            self._planned.ids,
            on_block=on_block if sender is not None else None,
            sampling=self._asked.sampling,
            index=self._reply.next_index,
            chunk=self._planned.chunk,
            room=self._max_tokens if sender is None else BRIDGE_ROOM,
        )
        self._deps.compute.submit(self._job, Priority.PREFILL)

    # A prefill may begin before the plan is final: it is kept where it serves the plan as well.

    @property
    def under_way(self) -> UnderWay:
        assert self._job is not None
        left = 0 if self._job.done.done() else self._job.left
        return UnderWay(left, self._planned.report.edge_cached_blocks)

    def computes(self, prompt: list[int]) -> bool:
        return self._tokens == prompt

    def adopt(self, planned: Planned) -> bool:
        """Go on under `planned`; False where that is another shape."""
        same = self._planned.plan.shape is planned.plan.shape
        if same:
            self._planned = planned
        return same

    def cancel(self) -> None:
        """Drop what has not been computed yet. Idempotent."""
        if self._job is not None and not self._job.done.done():
            self._job.cancel()

    # -- with a cloud --------------------------------------------------------------------------

    async def speak(self, link: TurnLink, plan_note: PlanNote) -> None:
        """Make tokens until the cloud takes over or the reply ends, and tell the cloud so.

        Raises:
            SegueError: the model failed, or the stream broke.
        """
        self._link = link
        shipping: asyncio.Task[None] | None = None
        link.heed_ready = self._sender is not None
        if self._sender is not None:
            shipping = asyncio.create_task(self._ship(self._sender, link), name="ship KV")
        try:
            reason = await self._speak(link.silence)
            if link.stopped:
                return  # the cloud ends the turn
            if self._sender is not None:
                self._measure.bridge_tokens = max(0, self._reply.edge_made - 1)
            self._note_shipped()
            link.stream.control(plan_note())
            link.stream.control(_closing(reason, self._reply.next_index))
            if shipping is not None and reason == INTERRUPTED:
                await shipping
        finally:
            if shipping is not None:
                shipping.cancel()
                await asyncio.gather(shipping, return_exceptions=True)

    async def _ship(self, sender: KvSender, link: TurnLink) -> None:
        """A block that cannot be sent costs time, not the turn: the cloud computes it."""
        opened = await asyncio.shield(link.opened)
        backlog = int(self._deps.speeds.kv_bytes_per_token.value * BLOCK_TOKENS) * max(
            0, len(self._planned.ids) - opened.have_blocks
        )
        try:
            with link.cloud.shipping(backlog):
                await sender.run(link.stream, opened.have_blocks)
        except SegueError as error:
            log.warning("kv_not_shipped", turn=self._asked.turn, error=str(error))
            link.silence.set()
        finally:
            self._note_shipped()
        if sender.sent_blocks:
            per_token = sender.sent_bytes / sender.sent_blocks / BLOCK_TOKENS
            self._deps.speeds.kv_bytes_per_token.observe(per_token)

    def _note_shipped(self) -> None:
        if self._sender is not None:
            self._measure.shipped_blocks = self._sender.sent_blocks
            self._measure.shipped_bytes = self._sender.sent_bytes

    # -- alone ---------------------------------------------------------------------------------

    async def speak_alone(self, stopping: asyncio.Event) -> str:
        """The whole rest of the reply, for the device only. "" where it was stopped."""
        return await self._speak(stopping)

    # -- both ----------------------------------------------------------------------------------

    async def _speak(self, until: asyncio.Event) -> str:
        prefill = await self._prefilled()
        voice = Voice(
            self._deps.model,
            self._deps.compute,
            self._deps.tokenizer,
            self._deps.speeds,
            sampling=self._asked.sampling,
            stop=self._asked.stop,
            max_tokens=self._max_tokens,
            end_tokens=self._deps.end_tokens,
            made=self._reply.tokens,
            say=self._say,
        )
        return await voice.speak(prefill, until)

    async def _prefilled(self) -> Prefill:
        assert self._job is not None
        prefill = await self._job.done
        self._measure.mark("prefilled")
        self._measure.model_s = prefill.model_s
        self._measure.edge_cached_blocks = prefill.cached_tokens // BLOCK_TOKENS
        if self._link is not None:
            self._measure.shipped_before_prefill_end = self._link.stream.sent_kv_bytes
        for tokens, seconds in prefill.rates:
            if tokens >= 64 and seconds > 0:
                self._deps.speeds.prefill_tokens_per_s.observe(tokens / seconds)
        return prefill

    def _say(self, tokens: tuple[int, ...], pieces: tuple[str, ...]) -> None:
        index = self._reply.next_index
        self._show(self._reply.preview(tokens, pieces))
        if self._link is not None:
            made = dpb.EdgeTokens(index=index, tokens=tokens, pieces=pieces)
            self._link.stream.control(dpb.RunRequest(tokens=made))


def _closing(reason: str, next_index: int) -> dpb.RunRequest:
    """Hand over where the edge was interrupted, end the turn where it made the last token."""
    if reason == INTERRUPTED:
        return dpb.RunRequest(hand_over=dpb.HandOver(next_index=next_index))
    return dpb.RunRequest(ended=dpb.EdgeEnded(reason=reason, next_index=next_index))
