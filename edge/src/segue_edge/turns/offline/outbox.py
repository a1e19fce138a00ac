"""Turns served while the cloud was away: kept in order, session by session, until the log has
them. Bounded by reservations, and in a file so that a restart loses none."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import structlog

from segue_contract.errors import Overloaded, SegueError
from segue_contract.limits import OUTBOX_SESSIONS_AT_ONCE, OUTBOX_TURNS, PROBE_INTERVAL_S
from segue_contract.turn.events import Reason
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.turns.asked import Asked
from segue_edge.turns.offline.journal import Journal, StoredTurn

log = structlog.get_logger("segue.outbox")


@dataclass(frozen=True)
class OfflineTurn:
    """A whole turn as the device saw it.

    Attributes:
        prompt: its token ids as they were then.
        begun: it began in the log, and has no end there that this edge knows of.
        follows: the last turn that this node knew of the session before it; "" for none.
        number: its place in the file, 0 without one.
    """

    asked: Asked
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    reason: Reason
    plan: bytes
    begun: bool = False
    follows: str = ""
    number: int = 0

    def stored(self) -> StoredTurn:
        return StoredTurn(
            request=self.asked.request.SerializeToString(),
            prompt=self.prompt,
            tokens=self.tokens,
            pieces=self.pieces,
            reason=self.reason,
            plan=self.plan,
            begun=self.begun,
            follows=self.follows,
        )

    @classmethod
    def of(cls, number: int, stored: StoredTurn) -> OfflineTurn:
        """Raises SegueError or ValueError where the request was none."""
        return cls(
            Asked.of(pb.RunTurnRequest.FromString(stored.request)),
            stored.prompt,
            stored.tokens,
            stored.pieces,
            Reason(stored.reason),
            stored.plan,
            stored.begun,
            stored.follows,
            number,
        )


Deliver = Callable[[OfflineTurn], Awaitable[None]]


class Room:
    """A place in the outbox that nobody else gets."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox: Outbox | None = outbox

    def free(self) -> None:
        """Give it back. Idempotent; nothing to do once a turn was kept in it."""
        if self._outbox is not None:
            self._outbox.reserved -= 1
            self._outbox = None

    async def keep(self, turn: OfflineTurn) -> None:
        """Put the turn there; returns when a restart would not lose it."""
        assert self._outbox is not None, "a place is used once"
        outbox = self._outbox
        try:
            await outbox.add(turn)
        finally:
            self.free()


class Outbox:
    """First in, first out within a session; sessions do not wait for each other.

    Args:
        deliver: puts one turn into the log; retryable errors leave it here.
        journal: the file; without one a restart loses what waits.
    """

    def __init__(self, deliver: Deliver, journal: Journal | None = None) -> None:
        self.reserved = 0
        self._deliver = deliver
        self._journal = journal
        self._disk = asyncio.Lock()
        self._sessions: OrderedDict[str, deque[OfflineTurn]] = OrderedDict()
        self._locks: dict[str, asyncio.Lock] = {}
        self._task: asyncio.Task[None] | None = None
        for number, stored in journal.turns if journal is not None else []:
            try:
                self._queue(OfflineTurn.of(number, stored))
            except (SegueError, ValueError) as error:
                log.error("offline_turn_unreadable", number=number, error=str(error))
        if len(self):
            log.info("offline_turns_found", turns=len(self))

    def __len__(self) -> int:
        return sum(len(turns) for turns in self._sessions.values())

    def holds(self, session: str) -> bool:
        return session in self._sessions

    def reserve(self) -> Room:
        """Room for one more turn. Raises Overloaded where there is none."""
        if len(self) + self.reserved >= OUTBOX_TURNS:
            raise Overloaded(
                f"{OUTBOX_TURNS} turns wait for the cloud to come back.",
                hint="Bring the cloud back; this edge keeps no more of them.",
                retry_after_s=5.0,
            )
        self.reserved += 1
        return Room(self)

    async def add(self, turn: OfflineTurn) -> None:
        if self._journal is not None:
            try:
                async with self._disk:
                    number = await asyncio.to_thread(self._journal.add, turn.stored())
                turn = replace(turn, number=number)
            except OSError as error:  # a disk that fails is no reason to lose the turn at once
                log.error("outbox_not_written", turn=turn.asked.turn, error=str(error))
        self._queue(turn)

    def _queue(self, turn: OfflineTurn) -> None:
        self._sessions.setdefault(turn.asked.session, deque()).append(turn)

    # -- delivery ------------------------------------------------------------------------------

    def start(self, returned: Callable[[], Awaitable[None]]) -> None:
        self._task = asyncio.create_task(self._run(returned), name="outbox")

    async def _run(self, returned: Callable[[], Awaitable[None]]) -> None:
        while True:
            # A turn may come, or be refused for now, while the cloud is there and stays there.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_INTERVAL_S):
                    await returned()
            await self.flush()

    async def flush(self) -> bool:
        """Deliver all that can be; False where something is left."""
        gate = asyncio.Semaphore(OUTBOX_SESSIONS_AT_ONCE)

        async def one(session: str) -> None:
            async with gate:
                with contextlib.suppress(SegueError):
                    await self.settle(session)

        await asyncio.gather(*(one(session) for session in list(self._sessions)))
        return not len(self)

    async def settle(self, session: str) -> None:
        """Deliver the session's turns now.

        Raises:
            SegueError: why the first that is left could not be delivered for now.
        """
        lock = self._locks.setdefault(session, asyncio.Lock())
        async with lock:
            while turns := self._sessions.get(session):
                await self._deliver_one(turns[0])
                await self._forget(turns.popleft())
                if not turns:
                    del self._sessions[session]
        if session not in self._sessions and not lock.locked():
            self._locks.pop(session, None)

    async def _deliver_one(self, turn: OfflineTurn) -> None:
        name = turn.asked.turn
        try:
            await self._deliver(turn)
        except SegueError as error:
            if error.retryable:
                log.info("outbox_waits", turn=name, error=str(error))
                raise
            log.error("offline_turn_refused", turn=name, error=str(error))
        except Exception as error:  # a fault of ours is no reason to lose what was said
            log.error("outbox_failed", turn=name, exc_info=error)
            raise Overloaded(
                "An earlier message of this session could not be delivered yet.",
                hint="See the edge's log; it is tried again.",
                retry_after_s=PROBE_INTERVAL_S,
            ) from error

    async def _forget(self, turn: OfflineTurn) -> None:
        if self._journal is None or not turn.number:
            return
        try:
            async with self._disk:
                await asyncio.to_thread(self._journal.remove, turn.number)
        except OSError as error:  # it would be delivered again after a restart: that is idempotent
            log.error("outbox_not_written", turn=turn.asked.turn, error=str(error))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if len(self):
            event = "offline_turns_lost" if self._journal is None else "offline_turns_kept"
            log.warning(event, turns=len(self))
        if self._journal is not None:
            async with self._disk:
                await asyncio.to_thread(self._journal.close)
