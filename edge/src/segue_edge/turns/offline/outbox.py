"""Turns served while the cloud was away: kept in order, session by session, until the log has
them. Bounded by reservations, and in a file so that a restart loses none."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace

import structlog
from google.protobuf.message import DecodeError

from segue_contract.errors import (
    InvalidArgument,
    Overloaded,
    PermissionDenied,
    QuotaExceeded,
    SegueError,
    SessionDeleted,
    TurnCancelled,
    TurnConflict,
    Unauthenticated,
    UnknownNode,
)
from segue_contract.ids import SessionName, TurnName
from segue_contract.limits import (
    OUTBOX_REFUSED_BYTES,
    OUTBOX_REFUSED_KEPT,
    OUTBOX_SESSIONS_AT_ONCE,
    OUTBOX_TURNS,
    PROBE_INTERVAL_S,
)
from segue_contract.transport.together import end
from segue_edge.turns.offline.journal import Journal
from segue_edge.turns.offline.turn import OfflineTurn

log = structlog.get_logger("segue.outbox")


Deliver = Callable[[OfflineTurn], Awaitable[None]]
Refused = Callable[[OfflineTurn], None]

# What a log says of the turn or its session, and will say again. Any other error may pass.
_FOR_GOOD = (
    InvalidArgument,
    PermissionDenied,
    QuotaExceeded,
    SessionDeleted,
    TurnCancelled,
    TurnConflict,
    Unauthenticated,  # of the token that was valid then: its key was revoked, or it is too old
)


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
        deliver: puts one turn into the log; errors that may pass leave it here.
        journal: the file; without one a restart loses what waits.
        refused: told of a turn that the log refused for good. It is kept apart from those that
            wait, so that its device can be told, until that says that it was; the newest
            `OUTBOX_REFUSED_KEPT`, and `OUTBOX_REFUSED_BYTES`, of them.
        retry_s: at the longest, what could not be delivered is tried again.
    """

    def __init__(
        self,
        deliver: Deliver,
        journal: Journal | None = None,
        refused: Refused = lambda _: None,
        retry_s: float = PROBE_INTERVAL_S,
    ) -> None:
        self.reserved = 0
        self.refused: deque[OfflineTurn] = deque()
        self._on_refused = refused
        self._retry_s = retry_s
        self._changed = asyncio.Event()
        self._deliver = deliver
        self._journal = journal
        self._disk = asyncio.Lock()
        self._sessions: OrderedDict[SessionName, deque[OfflineTurn]] = OrderedDict()
        self._locks: dict[SessionName, asyncio.Lock] = {}
        self._task: asyncio.Task[None] | None = None
        for number, stored in journal.turns if journal is not None else []:
            try:
                turn = OfflineTurn.of(number, stored)
            except (SegueError, ValueError, DecodeError) as error:
                log.error("offline_turn_unreadable", number=number, error=str(error))
                continue
            if turn.refused is None:
                self._queue(turn)
            else:
                self.refused.append(turn)
        if len(self):
            log.info("offline_turns_found", turns=len(self))

    def __len__(self) -> int:
        return sum(len(turns) for turns in self._sessions.values())

    @property
    def waiting(self) -> list[OfflineTurn]:
        """All that wait for the log."""
        return [turn for turns in self._sessions.values() for turn in turns]

    def holds(self, session: SessionName) -> bool:
        return bool(self._sessions.get(session))

    def find(self, turn: TurnName) -> OfflineTurn | None:
        """The turn of that id that the log has not: it waits here, or was refused."""
        return next((one for one in self.of(turn.session) if one.asked.key == turn), None)

    def of(self, session: SessionName) -> list[OfflineTurn]:
        """All such turns of a session, those that wait first, in order."""
        refused = [turn for turn in self.refused if turn.asked.session == session]
        return [*self._sessions.get(session, ()), *refused]

    async def settled(self, turn: TurnName) -> None:
        """Wait until the turn does not wait here for the log: for as long as the caller likes."""
        while (known := self.find(turn)) is not None and known.refused is None:
            await self._changed.wait()

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

    def _placed(self, turn: OfflineTurn) -> OfflineTurn:
        """What was said after a refused turn follows the one before that."""
        for refused in reversed(self.refused):
            if refused.asked.key == TurnName(turn.asked.session, turn.follows):
                turn = replace(turn, follows=refused.follows)
        return turn

    async def add(self, turn: OfflineTurn) -> None:
        turn = self._placed(turn)
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
                async with asyncio.timeout(self._retry_s):
                    await returned()
            await self.flush()

    async def flush(self) -> bool:
        """Deliver all that can be; False where something is left."""
        gate = asyncio.Semaphore(OUTBOX_SESSIONS_AT_ONCE)

        async def one(session: SessionName) -> None:
            async with gate:
                with contextlib.suppress(SegueError):
                    await self.settle(session)

        await asyncio.gather(*(one(session) for session in list(self._sessions)))
        return not len(self)

    async def settle(self, session: SessionName) -> None:
        """Deliver the session's turns now.

        Raises:
            SegueError: why the first that is left could not be delivered for now.
        """
        lock = self._locks.setdefault(session, asyncio.Lock())
        async with lock:
            while turns := self._sessions.get(session):
                refused = await self._deliver_one(turns[0])
                # Whoever waits is told before the file is written: a caller may be cancelled there.
                turn = turns.popleft()
                if refused is None:
                    self._wake()
                    await self._forget(turn)
                else:
                    await self._refuse(turns, replace(turn, refused=refused))
            self._sessions.pop(session, None)
        if session not in self._sessions and not lock.locked():
            self._locks.pop(session, None)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _deliver_one(self, turn: OfflineTurn) -> SegueError | None:
        """Returns why the log refuses the turn for good; None where it has it."""
        name = turn.asked.turn
        try:
            await self._deliver(turn)
        except UnknownNode as error:  # what this edge lacks; an operator can mend it
            log.error("outbox_waits", turn=name, error=str(error))
            raise _waiting() from error
        except _FOR_GOOD as error:
            if error.fields.get("retry_after_s") is not None:  # a quota of the tenant: it passes
                log.info("outbox_waits", turn=name, error=str(error))
                raise _waiting() from error
            log.error("offline_turn_refused", turn=name, error=str(error))
            return error
        except SegueError as error:
            log.info("outbox_waits", turn=name, error=str(error))
            if error.retryable:
                raise
            raise _waiting() from error
        except Exception as error:  # a fault of ours is no reason to lose what was said
            log.error("outbox_failed", turn=name, exc_info=error)
            raise _waiting() from error
        return None

    async def _refuse(self, turns: deque[OfflineTurn], turn: OfflineTurn) -> None:
        """Keep it apart; what was said after it follows the turn before it."""
        self.refused.append(turn)
        self._on_refused(turn)
        self._wake()
        for place, later in enumerate(list(turns)):  # more may come while the file is written
            turns[place] = self._placed(later)
            if turns[place] is not later:
                await self._rewrite(turns[place])
        if turn in self.refused:  # not dismissed meanwhile
            await self._rewrite(turn)
        while self._too_many_refused:
            oldest = self.refused.popleft()
            log.warning("refused_turn_forgotten", turn=oldest.asked.turn)
            await self._forget(oldest)

    @property
    def _too_many_refused(self) -> bool:
        size = sum(turn.size for turn in self.refused)
        return len(self.refused) > OUTBOX_REFUSED_KEPT or size > OUTBOX_REFUSED_BYTES

    async def dismiss(self, session: SessionName, device: str, turns: Collection[str]) -> int:
        """Forget those of the device's turns that the log refused: it has told its user of them.

        Returns:
            How many were kept until now.
        """
        gone = [
            turn
            for turn in self.refused
            if turn.asked.session == session
            and turn.asked.request.device == device
            and turn.asked.turn in turns
        ]
        for turn in gone:
            self.refused.remove(turn)
        for turn in gone:
            await self._forget(turn)
        return len(gone)

    async def _rewrite(self, turn: OfflineTurn) -> None:
        if self._journal is None or not turn.number:
            return
        try:
            async with self._disk:
                await asyncio.to_thread(self._journal.replace, turn.number, turn.stored())
        except OSError as error:  # it would be delivered, and refused, again after a restart
            log.error("outbox_not_written", turn=turn.asked.turn, error=str(error))

    async def _forget(self, turn: OfflineTurn) -> None:
        if self._journal is None or not turn.number:
            return
        try:
            async with self._disk:
                await asyncio.to_thread(self._journal.remove, turn.number)
        except OSError as error:  # it would be delivered again after a restart: that is idempotent
            log.error("outbox_not_written", turn=turn.asked.turn, error=str(error))

    async def close(self) -> None:
        try:
            if self._task is not None:
                await end(self._task)
        finally:
            if len(self):
                event = "offline_turns_lost" if self._journal is None else "offline_turns_kept"
                log.warning(event, turns=len(self))
            if self._journal is not None:
                async with self._disk:
                    await asyncio.to_thread(self._journal.close)


def _waiting() -> Overloaded:
    return Overloaded(
        "An earlier message of this session could not be delivered yet.",
        hint="See the edge's log; it is tried again.",
        retry_after_s=PROBE_INTERVAL_S,
    )
