"""`Store` on Redis or Valkey: see `log.lua` for the rules, `keys.py` for the keys."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from segue_cloud.sessions import rows, scripts
from segue_cloud.sessions.active import ACTIVE, ActiveSessions
from segue_cloud.sessions.broker import BROKER, BrokerRecord
from segue_cloud.sessions.changes import ChangeLink
from segue_cloud.sessions.keeper import KEEP, SessionKeeper
from segue_cloud.sessions.keys import SECRET_KEY, SessionKeys, index_key
from segue_cloud.sessions.known import known_fields, known_turns, running_turn, title_of
from segue_cloud.sessions.logins import LOGINS, LoginRecord
from segue_cloud.sessions.news import LogTail
from segue_cloud.sessions.port import (
    AppendResult,
    Bearer,
    OpenedSession,
    Producer,
    RawPage,
    Revocation,
    TurnClaim,
    TurnHold,
)
from segue_cloud.sessions.revoked import RevokedTokens
from segue_cloud.sessions.running import RUNNING, RunningTurns
from segue_cloud.sessions.scripts import Command
from segue_cloud.sessions.slices import decoded, encoded
from segue_cloud.sessions.wire import Sleep, Wire
from segue_contract.errors import (
    Internal,
    InvalidArgument,
    SessionDeleted,
    StoreUnavailable,
    UnknownDevice,
    UnknownSession,
)
from segue_contract.identity.rights import access_revoked
from segue_contract.ids import SessionName
from segue_contract.limits import (
    MAX_COUNT,
    MAX_SESSION_DEVICES,
    MAX_TURNS_WAITING_PER_SESSION,
    PRODUCER_MEMORY,
    PRODUCER_RUNS,
    READ_PAGE_BYTES,
    WAITING_LEASE_S,
    SessionQuotas,
    StoreLimits,
)
from segue_contract.sync.state import (
    Cursor,
    SessionState,
)

log = structlog.get_logger("segue.sessions")

_APPEND = scripts.load("log.lua", "append.lua")
_TURNS = scripts.load("log.lua", "turns.lua")
_SESSION = scripts.load("log.lua", "session.lua")
_TURN_VERBS = frozenset(("begin", "wait", "take", "renew", "release", "stop"))
SCRIPTS = (_APPEND, _TURNS, _SESSION, ACTIVE, RUNNING, KEEP, BROKER, LOGINS)


def unknown_session(session: SessionName) -> UnknownSession:
    return UnknownSession(
        f"There is no session {session.session!r}.", hint="Open it first.", session=session.session
    )


def _bearer(bearer: Bearer | None) -> str:
    return "" if bearer is None else f"{bearer.issued_ms}|{bearer.device}"


async def _check_policy(wire: Wire) -> None:
    """Raises StoreUnavailable where the store throws away keys when it is full."""
    try:
        replies = await wire.call_servers(("CONFIG", "GET", "maxmemory-policy"))
        policies = {policy for (*_, policy) in replies}
    except (Internal, ValueError):  # a managed store, or an ACL, does not let us look
        log.warning("store_policy_unknown", hint="maxmemory-policy must be noeviction.")
        return
    for policy in policies - {b"noeviction"}:
        raise StoreUnavailable(
            f"The session store evicts keys when it is full (maxmemory-policy {policy.decode()}): "
            "sessions would lose entries.",
            hint="Set maxmemory-policy to noeviction, and start again.",
        )


class RedisStore:
    """All methods as `segue_cloud.sessions.port` says."""

    def __init__(
        self,
        wire: Wire,
        *,
        limits: StoreLimits = StoreLimits(),
        monotonic: Callable[[], float] = time.monotonic,
        random_bytes: Callable[[int], bytes] = os.urandom,
        quotas: SessionQuotas = SessionQuotas(),
    ) -> None:
        self._wire = wire
        self.keeper = SessionKeeper(wire)
        self._revoked = RevokedTokens(wire, self._log)
        self.quotas = quotas
        self._limits = limits
        self._monotonic = monotonic
        self._random_bytes = random_bytes
        self._active = ActiveSessions(wire, monotonic)

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        limits: StoreLimits = StoreLimits(),
        sleep: Sleep = asyncio.sleep,
    ) -> RedisStore:
        """Connect to redis://host:port and see that it answers.

        Raises:
            StoreUnavailable: it does not within `limits.timeout_s`.
            InvalidArgument: `url` is no Redis URL.
        """
        wire = Wire(
            url,
            scripts=SCRIPTS,
            timeout_s=limits.timeout_s,
            max_connections=limits.connections,
            sleep=sleep,
        )
        try:
            await wire.call(("PING",))
            await _check_policy(wire)
        except BaseException:
            await wire.close()
            raise
        return cls(wire, limits=limits)

    async def close(self) -> None:
        await self._revoked.close()
        await self._wire.close()

    @property
    def replica_waits(self) -> Mapping[str, int]:
        """How often replicas were waited for, by what came of it: see `ReplicaWaits`."""
        return self._wire.waits.counts

    async def ping(self) -> None:
        """Raises StoreUnavailable where the store does not answer."""
        await self._wire.call(("PING",))

    # -- sessions and devices -----------------------------------------------------------------

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
        if bearer is not None and bearer.issued_ms < await self._revoked.before_ms(session, bearer):
            raise access_revoked(session.session)
        index: list[Command] = []
        if not must_exist:  # before the session itself: see keys.py
            index.append(self._index(session, "NX"))
        verb = self._log(
            session, "open", int(must_exist), device, MAX_SESSION_DEVICES, producer,
            PRODUCER_MEMORY, after_generation, _bearer(bearer),
        )  # fmt: skip
        status, generation, tail, created, epoch = (await self._wire.call(*index, verb))[-1]
        if status == b"missing":
            raise await self._missing(session)
        if status == b"revoked":
            raise access_revoked(session.session)
        if bearer is not None and created:
            await self._revoked.check_made(session, bearer)
        return OpenedSession(Cursor(generation, tail), bool(created), epoch)

    async def check_device(
        self, session: SessionName, device: str, bearer: Bearer | None = None
    ) -> None:
        """As the port says."""
        ((status,),) = await self._wire.call(self._log(session, "use", device, _bearer(bearer)))
        if status == b"missing":
            raise await self._missing(session)
        if status == b"revoked":
            raise access_revoked(session.session)
        if status == b"unknown":
            raise UnknownDevice(
                f"The device {device!r} never joined the session {session!r}.",
                hint="Open the session with this device first.",
                device=device,
            )

    async def revoke(self, session: SessionName, device: str) -> Revocation:
        """As the port says."""
        return await self._revoked.revoke(session, device)

    async def revocations(self, since_ms: int) -> tuple[list[Revocation], int]:
        """As the port says."""
        return await self._revoked.since(since_ms)

    # -- writing ------------------------------------------------------------------------------

    async def append(
        self, session: SessionName, producer: Producer, ops: Sequence[bytes], takes: str = ""
    ) -> AppendResult:
        """As the port says. A batch that repeats known ops and goes on beyond them appends only
        what is new: OK, with `first_offset` as the first op got it then and `appended` new ones.
        An offset that is forgotten (`PRODUCER_RUNS`) is 0.

        Raises:
            InvalidArgument: no ops, too many, too large, or numbers out of range.
        """
        verb = self._append(session, producer, ops, None, ends=False, takes=takes)
        return rows.append_result(await self._write(session, verb))

    async def append_turn(
        self,
        session: SessionName,
        hold: TurnHold,
        first_seq: int,
        ops: Sequence[bytes],
        *,
        ends: bool = False,
    ) -> AppendResult:
        """As `append`, for the owner of a turn."""
        producer = Producer("", hold.epoch, first_seq)
        verb = self._append(session, producer, ops, hold, ends=ends)
        return rows.append_result(await self._write(session, verb, listed=ends, waits=ends))

    async def begin_turn(
        self,
        session: SessionName,
        turn: str,
        ops: Sequence[bytes],
        lease_s: float,
        *,
        title: str = "",
        digest: str = "",
        abandon_s: float = 0.0,
        bearer: Bearer | None = None,
    ) -> TurnClaim:
        rows.check_ops(ops, least=0)
        nonce = self._nonce()
        verb = self._log(
            session, "begin", turn, int(lease_s * 1000), self._limits.turn_ids, title, nonce,
            digest, int(WAITING_LEASE_S * 1000), int(abandon_s * 1000), self.quotas.bytes,
            _bearer(bearer), *ops,
        )  # fmt: skip
        row = await self._write(session, verb, listed=True, waits=True)
        return rows.claim(row[:-1], nonce)

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
        verb = self._log(
            session, "wait", turn, digest, mode, int(WAITING_LEASE_S * 1000),
            MAX_TURNS_WAITING_PER_SESSION, int(abandon_s * 1000), _bearer(bearer),
        )  # fmt: skip
        return rows.claim((await self._wire.call(verb))[0], "")

    def running_turns(self, model: str) -> RunningTurns:
        """The sessions in which a turn of `model` runs, of all instances."""
        return RunningTurns(self._wire, model)

    async def take_over(
        self,
        session: SessionName,
        turn: str,
        lease_s: float,
        *,
        quiet_s: float = 0.0,
        from_epoch: int = 0,
    ) -> TurnClaim:
        mode = "quiet" if quiet_s else "now"
        return await self._take(session, turn, lease_s, mode, quiet_s, from_epoch)

    async def fence_turn(self, session: SessionName, turn: str) -> TurnClaim:
        """Raise the epoch of a turn whose owner is gone, without claiming the session for it."""
        return await self._take(session, turn, 0.0, "fence")

    async def renew_turn(
        self, session: SessionName, hold: TurnHold, lease_s: float
    ) -> AppendResult:
        verb = self._log(session, "renew", hold.turn, hold.epoch, hold.nonce, int(lease_s * 1000))
        return rows.append_result((await self._wire.call(verb, replicas=rows.replicas))[0])

    async def release_turn(self, session: SessionName, hold: TurnHold) -> None:
        await self._wire.call(self._log(session, "release", hold.turn, hold.epoch, hold.nonce))

    async def request_stop(self, session: SessionName, turn: str = "") -> str:
        ((stopping,),) = await self._wire.call(self._log(session, "stop", turn))
        return str(stopping.decode())

    async def compact(
        self, session: SessionName, state: SessionState, keep_from: int, written: int
    ) -> None:
        cursor = state.cursor
        await self._wire.call(
            self._log(
                session, "compact", cursor.generation, cursor.offset, keep_from, written,
                await encoded(state),
            )
        )  # fmt: skip

    async def mend(self, session: SessionName, state: SessionState) -> None:
        kept = [turn.turn for turn in state.turns]
        endless = [turn.turn for turn in state.turns if not turn.ended]
        await self._wire.call(
            self._log(
                session, "mend", state.cursor.generation, state.cursor.offset,
                await encoded(state), ",".join(kept), ",".join(endless), running_turn(state),
            )
        )  # fmt: skip

    async def restore(self, session: SessionName, state: SessionState) -> None:
        fields, title = known_fields(state), title_of(state.turns[0].prompt if state.turns else "")
        await self._wire.call(
            self._log(
                session, "restore", state.cursor.generation, title, running_turn(state),
                len(fields), *fields, *known_turns(state),
            )
        )  # fmt: skip

    # -- reading ------------------------------------------------------------------------------

    async def read(
        self,
        session: SessionName,
        after: Cursor,
        max_entries: int,
        max_bytes: int = READ_PAGE_BYTES,
        *,
        judged: bool = False,
    ) -> RawPage:
        (row,) = await self._wire.call(
            self._log(
                session, "read", after.generation, after.offset, max(max_entries, 1), max_bytes,
                int(judged),
            )
        )  # fmt: skip
        if row[0] == b"missing":
            raise await self._missing(session)
        return rows.page(row)

    async def tails(self, sessions: Sequence[SessionName]) -> list[LogTail | None]:
        """The tail of each session; None where there is no such session."""
        if not sessions:
            return []
        values = await self._wire.call_each(
            *(("HMGET", SessionKeys.of(one).meta, "gen", "tail", "ck") for one in sessions)
        )
        return [
            LogTail(Cursor(int(gen), int(tail)), digest or b"") if gen is not None else None
            for gen, tail, digest in values
        ]

    def broker_record(self) -> BrokerRecord:
        """Through which broker all clouds of this store publish."""
        return BrokerRecord(self._wire)

    def login_record(self) -> LoginRecord:
        """Which devices may log in at that broker."""
        return LoginRecord(self._wire)

    def changes(self, name: str) -> ChangeLink:
        """As the port says."""
        return ChangeLink(self._wire, name)

    async def deleted(self, sessions: Sequence[SessionName]) -> set[SessionName]:
        return await self.keeper.deleted(sessions)

    async def load_snapshot(self, session: SessionName) -> SessionState | None:
        """As the port says. Other sessions go on while a large one is decoded."""
        (data,) = await self._wire.call(("GET", SessionKeys.of(session).snapshot))
        if data is None:
            return None
        return await decoded(data[data.index(b"\n") + 1 :])

    # -- the fan-out's book-keeping -----------------------------------------------------------

    async def take_dirty(self, max_sessions: int, older_than_s: float) -> list[SessionName]:
        return await self._active.take_dirty(max_sessions, older_than_s)

    async def take_idle(self, max_sessions: int, idle_s: float) -> list[SessionName]:
        return await self._active.take_idle(max_sessions, idle_s)

    async def mark_published(self, session: SessionName, cursor: Cursor) -> None:
        await self._wire.call(self._log(session, "published", cursor.generation, cursor.offset))

    async def agree_secret(self, ours: bytes) -> bytes:
        """As the port says."""
        _, secret = await self._wire.call_each(("SET", SECRET_KEY, ours, "NX"), ("GET", SECRET_KEY))
        return bytes(secret)

    # -- inside -------------------------------------------------------------------------------

    def _log(self, session: SessionName, verb: str, *args: str | bytes | int) -> Command:
        script = _TURNS if verb in _TURN_VERBS else _SESSION
        return script.call(SessionKeys.of(session).all, verb, *args)

    def _append(
        self,
        session: SessionName,
        producer: Producer,
        ops: Sequence[bytes],
        hold: TurnHold | None,
        *,
        ends: bool,
        takes: str = "",
    ) -> Command:
        rows.check_ops(ops, least=1)
        if not (0 <= producer.epoch <= MAX_COUNT and 1 <= producer.first_seq <= MAX_COUNT):
            raise InvalidArgument(
                f"Epoch {producer.epoch} and sequence number {producer.first_seq} are out of "
                "range.",
                hint="Epochs come from the log, sequence numbers count from 1.",
            )
        hold = hold or TurnHold("", 0, "")
        quotas = self.quotas
        return _APPEND.call(
            SessionKeys.of(session).all, "append", producer.name, producer.epoch,
            producer.first_seq, hold.turn, hold.nonce, hold.generation, int(ends),
            int(self._limits.lease_s * 1000), PRODUCER_RUNS, PRODUCER_MEMORY, quotas.bytes, takes,
            f"{quotas.values}:{quotas.docs}:{quotas.kept_ops}", _bearer(producer.bearer), *ops,
        )  # fmt: skip

    async def _take(
        self,
        session: SessionName,
        turn: str,
        lease_s: float,
        mode: str,
        quiet_s: float = 0.0,
        from_epoch: int = 0,
    ) -> TurnClaim:
        nonce = self._nonce()
        lease_ms, quiet_ms = int(lease_s * 1000), int(quiet_s * 1000)
        verb = self._log(session, "take", turn, lease_ms, mode, nonce, quiet_ms, from_epoch)
        return rows.claim((await self._write(session, verb, waits=True))[:-1], nonce)

    async def _write(
        self, session: SessionName, verb: Command, *, listed: bool = False, waits: bool = False
    ) -> Any:
        """The reply of `verb`. The session is named active first, where that is not fresh.

        So the sweep finds whatever a writer leaves behind that dies after its append, without a
        command more for every append and without a script across Cluster slots. The list of
        sessions learns of the write then, too; with `listed` in any case. With `waits` the store's
        replicas are waited for: see `replicas.py`.
        """
        commands = [verb]
        began, fresh = self._monotonic(), self._active.fresh(session)
        if listed or not fresh:
            commands.insert(0, self._index(session))
        if not fresh:
            commands.insert(0, self._active.touch(session))
        count = rows.replicas if waits else None
        reply = (await self._wire.call(*commands, replicas=count))[-1]
        if not fresh:
            self._active.touched(session, began)
        return reply

    def _index(self, session: SessionName, condition: str = "XX") -> Command:
        now_ms = int(time.time() * 1000)
        return ("ZADD", index_key(session.tenant), condition, now_ms, session.session)

    async def _missing(self, session: SessionName) -> UnknownSession:
        if await self.keeper.deleted([session]):
            return SessionDeleted(
                f"The session {session.session!r} was deleted.",
                hint="Its name may be used for another one.",
                session=session.session,
            )
        return unknown_session(session)

    def _nonce(self) -> str:
        return self._random_bytes(8).hex()
