"""`Tails` of many devices, as few calls: what comes within a moment goes to each cloud together.

Each device asks every second for the few sessions that it follows. A cloud that serves many edges
would spend itself on the number of calls, not on what is asked. Only callers of one tenant and one
token are joined: a cloud answers each question by what its token allows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from segue_contract.errors import Internal, Unreachable
from segue_contract.identity.principal import Kind
from segue_contract.ids import check_id
from segue_contract.limits import MAX_TAILS, TAILS_JOIN_S
from segue_contract.transport.gate import caller, caller_token
from segue_contract.v1 import agent_pb2 as pb

_Key = tuple[str, str, str]  # the cloud, the tenant, the token
Ask = Callable[[pb.TailsRequest], Awaitable[pb.TailsReply]]


class _Batch:
    """Sessions of one cloud, asked for together."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}
        self.reply: asyncio.Future[pb.TailsReply] = asyncio.get_running_loop().create_future()
        self.go = asyncio.Event()  # no more fit


class JoinedTails:
    """`await joined.tails(sessions)` as a device's own call would be answered."""

    def __init__(self, cloud_of: Callable[[str], str], ask: Ask, device: str) -> None:
        """`cloud_of`: where a session is asked for. `ask`: one call, at its first one's cloud, for
        the caller of the first question. `device`: who asks where the caller has no token."""
        self._cloud_of = cloud_of
        self._ask = ask
        self._device = device
        self._open: dict[_Key, _Batch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def tails(self, sessions: Sequence[str]) -> pb.TailsReply:
        """Raises what `ask` raises, and InvalidArgument for what is no session's name."""
        asked = [(self._join(check_id(session, "session")), session) for session in sessions]
        batches = {id(batch): batch for batch, _ in asked}.values()
        replies = {id(batch): await asyncio.shield(batch.reply) for batch in batches}
        found = pb.TailsReply(publishing=all(reply.publishing for reply in replies.values()))
        for batch, session in asked:
            reply, place = replies[id(batch)], batch.places[session]
            found.tails.append(reply.tails[place])
            found.digests.append(reply.digests[place] if reply.digests else b"")
            if session in reply.deleted:
                found.deleted.append(session)
        return found

    def close(self) -> None:
        """Whoever waits for an answer is told to ask elsewhere."""
        for task in list(self._tasks):
            task.cancel()

    def _join(self, session: str) -> _Batch:
        key = self._cloud_of(session), caller().tenant, caller_token()
        batch = self._open.get(key)
        if batch is None:
            batch = self._open[key] = _Batch()
            task = asyncio.create_task(self._run(key, batch), name="joined tails")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        batch.places.setdefault(session, len(batch.places))
        if len(batch.places) >= MAX_TAILS:
            del self._open[key]
            batch.go.set()
        return batch

    async def _run(self, key: _Key, batch: _Batch) -> None:
        try:
            async with asyncio.timeout(TAILS_JOIN_S):
                await batch.go.wait()
        except TimeoutError:
            if self._open.get(key) is batch:
                del self._open[key]
        device = caller().name if caller().kind is Kind.DEVICE else self._device
        request = pb.TailsRequest(device=device, sessions=list(batch.places))
        try:
            reply = await self._ask(request)
            counts = len(reply.tails), len(reply.digests) or len(reply.tails)
            if counts != (len(request.sessions), len(request.sessions)):
                raise Internal(
                    f"A cloud answered for {len(reply.tails)} of {len(request.sessions)} sessions."
                )
            batch.reply.set_result(reply)
        except asyncio.CancelledError:
            _fail(batch, Unreachable("This edge is shutting down.", hint="Ask elsewhere."))
            raise
        except Exception as error:
            _fail(batch, error)


def _fail(batch: _Batch, error: Exception) -> None:
    """All that asked get it; it is no news where all of them have left."""
    batch.reply.set_exception(error)
    batch.reply.exception()
