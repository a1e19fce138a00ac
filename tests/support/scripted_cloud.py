"""A cloud that does what a test tells it: a real gRPC server with a scripted `Decode` service.

It decodes with the tiny model's own rule, so a reply's text does not depend on who made it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from segue_contract.errors import ModelMismatch, SegueError, UnknownSession
from segue_contract.kv.assembler import Assembler
from segue_contract.kv.layout import KvBlock
from segue_contract.limits import TURN_HEARTBEAT_S
from segue_contract.sync.state import TurnState, encode_turns
from segue_contract.transport.heartbeat import beating
from segue_contract.transport.server import RunningServer, start_server
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import agent_pb2_grpc, decode_pb2_grpc
from segue_contract.v1 import decode_pb2 as dpb
from tests.support.tiny_edge import (
    END,
    GEOMETRY,
    MANIFEST,
    RECIPE,
    next_token,
    reply_text,
    tiny_tokenizer,
)


@dataclass
class Script:
    """What the cloud shall do; events are set unless a test clears them."""

    ready: asyncio.Event = field(default_factory=asyncio.Event)
    decode: asyncio.Event = field(default_factory=asyncio.Event)
    begin: asyncio.Event = field(default_factory=asyncio.Event)
    have_blocks: int = 0
    recipes: tuple[str, ...] = (RECIPE.digest,)
    codec: str = RECIPE.codec  # of all of them
    end_after: int = 1_000_000
    break_after_frames: int | None = None  # the stream is aborted then, once
    deaf: bool = False  # what the edge makes never gets into the log
    salt: int = 0  # another decoder's tokens
    cut: asyncio.Event = field(default_factory=asyncio.Event)  # set: the stream is aborted, once
    begin_error: SegueError | None = None
    attached: bool = False  # it ran the turn before the edge came
    bad_end: str = ""  # "closed" or "not durable": how the next turn's stream ends, once
    queue_s: float = 0.0
    places: int = 0  # as many turns as it says that it takes; 0: it does not say
    pages_used: float = 0.0  # share of its KV pool
    stalled: bool = False  # its engine hangs, and it says so
    leaving: asyncio.Event = field(default_factory=asyncio.Event)  # set: it is being stopped
    weights: str = MANIFEST.weights_digest

    def __post_init__(self) -> None:
        self.ready.set()
        self.decode.set()
        self.begin.set()


@dataclass
class Seen:
    """What came from the edge."""

    begins: list[dpb.BeginRequest] = field(default_factory=list)
    specs: list[dpb.TurnSpec] = field(default_factory=list)
    blocks: list[KvBlock] = field(default_factory=list)
    edge_tokens: list[int] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    hand_overs: list[int] = field(default_factory=list)
    ended: list[dpb.EdgeEnded] = field(default_factory=list)
    plans: list[bytes] = field(default_factory=list)
    beats: int = 0  # heartbeats to the edge
    prepared: list[pb.PrepareRequest] = field(default_factory=list)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    handed: asyncio.Event = field(default_factory=asyncio.Event)  # some edge handed over
    closed: asyncio.Event = field(default_factory=asyncio.Event)  # some turn has ended


class ScriptedCloud(decode_pb2_grpc.DecodeServicer, agent_pb2_grpc.AgentServicer):
    """`sessions`: finished turns by session; `running`: replies so far by turn."""

    def __init__(self, name: str = "cloud-a") -> None:
        self.name = name
        self.tenant = "default"
        self.script = Script()
        self.seen = Seen()
        self.sessions: dict[str, list[TurnState]] = {}
        self.running: dict[str, list[int]] = {}
        self.known: dict[str, TurnState] = {}
        self.server: RunningServer
        self.tokenizer = tiny_tokenizer()
        self._epochs: dict[str, int] = {}

    @property
    def address(self) -> str:
        return self.server.address

    @property
    def held(self) -> int:
        """Turns that began here and have not ended."""
        ended = (turn for turn, state in self.known.items() if state.ended)
        return len(self.running.keys() - set(ended))

    def facts(self) -> dpb.CloudFacts:
        return dpb.CloudFacts(
            instance=self.name,
            queue_s=self.script.queue_s,
            prefill_tokens_per_s=1000.0,
            decode_step_s=0.01,
            recipes=self.script.recipes,
            weights_digest=self.script.weights,
            stalled=self.script.stalled,
            held_turns=self.held,
            places=self.script.places,
            total_pages=1000,
            free_pages=round(1000 * (1 - self.script.pages_used)),
        )

    # -- Agent ---------------------------------------------------------------------------------

    async def OpenSession(
        self, request: pb.OpenSessionRequest, context: Any
    ) -> pb.OpenSessionReply:
        created = request.session not in self.sessions
        if created and request.must_exist:
            raise UnknownSession(f"There is no session {request.session}.", hint="Open it.")
        self.sessions.setdefault(request.session, [])
        return pb.OpenSessionReply(
            session=request.session,
            tail=pb.Cursor(generation=1, offset=0),
            created=created,
            tenant=self.tenant,
            role="cloud",
            instance=self.name,
        )

    async def Prepare(self, request: pb.PrepareRequest, context: Any) -> pb.PrepareReply:
        self.seen.prepared.append(request)
        return pb.PrepareReply(ready=True)

    async def StopTurn(self, request: pb.StopTurnRequest, context: Any) -> pb.StopTurnReply:
        self.seen.stopped.set()
        return pb.StopTurnReply(stopping=True, turn=request.turn)

    def Attach(self, request: pb.AttachRequest, context: Any) -> AsyncIterator[pb.AttachEvent]:
        return beating(self._attach(), lambda: pb.AttachEvent(heartbeat=pb.Heartbeat()))

    async def _attach(self) -> AsyncIterator[pb.AttachEvent]:
        yield pb.AttachEvent(snapshot=pb.Snapshot())
        await asyncio.Event().wait()

    async def RunTurn(
        self, request: pb.RunTurnRequest, context: Any
    ) -> AsyncIterator[pb.TurnEvent]:
        turn = self.known[request.turn]
        yield pb.TurnEvent(started=pb.TurnStarted(turn=turn.turn, epoch=1, offset=1))
        yield pb.TurnEvent(frame=_frame(1, 0, turn.tokens, turn.pieces))
        yield pb.TurnEvent(
            ended=pb.TurnEnded(reason="stop", next_index=len(turn.tokens), durable=True)
        )

    # -- Decode --------------------------------------------------------------------------------

    async def Probe(self, request: dpb.ProbeRequest, context: Any) -> dpb.ProbeReply:
        return dpb.ProbeReply(received_bytes=len(request.payload), facts=self.facts())

    async def Begin(self, request: dpb.BeginRequest, context: Any) -> dpb.BeginReply:
        if request.weights_digest != self.script.weights:
            raise ModelMismatch("This cloud serves other weights.")
        self.seen.begins.append(request)
        await self.script.begin.wait()
        if self.script.begin_error is not None:
            raise self.script.begin_error
        turn = request.turn.turn
        turns = self.sessions.setdefault(request.turn.session, [])
        joined = turn in self.known
        if not joined:
            self.running[turn] = []
            self.known[turn] = TurnState(turn=turn, prompt=request.turn.prompt)
        return dpb.BeginReply(
            epoch=1,
            tail=pb.Cursor(generation=1, offset=2),
            turns=encode_turns(turns[request.known_turns :]),
            first_turn=request.known_turns,
            joined=joined,
            facts=self.facts(),
        )

    def Run(
        self, request_iterator: AsyncIterator[dpb.RunRequest], context: Any
    ) -> AsyncIterator[dpb.RunReply]:
        replies = self._run(aiter(request_iterator), context)

        def beat() -> dpb.RunReply:
            self.seen.beats += 1
            stalled, leaving = self.script.stalled, self.script.leaving.is_set()
            return dpb.RunReply(heartbeat=pb.Heartbeat(stalled=stalled, leaving=leaving))

        return beating(replies, beat, every_s=TURN_HEARTBEAT_S, news=self.script.leaving)

    async def _run(
        self, requests: AsyncIterator[dpb.RunRequest], context: Any
    ) -> AsyncIterator[dpb.RunReply]:
        spec = (await anext(requests)).open
        self.seen.specs.append(spec)
        stream = _Stream(self, spec, requests, context)
        async for reply in stream.serve():
            yield reply


class _Stream:
    def __init__(
        self,
        cloud: ScriptedCloud,
        spec: dpb.TurnSpec,
        requests: AsyncIterator[dpb.RunRequest],
        context: Any,
    ) -> None:
        self._cloud = cloud
        self._spec = spec
        self._requests = requests
        self._context = context
        self._out: asyncio.Queue[dpb.RunReply | None] = asyncio.Queue()
        self._edge_done: asyncio.Future[dpb.RunRequest | None] = asyncio.Future()
        self._complete = asyncio.Event()
        self._broken = False
        self._made = cloud.running.setdefault(spec.turn, [])

    async def serve(self) -> AsyncIterator[dpb.RunReply]:
        cloud, spec, script = self._cloud, self._spec, self._cloud.script
        epoch = cloud._epochs.get(spec.turn, 0) + 1
        cloud._epochs[spec.turn] = epoch
        if spec.takeover and script.deaf:  # the log has another token than the edge showed
            self._made[:] = [next_token(spec.prompt, salt=script.salt)]
        elif spec.takeover:
            self._made[:] = [*self._made, *spec.known_tokens[len(self._made) :]]
        opened = dpb.Opened(
            epoch=epoch,
            have_blocks=script.have_blocks,
            facts=cloud.facts(),
            next_index=len(self._made),
            attached=script.attached,
        )
        tasks = [
            asyncio.create_task(task)
            for task in (
                self._read(),
                self._ready(),
                self._stop(),
                self._cut(),
                self._produce(epoch),
            )
        ]
        try:
            cloud.seen.opened.set()
            yield dpb.RunReply(opened=opened)
            while (reply := await self._out.get()) is not None:
                yield reply
            if self._broken:
                await self._context.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self) -> None:
        seen, spec = self._cloud.seen, self._spec
        ship = list(spec.blocks[: spec.ship_blocks])[self._cloud.script.have_blocks :]
        codecs = dict.fromkeys(self._cloud.script.recipes, self._cloud.script.codec)
        assembler = Assembler(GEOMETRY.kv, codecs, frozenset(ship))
        missing = set(ship)
        if not missing:
            self._complete.set()
        async for request in self._requests:
            kind = request.WhichOneof("kind")
            if kind == "heartbeat":
                continue
            seen.order.append(kind or "")
            if kind == "kv":
                blocks = assembler.feed(request.kv.data)
                seen.blocks += blocks
                missing -= {block.id for block in blocks}
                if not missing:
                    self._complete.set()
            elif self._cloud.script.attached:
                continue
            elif kind == "tokens" and not self._cloud.script.deaf:
                assert request.tokens.index == len(self._made)
                self._made += request.tokens.tokens
                seen.edge_tokens += request.tokens.tokens
                notice = pb.TurnDurable(next_index=len(self._made), offset=9)
                self._out.put_nowait(dpb.RunReply(durable=notice))
            elif kind == "plan":
                seen.plans.append(request.plan.plan)
            elif kind == "hand_over":
                seen.hand_overs.append(request.hand_over.next_index)
                seen.handed.set()
                self._edge_done.set_result(request)
            elif kind == "ended":
                seen.ended.append(request.ended)
                self._edge_done.set_result(request)

    async def _ready(self) -> None:
        await self._complete.wait()
        await self._cloud.script.ready.wait()
        self._out.put_nowait(dpb.RunReply(ready=dpb.Ready(received_blocks=0)))

    async def _stop(self) -> None:
        await self._cloud.seen.stopped.wait()
        self._out.put_nowait(dpb.RunReply(stop=dpb.StopNow(reason="cancelled")))
        self._end("cancelled")

    async def _cut(self) -> None:
        await self._cloud.script.cut.wait()
        self._cloud.script.cut.clear()
        self._break()

    def _break(self) -> None:
        self._broken = True
        self._out.put_nowait(None)

    async def _produce(self, epoch: int) -> None:
        script, spec = self._cloud.script, self._spec
        if spec.takeover and self._made:  # what the log holds comes again
            self._send(epoch, 0, list(self._made))
        if spec.shape != "text" and not script.attached:
            request = await self._edge_done
            if request is not None and request.WhichOneof("kind") == "ended":
                self._end(request.ended.reason)
                return
            assert request is not None
            assert request.hand_over.next_index == len(self._made)
        frames = 0
        tokens = [*spec.prompt, *self._made]
        while len(self._made) < spec.max_tokens:
            await script.decode.wait()
            token = next_token(tokens, script.end_after, script.salt)
            if token == END:
                self._end("stop")
                return
            tokens.append(token)
            self._made.append(token)
            self._send(epoch, len(self._made) - 1, [token])
            frames += 1
            if script.break_after_frames == frames:
                script.break_after_frames = None
                self._break()
                return
            await asyncio.sleep(0)
        self._end("length")

    def _send(self, epoch: int, index: int, tokens: list[int]) -> None:
        frame = _frame(epoch, index, tokens, [chr(token) for token in tokens])
        self._out.put_nowait(dpb.RunReply(frame=frame))

    def _end(self, reason: str) -> None:
        cloud, turn = self._cloud, self._spec.turn
        state = cloud.known.setdefault(turn, TurnState(turn=turn))
        state.tokens = list(self._made)
        state.pieces = [chr(token) for token in self._made]
        state.reason = reason
        cloud.sessions.setdefault(self._spec.session, []).append(state)
        cloud.seen.closed.set()
        how, cloud.script.bad_end = cloud.script.bad_end, ""
        ended = pb.TurnEnded(
            reason=reason, next_index=len(self._made), offset=10, durable=how != "not durable"
        )
        if how != "closed":
            self._out.put_nowait(dpb.RunReply(ended=ended))
        self._out.put_nowait(None)


def _frame(epoch: int, index: int, tokens: list[int], pieces: list[str]) -> pb.TokenFrame:
    return pb.TokenFrame(
        epoch=epoch,
        index=index,
        tokens=tokens,
        pieces=pieces,
        durable=True,
        offset=5,
        made_by="cloud",
    )


@asynccontextmanager
async def scripted_cloud(
    name: str = "cloud-a", port: int = 0, script: Script | None = None
) -> AsyncIterator[ScriptedCloud]:
    cloud = ScriptedCloud(name)
    cloud.script = script or cloud.script
    cloud.server = await start_server(
        "127.0.0.1",
        port,
        [
            (
                "segue.v1.Decode",
                lambda server: decode_pb2_grpc.add_DecodeServicer_to_server(cloud, server),
            ),
            (
                "segue.v1.Agent",
                lambda server: agent_pb2_grpc.add_AgentServicer_to_server(cloud, server),
            ),
        ],
    )
    try:
        yield cloud
    finally:
        await cloud.server.stop(0)


__all__ = ["ScriptedCloud", "reply_text", "scripted_cloud"]
