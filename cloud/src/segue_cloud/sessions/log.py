"""`SessionLog`: how the rest of the cloud sees the sessions.

Every append goes through here, because what the store took has to reach followers in this process
(the hub) and devices (the broker) at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import structlog

from segue_cloud.hub.hub import Hub
from segue_cloud.sessions.port import (
    AppendResult,
    SessionStore,
    SessionSummary,
    Status,
    StoredEntry,
    TurnClaim,
)
from segue_cloud.sessions.reader import Page
from segue_contract.errors import SegueError
from segue_contract.limits import (
    COMPACT_AFTER_ENTRIES,
    COMPACT_KEEP_ENTRIES,
    SESSION_CACHE,
    TURN_LEASE_S,
)
from segue_contract.sync import ops as log_ops
from segue_contract.sync.state import Cursor, SessionState

log = structlog.get_logger("segue.sessions")


class Fanout(Protocol):
    """Where appended entries go beyond this process. Never waits, never raises."""

    def publish(self, tenant: str, session: str, entries: Sequence[StoredEntry]) -> None: ...


class SessionLog:
    """Methods named as in `SessionStore` mean the same and raise the same."""

    def __init__(
        self,
        store: SessionStore,
        hub: Hub,
        fanout: Fanout | None = None,
        *,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        compact_after: int = COMPACT_AFTER_ENTRIES,
        compact_keep: int = COMPACT_KEEP_ENTRIES,
    ) -> None:
        self._store = store
        self._hub = hub
        self._reader = hub.reader
        self._fanout = fanout
        self._now_ms = now_ms
        self._compact_after = compact_after
        self._compact_keep = compact_keep
        self._folded_at: dict[tuple[str, str], int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # -- sessions -----------------------------------------------------------------------------

    async def open_session(
        self, tenant: str, session: str, *, must_exist: bool = False, device: str = ""
    ) -> tuple[Cursor, bool]:
        return await self._store.open_session(tenant, session, must_exist=must_exist, device=device)

    async def check_device(self, tenant: str, session: str, device: str) -> None:
        await self._store.check_device(tenant, session, device)

    async def list_sessions(self, tenant: str, max_sessions: int) -> list[SessionSummary]:
        return await self._store.list_sessions(tenant, max_sessions)

    # -- reading ------------------------------------------------------------------------------

    async def state(self, tenant: str, session: str) -> SessionState:
        """The session folded up to its tail; the caller's own copy.

        Raises:
            UnknownSession, StoreUnavailable.
        """
        return await self._reader.state(tenant, session)

    async def read(self, tenant: str, session: str, after: Cursor, max_entries: int) -> Page:
        """See `LogReader.read`."""
        return await self._reader.read(tenant, session, after, max_entries)

    # -- writing ------------------------------------------------------------------------------

    async def append(
        self,
        tenant: str,
        session: str,
        producer: str,
        epoch: int,
        first_seq: int,
        ops: Sequence[bytes],
        *,
        turn: str = "",
        ends_turn: bool = False,
    ) -> AppendResult:
        """As the store's; besides, bytes that are no op are refused (InvalidArgument): one of
        them would stop every reader of the session for ever.
        """
        for op in ops:
            log_ops.decode_op(op)
        result = await self._store.append(
            tenant, session, producer, epoch, first_seq, ops, turn=turn, ends_turn=ends_turn
        )
        if result.appended:
            tail = Cursor(result.generation, result.tail)
            self._appended(tenant, session, tail, ops[len(ops) - result.appended :])
        return result

    async def begin_turn(
        self,
        tenant: str,
        session: str,
        turn: str,
        ops: Sequence[bytes],
        lease_s: float = TURN_LEASE_S,
    ) -> TurnClaim:
        """As the store's; also ends the turn of an owner that let its lease run out."""
        claim = await self._store.begin_turn(tenant, session, turn, ops, lease_s)
        if claim.status is Status.OK and claim.appended:
            self._appended(tenant, session, claim.cursor, ops[len(ops) - claim.appended :])
        if claim.status is Status.OK and claim.holder:
            await self._end_abandoned(tenant, session, claim.holder)
        return claim

    async def take_over(
        self,
        tenant: str,
        session: str,
        turn: str,
        lease_s: float = TURN_LEASE_S,
        *,
        only_expired: bool = False,
    ) -> TurnClaim:
        return await self._store.take_over(
            tenant, session, turn, lease_s, only_expired=only_expired
        )

    async def renew_turn(
        self, tenant: str, session: str, turn: str, epoch: int, lease_s: float = TURN_LEASE_S
    ) -> AppendResult:
        return await self._store.renew_turn(tenant, session, turn, epoch, lease_s)

    async def request_stop(self, tenant: str, session: str, turn: str = "") -> str:
        return await self._store.request_stop(tenant, session, turn)

    async def close(self) -> None:
        """End compactions in progress; the store, hub and fan-out have owners of their own."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- inside -------------------------------------------------------------------------------

    def _appended(self, tenant: str, session: str, tail: Cursor, ops: Sequence[bytes]) -> None:
        first = tail.offset - len(ops) + 1
        entries = [
            StoredEntry(Cursor(tail.generation, offset), op) for offset, op in enumerate(ops, first)
        ]
        if self._fanout is not None:
            self._fanout.publish(tenant, session, entries)
        self._reader.offer(tenant, session, entries)
        self._hub.offer(tenant, session, entries)
        key = (tenant, session)
        folded_at = self._folded_at.setdefault(key, first - 1)
        if len(self._folded_at) > SESSION_CACHE:
            del self._folded_at[next(iter(self._folded_at))]
        if tail.offset - folded_at >= self._compact_after:
            self._folded_at[key] = tail.offset
            self._spawn(self._compact(tenant, session), f"compact {session}")

    async def _end_abandoned(self, tenant: str, session: str, turn: str) -> None:
        fence = await self._store.fence_turn(tenant, session, turn)
        if fence.status is not Status.OK:
            return  # somebody ended it meanwhile
        end = log_ops.TurnEnded(
            id=f"{turn}.abandoned.{fence.epoch}",
            at_ms=self._now_ms(),
            turn=turn,
            epoch=fence.epoch,
            reason="error",
            error_code="turn_failed",
            error_message="The node that ran this turn went away.",
        )
        await self.append(
            tenant, session, "", fence.epoch, 1, [log_ops.encode_op(end)],
            turn=turn, ends_turn=True,
        )  # fmt: skip
        log.warning("turn_abandoned", session=session, turn=turn)

    async def _compact(self, tenant: str, session: str) -> None:
        """Fold the log up to its tail, and keep only its last entries one by one."""
        try:
            state = await self._reader.state(tenant, session)
            keep_from = state.cursor.offset - self._compact_keep + 1
            await self._store.compact(tenant, session, state, keep_from)
        except SegueError as error:  # the next time
            log.warning("compaction_failed", session=session, error=str(error))

    def _spawn(self, coroutine: Any, name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
