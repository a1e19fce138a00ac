"""One `Decode.Run` stream: what comes up goes to the turn's owner, what it makes goes down."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from segue_cloud.engine.port import Engine
from segue_cloud.turns.intake import KvIntake
from segue_cloud.turns.owner import TurnOwner
from segue_cloud.turns.patience import done_within
from segue_contract.errors import DeadlineExceeded, InvalidArgument
from segue_contract.limits import (
    EDGE_SILENCE_LOOKS,
    READY_POLL_S,
    TURN_EVENT_QUEUE,
    TurnLimits,
)
from segue_contract.liveness import Silence
from segue_contract.turn.events import Durable, Frame, MadeBy, TurnEvent
from segue_contract.turn.wire import to_reply
from segue_contract.v1 import decode_pb2 as dpb


class RunStream:
    """Serves one edge's stream for a turn that `owner` runs.

    Args:
        attached: the owner ran before this stream came; what the edge makes is not taken.
        goes_on: a take-over in which the edge sends KV and makes no more tokens.
    """

    def __init__(
        self,
        owner: TurnOwner,
        intake: KvIntake,
        engine: Engine,
        *,
        attached: bool,
        goes_on: bool = False,
        limits: TurnLimits = TurnLimits(),
    ) -> None:
        self._owner = owner
        self._intake = intake
        self._engine = engine
        self._attached = attached
        self._goes_on = goes_on
        self._limits = limits
        self._replies: asyncio.Queue[dpb.RunReply | None] = asyncio.Queue(TURN_EVENT_QUEUE)

    async def serve(
        self, requests: AsyncIterator[dpb.RunRequest], opened: dpb.Opened
    ) -> AsyncIterator[dpb.RunReply]:
        """Yields replies until the turn has ended.

        Raises:
            KvError, InvalidArgument, DeadlineExceeded: the edge's side of the stream is unusable;
                the turn itself goes on without it.
        """
        yield dpb.RunReply(opened=opened)
        reading = asyncio.create_task(self._read(requests), name="run stream: read")
        helpers = [
            asyncio.create_task(self._relay(), name="run stream: relay"),
            asyncio.create_task(self._tell_ready(), name="run stream: ready"),
            asyncio.create_task(self._tell_stop(), name="run stream: stop"),
        ]
        reading.add_done_callback(self._read_failed)
        try:
            while (reply := await self._replies.get()) is not None:
                yield reply
            if reading.done() and not reading.cancelled() and reading.exception() is not None:
                reading.result()
        finally:
            for task in (reading, *helpers):
                task.cancel()
            await asyncio.gather(reading, *helpers, return_exceptions=True)
            if not self._attached:
                self._owner.edge_lost()

    def _read_failed(self, reading: asyncio.Task[None]) -> None:
        """A failed read ends the stream; a finished one leaves the turn to its owner."""
        if reading.cancelled():
            return
        if not self._attached:
            self._owner.edge_lost()
        if reading.exception() is not None:
            while self._replies.full():
                self._replies.get_nowait()
            self._replies.put_nowait(None)

    # -- up ------------------------------------------------------------------------------------

    async def _read(self, requests: AsyncIterator[dpb.RunRequest]) -> None:
        iterator = aiter(requests)
        silence = Silence(EDGE_SILENCE_LOOKS)
        beats = False  # the edge sends heartbeats: then their absence says something
        look_s = self._limits.edge_look_s
        quiet = 0  # looks since the last message that says more than that the edge lives
        while True:
            reading = asyncio.ensure_future(anext(iterator, None))
            try:
                while not await done_within({reading}, look_s, looks=1):
                    quiet += 1
                    silence.look()
                    self._check_patience(quiet * look_s, beats and silence.lost)
            finally:
                reading.cancel()
            request = reading.result()
            silence.heard()
            if request is None:
                if not self._attached and not self._intake.complete.is_set():
                    self._intake.close()
                return
            if request.WhichOneof("kind") == "heartbeat":
                beats = True
                continue
            if not self._attached:
                await self._take(request)
            quiet = 0

    def _check_patience(self, quiet_s: float, silent: bool) -> None:
        """Raises DeadlineExceeded where the edge owes something, and is waited for in vain.

        Seconds are counted in looks: time in which this process did not run is no one's silence.
        """
        if self._attached or not self._owner.waits_for_edge:
            return
        shipping = not self._intake.complete.is_set()
        begun = self._intake.received_bytes > 0 if shipping else self._owner.next_index > 0
        bound_s = self._limits.kv_stall_s if begun else self._limits.kv_first_byte_s
        # While KV is on its way, heartbeats wait behind it on a thin link.
        if quiet_s < bound_s and not (silent and not shipping):
            return
        raise DeadlineExceeded(
            f"The edge {'fell silent' if silent else 'sent nothing more'} in the middle of a turn.",
            hint="The cloud computes the rest by itself.",
        )

    async def _take(self, request: dpb.RunRequest) -> None:
        owner = self._owner
        kind = request.WhichOneof("kind")
        if kind == "kv":
            await self._intake.feed(request.kv.data)
        elif kind == "tokens":
            message = request.tokens
            owner.edge_tokens(message.index, tuple(message.tokens), tuple(message.pieces))
        elif kind == "hand_over":
            owner.hand_over(request.hand_over.next_index)
        elif kind == "ended":
            owner.edge_ended(request.ended.reason, request.ended.next_index)
        elif kind == "plan":
            owner.note_plan(request.plan.plan)
        else:
            raise InvalidArgument(f"A {kind or 'n empty'} message does not belong here.")

    # -- down ----------------------------------------------------------------------------------

    async def _relay(self) -> None:
        """Frames that the edge made itself come back as a durability notice."""
        async for event in self._owner.feed.read():
            reply = self._reply_of(event)
            if reply is not None:
                await self._replies.put(reply)
        await self._replies.put(None)

    def _reply_of(self, event: TurnEvent) -> dpb.RunReply | None:
        if isinstance(event, Frame) and event.made_by is MadeBy.EDGE and not self._attached:
            event = Durable(event.next_index, event.offset)
        return to_reply(event)

    async def _tell_ready(self) -> None:
        if self._attached:
            return
        await self._intake.complete.wait()
        # After a take-over nobody makes tokens meanwhile: the engine shall know of the turn now,
        # not after all who wait there and a round trip.
        if self._goes_on:
            self._owner.hand_over(self._owner.next_index)
        while not self._goes_on and self._engine.stats().waiting > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READY_POLL_S):
                    await self._owner.ended.wait()
                    return
        ready = dpb.Ready(
            received_blocks=self._intake.received_blocks,
            receive_s=self._intake.receive_s,
            received_bytes=self._intake.received_bytes,
        )
        await self._replies.put(dpb.RunReply(ready=ready))

    async def _tell_stop(self) -> None:
        await self._owner.stopping.wait()
        await self._replies.put(dpb.RunReply(stop=dpb.StopNow(reason="cancelled")))
