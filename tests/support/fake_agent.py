"""A scripted device API on a real socket: for tests of the SDK only, never part of the product.

`FakeLog` is the session log that several `FakeAgent`s share, as edge nodes share a cloud. What a
run of a turn sends is a script: a list of wire events, and `Break` where the stream breaks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from segue_contract.errors import SegueError, UnknownSession
from segue_contract.ids import DEFAULT_TENANT
from segue_contract.limits import TURN_HEARTBEAT_S
from segue_contract.sync.ops import Op, decode_op, encode_op
from segue_contract.sync.replica import Replica
from segue_contract.sync.state import SessionState, encode_state
from segue_contract.transport.heartbeat import beating
from segue_contract.transport.server import RunningServer, start_server
from segue_contract.transport.tls import TlsFiles
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import agent_pb2_grpc

LIVE_KEY = b"k" * 32  # of everything that is published of a fake log


class Break:
    """The stream breaks here, as when the node's process dies."""


@dataclass(frozen=True)
class Wait:
    """The script goes on when the test sets `event`."""

    event: asyncio.Event


Step = pb.TurnEvent | Break | Wait | SegueError
Script = Callable[[pb.RunTurnRequest], Sequence[Step]]


def started(turn: str, epoch: int = 1) -> pb.TurnEvent:
    return pb.TurnEvent(started=pb.TurnStarted(turn=turn, epoch=epoch, offset=2))


def frame(
    index: int,
    words: str,
    *,
    epoch: int = 1,
    durable: bool = True,
    made_by: str = "cloud",
) -> pb.TurnEvent:
    """One token per word; a token's id follows from its word."""
    pieces = [f"{word} " for word in words.split()]
    return pb.TurnEvent(
        frame=pb.TokenFrame(
            epoch=epoch,
            index=index,
            tokens=[sum(piece.encode()) for piece in pieces],
            pieces=pieces,
            durable=durable,
            offset=10 + index if durable else 0,
            made_by=made_by,
        )
    )


def durable(next_index: int) -> pb.TurnEvent:
    return pb.TurnEvent(durable=pb.TurnDurable(next_index=next_index, offset=10 + next_index))


def ended(next_index: int, *, reason: str = "stop", epoch: int = 1, **fields: Any) -> pb.TurnEvent:
    return pb.TurnEvent(
        ended=pb.TurnEnded(
            epoch=epoch,
            reason=reason,
            next_index=next_index,
            usage=pb.Usage(prompt_tokens=5, completion_tokens=next_index),
            durable=fields.pop("durable", True),
            offset=99,
            **fields,
        )
    )


@dataclass
class FakeLog:
    """One session's log. `on_append` may publish it; `trim_below` compacts."""

    session: str
    generation: int = 1
    ops: list[bytes] = field(default_factory=list)
    first_offset: int = 1
    folded: SessionState | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def tail(self) -> int:
        return self.first_offset + len(self.ops) - 1

    def append(self, *ops: Op | bytes) -> int:
        """Returns the offset of the first one."""
        first = self.tail + 1
        self.ops += [op if isinstance(op, bytes) else encode_op(op) for op in ops]
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()
        return first

    def state(self) -> SessionState:
        replica = Replica(self.folded)
        for offset, op in enumerate(self.ops, self.first_offset):
            replica.apply_op(self.generation, offset, op)
        return replica.state

    def compact(self) -> None:
        """Fold everything so far; no entry stays readable."""
        self.folded = self.state()
        self.first_offset, self.ops = self.tail + 1, []

    def lose_everything(self) -> None:
        """A store failover: acknowledged entries are gone, the generation says so."""
        self.generation += 1
        self.first_offset, self.ops, self.folded = 1, [], None

    def entries(self, after: int, limit: int) -> list[pb.LogEntry]:
        start = max(after + 1, self.first_offset)
        chosen = self.ops[start - self.first_offset :][:limit]
        return [
            pb.LogEntry(generation=self.generation, offset=start + place, op=op)
            for place, op in enumerate(chosen)
        ]

    def cursor(self) -> pb.Cursor:
        return pb.Cursor(generation=self.generation, offset=self.tail)


class FakeAgent(agent_pb2_grpc.AgentServicer):
    """`async with FakeAgent(log, script) as agent:` serves at `agent.address`."""

    def __init__(
        self,
        log: FakeLog,
        script: Script | None = None,
        *,
        mqtt_url: str = "",
        role: str = "edge",
        page: int = 1024,
    ) -> None:
        self.log = log
        self.script = script
        self.mqtt_url = mqtt_url
        self.role = role
        self.page = page
        self.port = 0
        self.fail_once: dict[str, SegueError] = {}
        self.fail_times: dict[str, list[SegueError]] = {}
        self.held: asyncio.Event | None = None  # lists wait for it
        self.runs: list[pb.RunTurnRequest] = []
        self.stops: list[pb.StopTurnRequest] = []
        self.dismissed: asyncio.Queue[str] = asyncio.Queue()
        self.appends: list[pb.AppendRequest] = []
        self.reads = 0
        self.edges: list[str] = []
        self.attaches = 0
        self.tail_calls = 0
        self.tails_error: SegueError | None = None  # of every such call
        self.publishing = True
        self.mute_runs = 0  # so many of the next runs send no heartbeats
        self.calls = 0
        self.offline_turns: list[pb.OfflineTurn] = []
        self.epochs = 0  # of producers, given so far
        self.leaving = asyncio.Event()  # set: it says that it is being stopped
        self.prepared: list[pb.PrepareRequest] = []
        self.run_closed = asyncio.Event()
        self.stop_asked = asyncio.Event()
        self.tls: TlsFiles | None = None  # from the next start on
        self._server: RunningServer | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeAgent:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Listen; again on the same port after `kill`."""
        self._server = await start_server(
            "127.0.0.1",
            self.port,
            [("segue.v1.Agent", lambda s: agent_pb2_grpc.add_AgentServicer_to_server(self, s))],
            tls=self.tls,
        )
        self.port = self._server.port

    async def kill(self) -> None:
        """Every connection drops, the port is closed."""
        server, self._server = self._server, None
        if server is not None:
            await server.stop(0)

    def _next_epoch(self) -> int:
        self.epochs += 1
        return self.epochs

    def _called(self, method: str) -> None:
        self.calls += 1
        if method in self.fail_once:
            raise self.fail_once.pop(method)
        if self.fail_times.get(method):
            raise self.fail_times[method].pop(0)

    async def OpenSession(self, request: pb.OpenSessionRequest, _: Any) -> pb.OpenSessionReply:
        self._called("OpenSession")
        if request.session != self.log.session and request.must_exist:
            raise UnknownSession(f"There is no session {request.session}.")
        return pb.OpenSessionReply(
            session=request.session,
            tail=self.log.cursor(),
            created=not self.log.ops,
            model="fake",
            mqtt_url=self.mqtt_url,
            live_key=LIVE_KEY,
            tenant=DEFAULT_TENANT,
            role=self.role,
            instance="fake",
            max_context_tokens=8192,
            offline_turns=self.offline_turns,
            epoch=self._next_epoch() if request.producer else 0,
        )

    def RunTurn(self, request: pb.RunTurnRequest, context: Any) -> AsyncIterator[pb.TurnEvent]:
        events = self._run_turn(request, context)
        if self.mute_runs:
            self.mute_runs -= 1
            return events

        def beat() -> pb.TurnEvent:
            return pb.TurnEvent(heartbeat=pb.Heartbeat(leaving=self.leaving.is_set()))

        return beating(events, beat, every_s=TURN_HEARTBEAT_S, news=self.leaving)

    async def Prepare(self, request: pb.PrepareRequest, _: Any) -> pb.PrepareReply:
        self._called("Prepare")
        self.prepared.append(request)
        return pb.PrepareReply(ready=True)

    async def _run_turn(
        self, request: pb.RunTurnRequest, context: Any
    ) -> AsyncIterator[pb.TurnEvent]:
        self._called("RunTurn")
        self.runs.append(request)
        assert self.script is not None, "no script"
        try:
            for step in self.script(request):
                if isinstance(step, Break):
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "socket closed")
                elif isinstance(step, SegueError):
                    raise step
                elif isinstance(step, Wait):
                    await step.event.wait()
                else:
                    yield step
        finally:
            self.run_closed.set()

    async def DismissTurns(self, request: pb.DismissTurnsRequest, _: Any) -> pb.DismissTurnsReply:
        self._called("DismissTurns")
        for turn in request.turns:
            self.dismissed.put_nowait(turn)
        return pb.DismissTurnsReply(dismissed=len(request.turns))

    async def StopTurn(self, request: pb.StopTurnRequest, _: Any) -> pb.StopTurnReply:
        self._called("StopTurn")
        self.stops.append(request)
        self.stop_asked.set()
        return pb.StopTurnReply(stopping=True, turn=request.turn)

    async def Read(self, request: pb.ReadRequest, _: Any) -> pb.ReadReply:
        self._called("Read")
        self.reads += 1
        log = self.log
        after = request.after.offset
        reply = pb.ReadReply(tail=log.cursor())
        other = bool(after) and request.after.generation != log.generation
        if request.folded:
            state = log.state()
            at = pb.Cursor(generation=log.generation, offset=state.cursor.offset)
            reply.snapshot.CopyFrom(pb.Snapshot(at=at, state=encode_state(state)))
            return reply
        if other or (log.folded is not None and after < log.first_offset - 1):
            state = log.state() if other else log.folded
            assert state is not None
            after = state.cursor.offset
            if other:
                state.cursor = type(state.cursor)(log.generation, after)
            reply.snapshot.CopyFrom(
                pb.Snapshot(
                    at=pb.Cursor(generation=state.cursor.generation, offset=after),
                    state=encode_state(state),
                )
            )
        reply.entries.extend(log.entries(after, min(request.max_entries, self.page)))
        return reply

    def Attach(self, request: pb.AttachRequest, _: Any) -> AsyncIterator[pb.AttachEvent]:
        return beating(self._attach(request), lambda: pb.AttachEvent(heartbeat=pb.Heartbeat()))

    async def _attach(self, request: pb.AttachRequest) -> AsyncIterator[pb.AttachEvent]:
        self._called("Attach")
        self.attaches += 1
        state = self.log.state()
        at = self.log.tail
        after = request.after
        same = after.generation == self.log.generation and self.log.first_offset <= after.offset + 1
        if request.resume and after.offset and same:
            at = after.offset
            yield pb.AttachEvent(entries=pb.EntryBatch())
        else:
            yield pb.AttachEvent(
                snapshot=pb.Snapshot(
                    at=pb.Cursor(generation=self.log.generation, offset=at),
                    state=encode_state(state),
                )
            )
        while True:
            changed = self.log.changed
            found = self.log.entries(at, 1024)
            if found:
                at = found[-1].offset
                yield pb.AttachEvent(entries=pb.EntryBatch(entries=found))
            else:
                await changed.wait()

    async def Append(self, request: pb.AppendRequest, _: Any) -> pb.AppendReply:
        self._called("Append")
        self.appends.append(request)
        for op in request.ops:
            decode_op(op)
        first = self.log.append(*request.ops)
        return pb.AppendReply(
            first=pb.Cursor(generation=self.log.generation, offset=first), tail=self.log.cursor()
        )

    async def Tails(self, request: pb.TailsRequest, _: Any) -> pb.TailsReply:
        self._called("Tails")
        self.tail_calls += 1
        if self.tails_error is not None:
            raise self.tails_error
        tails = [
            self.log.cursor() if session == self.log.session else pb.Cursor()
            for session in request.sessions
        ]
        return pb.TailsReply(tails=tails, publishing=self.publishing)

    async def Nodes(self, request: pb.NodesRequest, _: Any) -> pb.NodesReply:
        self._called("Nodes")
        return pb.NodesReply(edges=[pb.NodeAddress(url=url) for url in self.edges])

    async def ListSessions(self, request: pb.ListSessionsRequest, _: Any) -> pb.ListSessionsReply:
        self._called("ListSessions")
        if self.held is not None:
            await self.held.wait()
        info = pb.SessionInfo(
            session=self.log.session, tail=self.log.cursor(), updated_ms=1_700_000_000_000,
            title="Plan a day", turns=2,
        )  # fmt: skip
        return pb.ListSessionsReply(sessions=[info])
