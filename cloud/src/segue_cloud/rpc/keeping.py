"""The part of `Agent` that is about sessions as wholes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from segue_cloud.log.keeping import SessionKeeping
from segue_cloud.rpc.convert import cursor_message
from segue_cloud.tenants.sessions import SessionQuota
from segue_contract.errors import DeadlineExceeded, InvalidArgument
from segue_contract.limits import (
    EXPORT_PART_BYTES,
    MAX_EXPIRED_AT_ONCE,
    MAX_SESSIONS_LISTED,
    RPC_TIMEOUT_S,
)
from segue_contract.transport.gate import caller, gate_here, named
from segue_contract.v1 import agent_pb2 as pb


class KeepingRpc:
    """Mixed into the service; see agent.proto."""

    def __init__(self, keeping: SessionKeeping, quota: SessionQuota) -> None:
        self._keeping = keeping
        self._quota = quota

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Any
    ) -> pb.ListSessionsReply:
        wanted = min(request.max_sessions or MAX_SESSIONS_LISTED, MAX_SESSIONS_LISTED)
        who, revoked = caller(), gate_here().watermarks
        found, following = await self._keeping.list_sessions(
            who.tenant,
            wanted,
            request.after,
            lambda name: who.may_see(name) and not revoked.is_void(who, name),
        )
        reply = pb.ListSessionsReply(next=following)
        for session in found:
            reply.sessions.add(
                session=session.session,
                tail=cursor_message(session.cursor),
                updated_ms=session.updated_ms,
                title=session.title,
                turns=session.turns,
                running_turn=session.running_turn,
            )
        return reply

    async def DeleteSession(
        self, request: pb.DeleteSessionRequest, context: Any
    ) -> pb.DeleteSessionReply:
        deleted = await self._keeping.delete(named(request.session))
        return pb.DeleteSessionReply(deleted=deleted)

    async def ExpireSessions(
        self, request: pb.ExpireSessionsRequest, context: Any
    ) -> pb.ExpireSessionsReply:
        if not request.idle_s:
            raise InvalidArgument(
                "It was not said for how long a session must have been idle.",
                hint="Give a time above 0; to delete one session, name it.",
            )
        most = request.max_sessions or MAX_EXPIRED_AT_ONCE
        gone, more = await self._keeping.expire(caller().tenant, request.idle_s, most)
        return pb.ExpireSessionsReply(deleted=[one.session for one in gone], more=more)

    async def ExportSession(
        self, request: pb.ExportSessionRequest, context: Any
    ) -> AsyncIterator[pb.ExportPart]:
        async for data in self._keeping.export(named(request.session)):
            for start in range(0, len(data), EXPORT_PART_BYTES):
                yield pb.ExportPart(data=data[start : start + EXPORT_PART_BYTES])

    async def ImportSession(
        self, request_iterator: AsyncIterator[pb.ImportPart], context: Any
    ) -> pb.ImportSessionReply:
        parts = aiter(request_iterator)
        first = await _next(parts)
        if first is None:
            raise InvalidArgument("An import begins with the session's name.")
        session = named(first.session)
        reached = await self._quota.reached(session.tenant)
        if reached is not None:
            raise reached
        tail, turns = await self._keeping.import_(session, _data(first, parts))
        return pb.ImportSessionReply(
            session=session.session, tail=cursor_message(tail), turns=turns
        )


async def _data(first: pb.ImportPart, parts: AsyncIterator[pb.ImportPart]) -> AsyncIterator[bytes]:
    part: pb.ImportPart | None = first
    while part is not None:
        yield part.data
        part = await _next(parts)


async def _next(parts: AsyncIterator[pb.ImportPart]) -> pb.ImportPart | None:
    try:
        async with asyncio.timeout(RPC_TIMEOUT_S):
            return await anext(parts, None)
    except TimeoutError as error:
        raise DeadlineExceeded("The import's next part did not come.") from error
