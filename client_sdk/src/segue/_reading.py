"""Reading a session's log over gRPC: page by page, large states in parts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from dataclasses import replace
from typing import TypeAlias

from segue._inbox import RawEntry
from segue._log import LogView
from segue._nodes import Nodes
from segue.events import Entry, Lost, Snapshot
from segue_contract.errors import CursorAhead, UnknownDevice, Unreachable
from segue_contract.limits import MAX_READ_ENTRIES, RPC_TIMEOUT_S
from segue_contract.sync.state import Cursor, decode_state
from segue_contract.transport.heartbeat import EOF
from segue_contract.v1 import agent_pb2 as pb

FollowItem: TypeAlias = Snapshot | Entry


async def read_log(
    nodes: Nodes,
    session: str,
    device: str,
    view: LogView,
    *,
    patience_s: float = 0.0,
    restart: bool = False,
    folded: bool = False,
) -> AsyncGenerator[FollowItem, None]:
    """Read from the view's cursor to the tail; yields what was news to the view.

    With `restart` a view that is not the log's starts over, which is one snapshot: what brought it
    there did not come from the log.

    Args:
        folded: who knows nothing yet gets one snapshot, and not what it was made of.

    Raises:
        CursorAhead: the log ends before the view's cursor; not with `restart`.
    """
    joined = anew = False
    while True:
        before = view.cursor
        request = pb.ReadRequest(
            session=session,
            device=device,
            after=pb.Cursor(generation=before.generation, offset=before.offset),
            max_entries=MAX_READ_ENTRIES,
            folded=(folded or anew) and not before.offset,
        )
        try:
            reply: pb.ReadReply = await nodes.unary("Read", request, patience_s=patience_s)
        except CursorAhead:
            if not restart or not before.offset:
                raise
            view.forget()
            anew = True
            continue
        except UnknownDevice:
            if joined:
                raise
            joined = True
            await join_again(nodes, session, device)
            continue
        tail = Cursor(reply.tail.generation, reply.tail.offset)
        view.read_to(tail, follows=not reply.HasField("snapshot"))
        if reply.HasField("snapshot"):
            found = reply.snapshot
            if found.more:
                found = await _whole_snapshot(nodes, session, device)
            snapshot = view.load(decode_state(found.state))
            if snapshot is not None and not anew:
                yield replace(snapshot, lost=_lost(before, reply.snapshot.lost_from))
        for raw in raw_entries(reply.entries):
            view.follow_on(raw)
            for entry in view.offer((raw,)):
                if not anew:
                    yield entry
        if view.cursor.offset >= tail.offset:
            view.read_to(tail)
            if not view.confirm(tail, reply.digest) and restart:
                view.forget()
                anew = True
                continue
            if anew:
                yield view.snapshot()
            return
        if view.cursor == before:
            return


def _lost(known: Cursor, lost_from: int) -> Lost | None:
    """What a reader that knew the log up to `known` has that the log lost, from `lost_from` on."""
    if 0 < lost_from <= known.offset:
        return Lost(known.generation, lost_from, known.offset)
    return None


async def join_again(nodes: Nodes, session: str, device: str) -> pb.OpenSessionReply:
    """Of many devices the log forgets those that were quiet for longest: open the session anew.

    Raises:
        UnknownSession: it is gone.
    """
    request = pb.OpenSessionRequest(session=session, device=device, must_exist=True)
    reply: pb.OpenSessionReply = await nodes.unary("OpenSession", request)
    return reply


async def _whole_snapshot(nodes: Nodes, session: str, device: str) -> pb.Snapshot:
    """A state too large for one message, in parts from `Attach`."""
    node = await nodes.connect()
    stub = await nodes.stub(node)
    call = stub.Attach(pb.AttachRequest(session=session, device=device), timeout=RPC_TIMEOUT_S)
    parts: list[bytes] = []
    try:
        async with nodes.calling(node):
            while (event := await call.read()) is not EOF:
                if event.WhichOneof("kind") != "snapshot":
                    continue
                part = event.snapshot
                parts.append(part.state)
                if not part.more:
                    return pb.Snapshot(at=part.at, state=b"".join(parts))
    finally:
        call.cancel()
    raise Unreachable("The session's state ended before its last part.")


def raw_entries(entries: Iterable[pb.LogEntry]) -> tuple[RawEntry, ...]:
    return tuple(RawEntry(entry.generation, entry.offset, entry.op) for entry in entries)
