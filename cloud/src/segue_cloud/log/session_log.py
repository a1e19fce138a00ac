"""`SessionLog`: how the rest of the cloud sees the sessions.

Every append goes through here, because what the store took has to reach followers in this process
(the hub) and devices (the broker) at once. Ops are values above and bytes below: each is encoded
once, and not decoded again on its way out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Protocol

import msgspec
import structlog

from segue_cloud.hub.hub import Following, Hub
from segue_cloud.hub.state import HubState
from segue_cloud.log.keeping import SessionKeeping
from segue_cloud.sessions.known import title_of
from segue_cloud.sessions.news import LogTail
from segue_cloud.sessions.port import (
    AppendResult,
    Bearer,
    LogOp,
    OpenedSession,
    Producer,
    Revocation,
    Status,
    Store,
    StoredEntry,
    TurnClaim,
    TurnHold,
)
from segue_cloud.sessions.quota import quota_exceeded, slots
from segue_cloud.sessions.reader import LogReader, Page
from segue_contract.errors import SegueError, StaleEpoch, StoreUnavailable
from segue_contract.ids import SessionName
from segue_contract.limits import (
    COMPACT_AFTER_BYTES,
    COMPACT_AFTER_ENTRIES,
    COMPACT_KEEP_BYTES,
    COMPACT_KEEP_ENTRIES,
    TURN_LEASE_S,
)
from segue_contract.sync.ops import (
    Op,
    TurnEnded,
    TurnWaiting,
    TurnWithdrawn,
    Usage,
    UserMessage,
)
from segue_contract.sync.state import Cursor, SessionState, find_turn

log = structlog.get_logger("segue.log")

_QUOTAS = {
    Status.NO_ROOM: "bytes",
    Status.NO_VALUES: "values",
    Status.NO_DOCS: "docs",
    Status.NO_KEPT_OPS: "kept_ops",
}
_NOTES = "cloud.notes"  # the producer of what instances say of a session
_NOTE_ATTEMPTS = 3


class Publishing(Protocol):
    """Where appended entries go beyond this process. Never waits, never raises."""

    def publish(self, session: SessionName, entries: Sequence[StoredEntry]) -> None: ...

    def clear_head(self, session: SessionName) -> None:
        """The session is gone: what the broker kept of it goes, too."""
        ...


class SessionLog:
    """`async with SessionLog(store, publisher) as log:` also runs the hub of its followers.

    `keeping`: what is done with sessions as wholes.

    Methods named as in `segue_cloud.sessions.port` mean the same and raise the same. The store and
    the publisher have owners of their own.
    """

    def __init__(
        self,
        store: Store,
        publishing: Publishing | None = None,
        *,
        hub_state: HubState | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        compact_after: int = COMPACT_AFTER_ENTRIES,
        compact_bytes: int = COMPACT_AFTER_BYTES,
        compact_keep: int = COMPACT_KEEP_ENTRIES,
    ) -> None:
        self._store = store
        self._reader = LogReader(store)
        self._hub = Hub(store, self._reader, state=hub_state)
        self._publishing = publishing
        self.keeping = SessionKeeping(store, self._reader, now_ms=now_ms, on_deleted=self._deleted)
        self._now_ms = now_ms
        self._compact_after = compact_after
        self._compact_keep = compact_keep
        self._compact_bytes = compact_bytes
        self._compacting: set[SessionName] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> SessionLog:
        await self._hub.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End compactions in progress, and the hub."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._hub.__aexit__(kind, error, trace)

    # -- sessions -----------------------------------------------------------------------------

    async def open_session(
        self,
        session: SessionName,
        *,
        must_exist: bool = False,
        device: str = "",
        producer: str = "",
        after_generation: int = 0,
        bearer: Bearer | None = None,
    ) -> OpenedSession:
        return await self._store.open_session(
            session,
            must_exist=must_exist,
            device=device,
            producer=producer,
            after_generation=after_generation,
            bearer=bearer,
        )

    async def check_device(
        self, session: SessionName, device: str, bearer: Bearer | None = None
    ) -> None:
        await self._store.check_device(session, device, bearer)

    async def revoke(self, session: SessionName, device: str) -> Revocation:
        return await self._store.revoke(session, device)

    async def revocations(self, since_ms: int) -> tuple[list[Revocation], int]:
        return await self._store.revocations(since_ms)

    # -- reading ------------------------------------------------------------------------------

    async def state(self, session: SessionName) -> SessionState:
        """The session folded up to its tail; the caller's own copy.

        Raises:
            UnknownSession, StoreUnavailable.
        """
        return await self._reader.state(session)

    async def read(self, session: SessionName, after: Cursor, max_entries: int) -> Page:
        """See `LogReader.read`."""
        return await self._reader.read(session, after, max_entries)

    async def whole(self, session: SessionName) -> Page:
        """See `LogReader.whole`."""
        return await self._reader.whole(session)

    async def tails(self, sessions: Sequence[SessionName]) -> list[LogTail | None]:
        """How far each log goes; None where there is no such session. See `TailFeed.tails`."""
        return await self._hub.tails(sessions)

    @property
    def tails_fresh(self) -> bool:
        """The store tells of changes, and no older ones than `TAIL_FRESH_S` are on their way."""
        return self._hub.tails_fresh

    def follow(
        self, session: SessionName, after: Cursor | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Following]]:
        """See `Hub.follow`."""
        return self._hub.follow(session, after)

    def check_integrity(self) -> None:
        """Assert what must always hold."""
        self._hub.check_integrity()

    # -- writing ------------------------------------------------------------------------------

    async def append(
        self, session: SessionName, producer: Producer, ops: Sequence[LogOp]
    ) -> AppendResult:
        """Raises QuotaExceeded, where nothing was written; else as the store's."""
        data = [op.data for op in ops]
        result = await self._store.append(session, producer, data, slots(op.op for op in ops))
        self._check_quota(session, result.status)
        self._appended(session, result, ops)
        return result

    async def note(self, session: SessionName, op: TurnWaiting | TurnWithdrawn) -> None:
        """Append what an instance has to say of a turn that has not begun, unless the log says so
        already: a turn may wait at several instances.

        All instances write as one producer, each op under an epoch of its own, which makes its id
        unique. What another one says between the epoch and the append refuses the append, so
        nothing comes between the look and it.

        Raises:
            StaleEpoch: several said something at once.
            UnknownSession, QuotaExceeded, StoreUnavailable.
        """
        for _ in range(_NOTE_ATTEMPTS):
            opened = await self._store.open_session(session, must_exist=True, producer=_NOTES)
            if not _news(await self.state(session), op):
                return
            said = msgspec.structs.replace(op, id=f"{op.id}.{opened.epoch}")
            result = await self.append(session, Producer(_NOTES, opened.epoch), [LogOp.of(said)])
            if result.status in (Status.OK, Status.DUP):
                return
        raise StaleEpoch(f"Session {session.session} is noted in by others.", hint="Try again.")

    async def append_turn(
        self,
        session: SessionName,
        hold: TurnHold,
        first_seq: int,
        ops: Sequence[Op],
        *,
        ends: bool = False,
    ) -> AppendResult:
        encoded = [LogOp.of(op) for op in ops]
        data = [op.data for op in encoded]
        result = await self._store.append_turn(session, hold, first_seq, data, ends=ends)
        self._appended(session, result, encoded)
        return result

    async def begin_turn(
        self,
        session: SessionName,
        turn: str,
        ops: Sequence[Op],
        lease_s: float = TURN_LEASE_S,
        *,
        digest: str = "",
        abandon_s: float = 0.0,
        bearer: Bearer | None = None,
    ) -> TurnClaim:
        """As the store's; also ends the turn of an owner that let its lease run out.

        Raises:
            QuotaExceeded: the session has no room for it; nothing was written.
        """
        encoded = [LogOp.of(op) for op in ops]
        data = [op.data for op in encoded]
        claim = await self._store.begin_turn(
            session,
            turn,
            data,
            lease_s,
            title=_title(ops),
            digest=digest,
            abandon_s=abandon_s,
            bearer=bearer,
        )
        self._check_quota(session, claim.status)
        if claim.status is Status.OK and claim.appended:
            self._spread(session, claim.cursor, encoded[len(encoded) - claim.appended :])
        if claim.status is Status.OK and claim.holder:
            try:
                await self.end_abandoned(session, claim.holder)
            except StoreUnavailable as error:  # whoever looks at the session's turns ends it
                log.warning("turn_not_ended", turn=claim.holder, error=error.message)
        return claim

    async def wait_turn(
        self,
        session: SessionName,
        turn: str,
        digest: str,
        mode: str,
        *,
        abandon_s: float = 0.0,
        bearer: Bearer | None = None,
    ) -> TurnClaim:
        return await self._store.wait_turn(
            session, turn, digest, mode, abandon_s=abandon_s, bearer=bearer
        )

    async def take_over(
        self,
        session: SessionName,
        turn: str,
        lease_s: float = TURN_LEASE_S,
        *,
        quiet_s: float = 0.0,
        from_epoch: int = 0,
    ) -> TurnClaim:
        return await self._store.take_over(
            session, turn, lease_s, quiet_s=quiet_s, from_epoch=from_epoch
        )

    async def renew_turn(
        self, session: SessionName, hold: TurnHold, lease_s: float = TURN_LEASE_S
    ) -> AppendResult:
        return await self._store.renew_turn(session, hold, lease_s)

    async def release_turn(self, session: SessionName, hold: TurnHold) -> None:
        await self._store.release_turn(session, hold)

    async def request_stop(self, session: SessionName, turn: str = "") -> str:
        return await self._store.request_stop(session, turn)

    # -- inside -------------------------------------------------------------------------------

    def _appended(self, session: SessionName, result: AppendResult, ops: Sequence[LogOp]) -> None:
        if result.appended:
            tail = Cursor(result.generation, result.tail)
            self._spread(session, tail, ops[len(ops) - result.appended :])
        # By the log's own length: at any number of sessions, and after a restart, too.
        long = result.log_entries >= self._compact_after or result.log_bytes >= self._compact_bytes
        if long and session not in self._compacting:
            self._compacting.add(session)
            each = max(result.log_bytes // max(result.log_entries, 1), 1)
            keep = min(self._compact_keep, COMPACT_KEEP_BYTES // each)
            self._spawn(self._compact(session, keep), f"compact {session}")

    def _check_quota(self, session: SessionName, status: Status) -> None:
        """Raises QuotaExceeded where `status` says that there was no room."""
        if status in _QUOTAS:
            raise quota_exceeded(session, _QUOTAS[status], self._store.quotas)

    def _spread(self, session: SessionName, tail: Cursor, ops: Sequence[LogOp]) -> None:
        """`ops` are in the log, and end at `tail`: tell everybody."""
        first = tail.offset - len(ops) + 1
        entries = [
            StoredEntry(Cursor(tail.generation, offset), op.data, op.op)
            for offset, op in enumerate(ops, first)
        ]
        if self._publishing is not None:
            self._publishing.publish(session, entries)
        self._reader.offer(session, entries)
        self._hub.offer(session, entries)

    def _deleted(self, session: SessionName) -> None:
        if self._publishing is not None:
            self._publishing.clear_head(session)
        self._reader.forget(session)
        self._hub.deleted(session)

    async def end_abandoned(self, session: SessionName, turn: str) -> None:
        """End a turn that lost its session to another one, with an error."""
        fence = await self._store.fence_turn(session, turn)
        if fence.status is not Status.OK:
            return  # somebody ended it meanwhile
        # Nothing comes after the fence: a reader that is told fewer tokens would take some back.
        known = find_turn(await self.state(session), turn)
        if known is None:
            return  # the log has lost it
        end = TurnEnded(
            id=f"{turn}.abandoned.{fence.epoch}",
            at_ms=self._now_ms(),
            turn=turn,
            epoch=fence.epoch,
            reason="error",
            usage=Usage(completion_tokens=len(known.tokens)),
            error_code="turn_failed",
            error_message="The node that ran this turn went away.",
        )
        await self.append_turn(session, fence.hold(turn), 1, [end], ends=True)
        log.warning("turn_abandoned", session=session.session, turn=turn)

    async def _compact(self, session: SessionName, keep: int) -> None:
        """Fold the log up to its tail, and keep only its last entries one by one."""
        try:
            state, written = await self._reader.folded(session)
            keep_from = state.cursor.offset - keep + 1
            await self._store.compact(session, state, keep_from, written)
        except SegueError as error:  # the next time
            log.warning("compaction_failed", session=session.session, error=str(error))
        finally:
            self._compacting.discard(session)

    def _spawn(self, coroutine: Any, name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _title(ops: Sequence[Op]) -> str:
    """What the session is about: the begin of its first message."""
    messages = (op.text for op in ops if isinstance(op, UserMessage))
    return title_of(next(messages, ""))


def _news(state: SessionState, op: TurnWaiting | TurnWithdrawn) -> bool:
    """Whether the op would change the state."""
    shown = any(one.turn == op.turn for one in state.waiting)
    if isinstance(op, TurnWithdrawn):
        return shown
    return not shown and find_turn(state, op.turn) is None
