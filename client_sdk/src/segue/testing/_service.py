"""The device API over logs in memory: what a node answers, verb by verb."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from segue.testing._log import MemoryLog
from segue.testing._turns import PlayedTurn, op_id
from segue.testing.script import Reply, steps_of
from segue_contract.checks import check_run
from segue_contract.errors import (
    InvalidArgument,
    NotFound,
    Revoked,
    SessionBusy,
    SessionDeleted,
    SessionNotEmpty,
    TurnCancelled,
    TurnConflict,
    UnknownDevice,
    UnknownModel,
    UnknownSession,
    UnknownTurn,
)
from segue_contract.identity.principal import check_session_pattern
from segue_contract.ids import DEFAULT_TENANT, check_id
from segue_contract.limits import MAX_READ_ENTRIES, TURN_HEARTBEAT_S
from segue_contract.sync import ops
from segue_contract.sync.export import ExportHead, ExportReader, ExportWriter
from segue_contract.sync.state import Cursor, encode_state
from segue_contract.transport.heartbeat import beating
from segue_contract.transport.together import end
from segue_contract.turn.wire import to_wire
from segue_contract.v1 import agent_pb2 as pb

MAX_CONTEXT_TOKENS = 8192


class MemoryService:
    """One node's sessions. `replies` are taken from the front, one for each turn."""

    def __init__(self, replies: list[Reply], model: str) -> None:
        self.replies = replies
        self.model = model
        self.prompts: list[str] = []
        self.logs: dict[str, MemoryLog] = {}
        self._deleted: set[str] = set()
        self._revoked: set[tuple[str, str]] = set()  # beginnings of names, and devices
        self.changed = asyncio.Event()
        self._generation = 0
        self._turns: dict[tuple[str, str], PlayedTurn] = {}
        self._running: dict[str, PlayedTurn] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        await end(*self._tasks)

    def _wake(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()

    # -- sessions ---------------------------------------------------------------------------------
    def _log(self, session: str) -> MemoryLog:
        if session in self.logs:
            return self.logs[session]
        cls = SessionDeleted if session in self._deleted else UnknownSession
        raise cls(f"There is no session {session}.", hint="Open it first, or check its name.")

    def _joined(self, session: str, device: str) -> MemoryLog:
        """The log, for a device that opened it."""
        log = self._log(session)
        self._check_revoked(session, device)
        if check_id(device, "device") not in log.devices:
            raise UnknownDevice(f"{device} did not open {session}.", hint="Open the session.")
        return log

    def _check_revoked(self, session: str, device: str) -> None:
        log = self.logs.get(session)
        of_names = any(one == device and session.startswith(head) for head, one in self._revoked)
        if of_names or (log is not None and device in log.revoked):
            raise Revoked("This device's access to the session was revoked.", session=session)

    def _made(self, session: str) -> MemoryLog:
        self._generation += 1
        log = self.logs[session] = MemoryLog(
            check_id(session, "session"), self._generation, self._wake
        )
        self._deleted.discard(session)
        return log

    async def OpenSession(self, request: pb.OpenSessionRequest) -> pb.OpenSessionReply:
        if request.model and request.model != self.model:
            raise UnknownModel(f"This node serves {self.model}, not {request.model}.")
        self._check_revoked(request.session, request.device)
        created = request.session not in self.logs
        if created and request.must_exist:
            self._log(request.session)
        log = self._made(request.session) if created else self._log(request.session)
        log.devices.add(check_id(request.device, "device"))
        self._joined(request.session, request.device)
        log.used_s = time.time()
        return pb.OpenSessionReply(
            session=log.session,
            tail=_wire(log.tail),
            created=created,
            model=self.model,
            tenant=DEFAULT_TENANT,
            role="edge",
            instance="fake",
            max_context_tokens=MAX_CONTEXT_TOKENS,
            epoch=log.new_epoch(request.producer) if request.producer else 0,
        )

    async def ListSessions(self, request: pb.ListSessionsRequest) -> pb.ListSessionsReply:
        newest = sorted(self.logs.values(), key=lambda log: (-log.used_s, log.session))
        start = int(request.after or 0)
        stop = start + max(1, request.max_sessions)
        return pb.ListSessionsReply(
            sessions=[
                pb.SessionInfo(
                    session=log.session,
                    tail=_wire(log.tail),
                    updated_ms=int(log.used_s * 1000),
                    title=log.title,
                    turns=len(log.state.turns),
                    running_turn=self._running_turn(log.session),
                )
                for log in newest[start:stop]
            ],
            next=str(stop) if stop < len(newest) else "",
        )

    async def DeleteSession(self, request: pb.DeleteSessionRequest) -> pb.DeleteSessionReply:
        if self._running_turn(request.session):
            raise SessionBusy("A turn runs in it.", hint="Stop it, or wait for its end.")
        log = self.logs.pop(request.session, None)
        if log is not None:
            self._deleted.add(request.session)
            log.delete()
        return pb.DeleteSessionReply(deleted=log is not None)

    async def ExpireSessions(self, request: pb.ExpireSessionsRequest) -> pb.ExpireSessionsReply:
        idle = [
            log.session
            for log in self.logs.values()
            if time.time() - log.used_s >= request.idle_s and not self._running_turn(log.session)
        ]
        for session in idle:
            await self.DeleteSession(pb.DeleteSessionRequest(session=session))
        return pb.ExpireSessionsReply(deleted=idle)

    async def Revoke(self, request: pb.RevokeRequest) -> pb.RevokeReply:
        pattern = check_session_pattern(request.session)
        device = check_id(request.revoked, "device")
        if pattern.endswith("*"):
            self._revoked.add((pattern[:-1], device))
            for log in self.logs.values():
                log.wake()
        else:
            log = self._log(pattern)
            log.revoked.add(device)
            log.wake()
        return pb.RevokeReply(before_ms=int(time.time() * 1000))

    async def Nodes(self, request: pb.NodesRequest) -> pb.NodesReply:
        return pb.NodesReply()

    async def Prepare(self, request: pb.PrepareRequest) -> pb.PrepareReply:
        self._joined(request.session, request.device)
        return pb.PrepareReply()

    async def Renew(self, request: pb.RenewRequest) -> pb.RenewReply:
        return pb.RenewReply()

    async def DismissTurns(self, request: pb.DismissTurnsRequest) -> pb.DismissTurnsReply:
        return pb.DismissTurnsReply()

    # -- the log ----------------------------------------------------------------------------------
    async def Read(self, request: pb.ReadRequest) -> pb.ReadReply:
        log = self._joined(request.session, request.device)
        after = Cursor(request.after.generation, request.after.offset)
        snapshot, entries = (log.snapshot(), []) if request.folded else log.since(after)
        most = min(request.max_entries or MAX_READ_ENTRIES, MAX_READ_ENTRIES)
        reply = pb.ReadReply(tail=_wire(log.tail), digest=log.digest, entries=entries[:most])
        if snapshot is not None:
            reply.snapshot.CopyFrom(snapshot)
        return reply

    async def Append(self, request: pb.AppendRequest) -> pb.AppendReply:
        log = self._joined(request.session, request.device)
        for data in request.ops:
            op = ops.decode_op(data)
            if not isinstance(op, ops.DEVICE_KINDS) or op.device != request.device:
                raise InvalidArgument(f"A device may not append that {type(op).__name__}.")
        first = log.append_of(request.producer, request.epoch, request.first_seq, request.ops)
        at = pb.Cursor(generation=log.generation, offset=first)
        return pb.AppendReply(first=at, tail=_wire(log.tail))

    async def Tails(self, request: pb.TailsRequest) -> pb.TailsReply:
        found = [self.logs.get(session) for session in request.sessions]
        return pb.TailsReply(
            tails=[_wire(log.tail) if log else pb.Cursor() for log in found],
            digests=[log.digest if log else b"" for log in found],
            deleted=[session for session in request.sessions if session in self._deleted],
        )

    def Attach(self, request: pb.AttachRequest) -> AsyncIterator[pb.AttachEvent]:
        return beating(self._attach(request), lambda: pb.AttachEvent(heartbeat=pb.Heartbeat()))

    async def _attach(self, request: pb.AttachRequest) -> AsyncIterator[pb.AttachEvent]:
        log = self._joined(request.session, request.device)
        after = Cursor(request.after.generation, request.after.offset)
        if not request.resume or not after.offset:
            yield pb.AttachEvent(snapshot=log.snapshot())
            after = log.tail
        told = False
        while True:
            changed = log.changed
            if log.deleted:
                raise SessionDeleted(f"The session {log.session} was deleted.")
            self._joined(request.session, request.device)
            snapshot, entries = log.since(after)
            after = log.tail
            if snapshot is not None:
                yield pb.AttachEvent(snapshot=snapshot)
            elif entries or not told:
                yield pb.AttachEvent(entries=pb.EntryBatch(entries=entries))
            told = True
            await changed.wait()

    # -- turns ------------------------------------------------------------------------------------
    def RunTurn(self, request: pb.RunTurnRequest) -> AsyncIterator[pb.TurnEvent]:
        beat = pb.TurnEvent(heartbeat=pb.Heartbeat())
        return beating(self._run_turn(request), lambda: beat, every_s=TURN_HEARTBEAT_S)

    async def _run_turn(self, request: pb.RunTurnRequest) -> AsyncIterator[pb.TurnEvent]:
        log = self._joined(request.session, request.device)
        turn = self._turns.get((request.session, request.turn))
        if turn is None and request.must_exist:
            raise UnknownTurn(f"{request.session} has no turn {request.turn}.")
        asked = self._turn_of(log, request)
        if turn is not None and turn.asked != asked.asked:
            raise TurnConflict(f"Turn {turn.turn} was asked for something else.")
        if turn is None:
            turn = asked
            if request.session in self._running or log.state.waiting:
                self._put_in_line(turn, request.when_busy)
            else:
                self._start(turn)
        async for event in turn.feed.read(request.from_index):
            yield to_wire(event)

    def _turn_of(self, log: MemoryLog, request: pb.RunTurnRequest) -> PlayedTurn:
        asked = request.sampling
        sampling = ops.Sampling(
            temperature=asked.temperature, top_p=asked.top_p or 1.0, top_k=asked.top_k,
            min_p=asked.min_p, seed=asked.seed,
        )  # fmt: skip
        check_run(request.prompt, request.max_tokens, sampling, tuple(request.stop))
        turn = check_id(request.turn, "turn")
        return PlayedTurn(
            log, turn, request.device, request.prompt, request.max_tokens, sampling,
            tuple(request.stop),
        )  # fmt: skip

    def _put_in_line(self, turn: PlayedTurn, when_busy: int) -> None:
        """Behind the running turn, and behind those that came before: it begins when it is its
        time, whoever listens by then."""
        if when_busy == pb.WHEN_BUSY_REFUSE:
            raise SessionBusy("Another turn runs in this session.", hint="Wait for its end.")
        log = turn.log
        log.append(
            ops.TurnWaiting(id=op_id(), device=turn.device, turn=turn.turn, text=turn.prompt)
        )
        self._turns[log.session, turn.turn] = turn
        self._spawn(self._wait_for_place(turn), f"fake turn {turn.turn} waits")

    async def _wait_for_place(self, turn: PlayedTurn) -> None:
        log = turn.log
        while log.session in self._running or self._first_in_line(log) != turn.turn:
            changed = log.changed
            if turn.turn not in {one.turn for one in log.state.waiting}:
                del self._turns[log.session, turn.turn]
                turn.feed.close(TurnCancelled("The turn was stopped while it waited."))
                return
            await changed.wait()
        self._start(turn)

    def _first_in_line(self, log: MemoryLog) -> str:
        return log.state.waiting[0].turn if log.state.waiting else ""

    def _start(self, turn: PlayedTurn) -> None:
        session = turn.log.session
        self._turns[session, turn.turn] = self._running[session] = turn
        self.prompts.append(turn.prompt)
        turn.begin(self.model)
        self._spawn(self._play(turn), f"fake turn {turn.turn}")

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _play(self, turn: PlayedTurn) -> None:
        def script() -> Any:
            if not self.replies:
                raise NotFound(
                    "The FakeNode has no reply left.",
                    hint="Give it one for each turn: FakeNode(replies=[...]), node.replies.append.",
                )
            return steps_of(self.replies.pop(0), turn.prompt)

        try:
            await turn.play(script)
        finally:
            del self._running[turn.log.session]
            turn.log.wake()

    def _running_turn(self, session: str) -> str:
        running = self._running.get(session)
        return running.turn if running is not None else ""

    async def StopTurn(self, request: pb.StopTurnRequest) -> pb.StopTurnReply:
        log = self._joined(request.session, request.device)
        running = self._running.get(request.session)
        if request.turn in {one.turn for one in log.state.waiting}:
            log.append(ops.TurnWithdrawn(id=op_id(), turn=request.turn))
            return pb.StopTurnReply(stopping=True, turn=request.turn)
        if running is None or request.turn not in ("", running.turn):
            return pb.StopTurnReply()
        running.stopped.set()
        return pb.StopTurnReply(stopping=True, turn=running.turn)

    # -- as files ---------------------------------------------------------------------------------
    async def ExportSession(self, request: pb.ExportSessionRequest) -> AsyncIterator[pb.ExportPart]:
        log = self._log(request.session)
        head = ExportHead(
            session=log.session, generation=log.generation, folded=log.tail.offset,
            tail=log.tail.offset, title=log.title, turns=len(log.state.turns),
            at_ms=int(time.time() * 1000),
        )  # fmt: skip
        writer = ExportWriter()
        yield pb.ExportPart(data=writer.head(head))
        for data in writer.state(encode_state(log.state)):
            yield pb.ExportPart(data=data)
        entries = [entry.op for entry in log.entries(0)]
        if entries:
            yield pb.ExportPart(data=writer.entries(1, entries))
        yield pb.ExportPart(data=writer.end())

    async def ImportSession(self, parts: AsyncIterator[pb.ImportPart]) -> pb.ImportSessionReply:
        reader, session = ExportReader(), ""
        async for part in parts:
            session = session or part.session
            reader.feed(part.data)
        found = reader.finish()
        known = self.logs.get(session)
        if known is not None and known.tail.offset:
            raise SessionNotEmpty(f"There is a session {session} with entries.")
        if found.first != 1:
            raise InvalidArgument("A FakeNode takes no export of a compacted session.")
        log = self._made(session)
        log.append(*found.entries)
        return pb.ImportSessionReply(
            session=session, tail=_wire(log.tail), turns=len(log.state.turns)
        )


def _wire(cursor: Cursor) -> pb.Cursor:
    return pb.Cursor(generation=cursor.generation, offset=cursor.offset)
