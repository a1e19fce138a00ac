"""`Agent`: what devices call, here or through an edge node."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from segue_cloud.log.session_log import SessionLog
from segue_cloud.rpc.convert import (
    cursor_message,
    entry_message,
    snapshot_parts,
    turn_request,
)
from segue_cloud.rpc.directory import EdgeDirectory
from segue_cloud.rpc.follow_turn import follow_turn
from segue_cloud.rpc.keeping import KeepingRpc
from segue_cloud.rpc.live import LiveView
from segue_cloud.rpc.revoking import caller_bearer, tell
from segue_cloud.sessions.port import LogOp, Producer, Status
from segue_cloud.tenants.sessions import SessionQuota
from segue_cloud.tenants.usage import TenantUsage, unlimited
from segue_cloud.turns.manager import Begun, TurnManager
from segue_contract.checks import check_tails
from segue_contract.errors import (
    InvalidArgument,
    OutcomeUnknown,
    SequenceGap,
    StaleEpoch,
    UnknownModel,
    UnknownSession,
    UnknownTurn,
)
from segue_contract.identity.rights import access_revoked, check_op, may_append, may_create
from segue_contract.ids import SessionName, check_id
from segue_contract.limits import (
    MAX_APPEND_OPS,
    MAX_COUNT,
    MAX_READ_ENTRIES,
    TURN_HEARTBEAT_S,
)
from segue_contract.plan import Shape
from segue_contract.sync.ops import DEVICE_KINDS
from segue_contract.sync.state import Cursor, find_turn
from segue_contract.transport.gate import caller, gate_here, named, renew_calls
from segue_contract.transport.heartbeat import beating
from segue_contract.turn.events import TurnEvent
from segue_contract.turn.from_log import turn_events
from segue_contract.turn.wire import to_wire
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import agent_pb2_grpc


@dataclass(frozen=True)
class Identity:
    """Who this instance is, as devices are told."""

    instance: str
    model: str
    max_context: int


class AgentService(KeepingRpc, agent_pb2_grpc.AgentServicer):
    def __init__(
        self,
        identity: Identity,
        manager: TurnManager,
        log: SessionLog,
        *,
        publishing: Callable[[], bool] = lambda: True,
        live: LiveView | None = None,
        usage: TenantUsage | None = None,
        edges: EdgeDirectory | None = None,
    ) -> None:
        """`publishing`: whether the broker takes what is appended here, now. `live`: what devices
        are told of it; None: they follow over gRPC. `usage`: what tenants may have, and use;
        without it they have no quotas."""
        self._usage = usage or unlimited(time.monotonic)
        self._sessions = SessionQuota(self._usage, log.keeping.count, time.monotonic)
        super().__init__(log.keeping, self._sessions)
        self._identity = identity
        self._publishing = publishing
        self._live = live
        self._manager = manager
        self._log = log
        self._edges = edges or EdgeDirectory()

    async def OpenSession(
        self, request: pb.OpenSessionRequest, context: Any
    ) -> pb.OpenSessionReply:
        me = self._identity
        session = named(request.session)
        device = check_id(request.device, "device")
        if request.model and request.model != me.model:
            raise UnknownModel(
                f"This node serves {me.model}, not {request.model}.",
                hint="Leave the model out, or ask a node that serves it.",
            )
        producer = check_id(request.producer, "producer") if request.producer else ""
        if not may_append(caller()):  # an epoch would fence a writer of that name
            producer = ""
        self._usage.device(session.tenant, device)
        makes = may_create(caller()) and not request.must_exist
        reached = await self._sessions.reached(session.tenant) if makes else None
        try:
            opened = await self._log.open_session(
                session,
                must_exist=not makes or reached is not None,
                device=device,
                producer=producer,
                after_generation=min(request.known_generation, MAX_COUNT),
                bearer=caller_bearer(),
            )
        except UnknownSession as error:
            raise (reached or error) from None
        if opened.created:
            self._sessions.made(session.tenant)
        live = {}
        if self._live is not None:
            live = await self._live.told(session, opened.tail.generation, request)
        return pb.OpenSessionReply(
            session=session.session,
            tail=cursor_message(opened.tail),
            created=opened.created,
            epoch=opened.epoch,
            model=me.model,
            tenant=session.tenant,
            role="cloud",
            instance=me.instance,
            max_context_tokens=me.max_context,
            **live,
        )

    def RunTurn(self, request: pb.RunTurnRequest, context: Any) -> AsyncIterator[pb.TurnEvent]:
        session = named(request.session)

        def beat() -> pb.TurnEvent:
            stalled = self._manager.stalled(session, request.turn)
            owned = self._manager.owned(session, request.turn) is not None
            leaving = owned and self._manager.leaving.is_set()
            return pb.TurnEvent(heartbeat=pb.Heartbeat(stalled=stalled, leaving=leaving))

        leaving = self._manager.leaving
        return beating(self._run_turn(request), beat, every_s=TURN_HEARTBEAT_S, news=leaving)

    async def _run_turn(self, request: pb.RunTurnRequest) -> AsyncIterator[pb.TurnEvent]:
        async for event in self._run_or_join(request):
            yield to_wire(event)

    async def _run_or_join(self, request: pb.RunTurnRequest) -> AsyncIterator[TurnEvent]:
        if request.plan not in ("", Shape.TEXT.value):
            raise InvalidArgument(
                f"The cloud alone cannot serve the plan shape {request.plan[:40]!r}.",
                hint="Connect to an edge node, or leave the plan to the node.",
            )
        bearer = caller_bearer()
        asked = replace(turn_request(request, caller().tenant), bearer=bearer)
        await self._log.check_device(asked.session, asked.device, bearer)
        if request.must_exist:
            await self._check_known(asked.session, asked.turn)
        begun, owner = await self._manager.run(asked)
        if owner is not None:
            async for event in owner.feed.read(request.from_index):
                yield event
            return
        if request.lost:
            await self._manager.succeed(asked.session, asked.turn)
        with self._usage.attached(asked.session.tenant):
            async for event in self._join(asked.session, asked.turn, request.from_index, begun):
                yield event

    async def _check_known(self, session: SessionName, turn: str) -> None:
        if find_turn(await self._log.state(session), turn) is None:
            hint = "The edge that served it may still have to deliver it."
            raise _unknown_turn(session, turn, hint)

    async def _join(
        self, session: SessionName, turn: str, from_index: int, begun: Begun
    ) -> AsyncIterator[TurnEvent]:
        """A turn that began earlier: here, in another instance, or long ago.

        Raises:
            UnknownTurn: its id was used, and the log has nothing of it (any more).
        """
        await self._manager.recover(session)
        owner = self._manager.owned(session, turn)
        if owner is not None:
            async for event in owner.feed.read(from_index):
                yield event
            return
        state = await self._log.state(session)
        known = find_turn(state, turn)
        same_log = state.cursor.generation == begun.cursor.generation
        if known is None and begun.ended and same_log:
            raise _unknown_turn(session, turn, "The store lost what the log had of it.")
        if known is not None and known.ended:
            for event in turn_events(known, from_index):
                yield event
            return
        async for event in follow_turn(self._log, session, turn, from_index):
            yield event

    async def Prepare(self, request: pb.PrepareRequest, context: Any) -> pb.PrepareReply:
        session = named(request.session)
        await self._check_device(session, request.device)
        turn = check_id(request.turn, "turn")
        ready = await self._manager.prepare(
            session, turn, leaving=request.leaving, edge=caller().via
        )
        return pb.PrepareReply(ready=ready)

    async def StopTurn(self, request: pb.StopTurnRequest, context: Any) -> pb.StopTurnReply:
        session = named(request.session)
        await self._check_device(session, request.device)
        turn = await self._log.request_stop(session, request.turn)
        if turn:
            self._manager.stop(session, turn)
        return pb.StopTurnReply(stopping=bool(turn), turn=turn)

    async def DismissTurns(
        self, request: pb.DismissTurnsRequest, context: Any
    ) -> pb.DismissTurnsReply:
        """Only edges keep such turns."""
        named(request.session)
        return pb.DismissTurnsReply(dismissed=0)

    def Attach(self, request: pb.AttachRequest, context: Any) -> AsyncIterator[pb.AttachEvent]:
        return beating(self._attach(request), lambda: pb.AttachEvent(heartbeat=pb.Heartbeat()))

    async def _attach(self, request: pb.AttachRequest) -> AsyncIterator[pb.AttachEvent]:
        session = named(request.session)
        await self._check_device(session, request.device)
        after = _cursor(request.after)
        resumed = after if request.resume and after.offset else None
        with self._usage.attached(session.tenant):
            async with self._log.follow(session, resumed) as following:
                async for item in following:
                    if item.snapshot is not None:
                        async for part in snapshot_parts(item.snapshot, item.lost_from):
                            yield pb.AttachEvent(snapshot=part)
                    if item.snapshot is None or item.entries:
                        entries = [entry_message(entry) for entry in item.entries]
                        yield pb.AttachEvent(entries=pb.EntryBatch(entries=entries))

    async def Read(self, request: pb.ReadRequest, context: Any) -> pb.ReadReply:
        session = named(request.session)
        await self._check_device(session, request.device)
        wanted = min(request.max_entries or MAX_READ_ENTRIES, MAX_READ_ENTRIES)
        after = _cursor(request.after)
        if request.folded:
            page = await self._log.whole(session)
        else:
            page = await self._log.read(session, after, wanted)
        reply = pb.ReadReply(tail=cursor_message(page.tail), digest=page.digest)
        reply.entries.extend(entry_message(entry) for entry in page.entries)
        if page.snapshot is not None:
            first = await anext(snapshot_parts(page.snapshot, page.lost_from))
            reply.snapshot.CopyFrom(first)
            if first.more:  # too large for this message: Attach brings all of it
                reply.snapshot.state = b""
        return reply

    async def Append(self, request: pb.AppendRequest, context: Any) -> pb.AppendReply:
        session = named(request.session)
        device = check_id(request.device, "device")
        await self._check_device(session, device)
        ops = _device_ops(request.ops)
        for one in ops:
            check_op(caller(), one.op)
            if one.op.device != device:
                raise InvalidArgument(
                    "A device may append in its own name only.", hint="Leave the op's device out."
                )
        self._usage.append(session.tenant, len(ops), sum(len(one.data) for one in ops))
        producer = Producer(
            check_id(request.producer, "producer"),
            request.epoch,
            request.first_seq,
            caller_bearer(),
        )
        result = await self._log.append(session, producer, ops)
        if result.status is Status.REVOKED:
            raise access_revoked(session.session)
        if result.status is Status.STALE:
            raise StaleEpoch(
                f"Device {device} writes under epoch {request.epoch}; "
                f"{result.current_epoch} holds now.",
                hint="Open the session again to get a new epoch.",
                current=result.current_epoch,
            )
        if result.status is Status.GAP:
            raise SequenceGap(
                f"Op {request.first_seq} came, {result.expected_seq} is the next one.",
                hint="Send the ops between first.",
                expected=result.expected_seq,
            )
        if result.status in (Status.TAKEN, Status.UNKNOWN):
            raise OutcomeUnknown(
                f"The sequence numbers from {request.first_seq} on were used before.",
                hint="Read the log: the ops may be in it. Then open the session again.",
            )
        if result.status is Status.MISSING:
            raise _unknown(session)
        return pb.AppendReply(
            first=pb.Cursor(generation=result.generation, offset=result.first_offset),
            tail=pb.Cursor(generation=result.generation, offset=result.tail),
            duplicate=result.status is Status.DUP,
        )

    async def Nodes(self, request: pb.NodesRequest, context: Any) -> pb.NodesReply:
        known = self._edges.edges(time.monotonic())
        return pb.NodesReply(edges=[pb.NodeAddress(url=one.url, name=one.name) for one in known])

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewReply:
        return pb.RenewReply(calls=renew_calls())

    async def Revoke(self, request: pb.RevokeRequest, context: Any) -> pb.RevokeReply:
        # a name or the beginning of names and "*", as the gate found
        session = SessionName(caller().tenant, request.session)
        revocation = await self._log.revoke(session, check_id(request.revoked, "device"))
        tell(gate_here(), revocation)
        return pb.RevokeReply(before_ms=revocation.before_ms)

    async def _check_device(self, session: SessionName, device: str) -> None:
        await self._log.check_device(session, check_id(device, "device"), caller_bearer())

    async def Tails(self, request: pb.TailsRequest, context: Any) -> pb.TailsReply:
        check_tails(request.device, request.sessions)
        sessions = [named(session) for session in request.sessions]
        tails = await self._log.tails(sessions)
        missing = [one for one, tail in zip(sessions, tails, strict=True) if tail is None]
        deleted = await self._log.keeping.deleted(missing)
        return pb.TailsReply(
            tails=[cursor_message(tail.cursor if tail else Cursor(0, 0)) for tail in tails],
            digests=[tail.digest if tail else b"" for tail in tails],
            publishing=self._publishing(),
            deleted=[one.session for one in deleted],
        )


def _cursor(message: pb.Cursor) -> Cursor:
    if max(message.generation, message.offset) > MAX_COUNT:
        raise InvalidArgument("A cursor's numbers are out of range.", hint=f"Up to {MAX_COUNT}.")
    return Cursor(message.generation, message.offset)


def _device_ops(ops: Sequence[bytes]) -> list[LogOp]:
    if not 0 < len(ops) <= MAX_APPEND_OPS:
        raise InvalidArgument(
            f"{len(ops)} ops came; 1 to {MAX_APPEND_OPS} are allowed at once.",
            hint="Append in smaller batches.",
        )
    read = [LogOp.read(data) for data in ops]
    for one in read:
        if not isinstance(one.op, DEVICE_KINDS):
            raise InvalidArgument(
                f"A device may not append {type(one.op).__name__}.",
                hint="Turns are written by whoever runs them; use RunTurn.",
            )
    return read


def _unknown_turn(session: SessionName, turn: str, hint: str) -> UnknownTurn:
    return UnknownTurn(f"Session {session.session} has no turn {turn}.", hint=hint, turn=turn)


def _unknown(session: SessionName) -> UnknownSession:
    return UnknownSession(
        f"There is no session {session.session}.", hint="Open it first, or check its name."
    )
