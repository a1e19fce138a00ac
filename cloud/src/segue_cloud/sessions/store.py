"""`Store` on Redis or Valkey: see `log.lua` for the rules, `keys.py` for the keys."""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import structlog

from segue_cloud.sessions import rows, scripts
from segue_cloud.sessions.broker import BROKER, BrokerRecord
from segue_cloud.sessions.changes import ChangeLink
from segue_cloud.sessions.keeper import KEEP, SessionKeeper
from segue_cloud.sessions.keys import REVOKED_KEY, SessionKeys, active_key, active_shard, index_key
from segue_cloud.sessions.port import (
    AppendResult,
    Bearer,
    LogTail,
    OpenedSession,
    Producer,
    RawPage,
    Revocation,
    TurnClaim,
    TurnHold,
)
from segue_cloud.sessions.running import RUNNING, RunningTurns
from segue_cloud.sessions.scripts import Command
from segue_cloud.sessions.wire import Sleep, Wire
from segue_contract.errors import (
    Internal,
    InvalidArgument,
    Revoked,
    SessionDeleted,
    StoreUnavailable,
    UnknownDevice,
    UnknownSession,
)
from segue_contract.ids import SessionName
from segue_contract.limits import (
    ACTIVE_REFRESH_S,
    ACTIVE_SHARDS,
    CLOCK_SKEW_S,
    MAX_COUNT,
    MAX_SESSION_DEVICES,
    MAX_TOKEN_LIFETIME_S,
    MAX_TURNS_WAITING_PER_SESSION,
    PRODUCER_MEMORY,
    PRODUCER_RUNS,
    READ_PAGE_BYTES,
    SESSION_CACHE,
    STATE_SLICE_BYTES,
    STORE_CONNECTIONS,
    STORE_TIMEOUT_S,
    TURN_ID_MEMORY,
    TURN_LEASE_S,
    WAITING_LEASE_S,
    SessionQuotas,
)
from segue_contract.sync.state import (
    Cursor,
    SessionState,
    decode_state_in_slices,
    encode_state,
)

log = structlog.get_logger("segue.sessions")

_LOG = scripts.load("log.lua")
_ACTIVE = scripts.load("active.lua")
# Tokens of before have run out by then.
_REVOKED_KEPT_MS = int(1000 * (MAX_TOKEN_LIFETIME_S + 2 * CLOCK_SKEW_S))
SCRIPTS = (_LOG, _ACTIVE, RUNNING, KEEP, BROKER)


def unknown_session(session: SessionName) -> UnknownSession:
    return UnknownSession(
        f"There is no session {session.session!r}.", hint="Open it first.", session=session.session
    )


def revoked(session: SessionName) -> Revoked:
    return Revoked(
        "This device's access to the session was revoked.",
        hint="Ask whoever issues the tokens for a new one.",
        session=session.session,
    )


def _issued(bearer: Bearer | None) -> str:
    return "" if bearer is None else str(bearer.issued_ms)


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
        lease_s: float = TURN_LEASE_S,
        turn_ids: int = TURN_ID_MEMORY,
        monotonic: Callable[[], float] = time.monotonic,
        random_bytes: Callable[[int], bytes] = os.urandom,
        quotas: SessionQuotas | None = None,
    ) -> None:
        """`lease_s`: how long an append of a turn's owner renews its lease for. `turn_ids`: so
        many of a session's latest are kept at hand in the store; older ones are looked up."""
        self._wire = wire
        self.keeper = SessionKeeper(wire)
        self.quotas = quotas or SessionQuotas()
        self._lease_ms = int(lease_s * 1000)
        self._turn_ids = turn_ids
        self._monotonic = monotonic
        self._random_bytes = random_bytes
        # When this process last named a session active; see `_touch`.
        self._named: OrderedDict[SessionName, float] = OrderedDict()
        self._looked_at = 0  # where the sweep goes on, in each list of active sessions

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        lease_s: float = TURN_LEASE_S,
        timeout_s: float = STORE_TIMEOUT_S,
        turn_ids: int = TURN_ID_MEMORY,
        max_connections: int = STORE_CONNECTIONS,
        sleep: Sleep = asyncio.sleep,
    ) -> RedisStore:
        """Connect to redis://host:port and see that it answers.

        Raises:
            StoreUnavailable: it does not within `timeout_s`.
            InvalidArgument: `url` is no Redis URL.
        """
        wire = Wire(
            url,
            scripts=SCRIPTS,
            timeout_s=timeout_s,
            max_connections=max_connections,
            sleep=sleep,
        )
        try:
            await wire.call(("PING",))
            await _check_policy(wire)
        except BaseException:
            await wire.close()
            raise
        return cls(wire, lease_s=lease_s, turn_ids=turn_ids)

    async def close(self) -> None:
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
        index: list[Command] = []
        if not must_exist:  # before the session itself: see keys.py
            index.append(self._index(session, "NX"))
        verb = self._log(
            session, "open", int(must_exist), device, MAX_SESSION_DEVICES, producer,
            PRODUCER_MEMORY, after_generation, _issued(bearer),
        )  # fmt: skip
        status, generation, tail, created, epoch = (await self._wire.call(*index, verb))[-1]
        if status == b"missing":
            raise await self._missing(session)
        if status == b"revoked":
            raise revoked(session)
        return OpenedSession(Cursor(generation, tail), bool(created), epoch)

    async def check_device(
        self, session: SessionName, device: str, bearer: Bearer | None = None
    ) -> None:
        """As the port says."""
        ((status,),) = await self._wire.call(self._log(session, "use", device, _issued(bearer)))
        if status == b"missing":
            raise await self._missing(session)
        if status == b"revoked":
            raise revoked(session)
        if status == b"unknown":
            raise UnknownDevice(
                f"The device {device!r} never joined the session {session!r}.",
                hint="Open the session with this device first.",
                device=device,
            )

    async def revoke(self, session: SessionName, device: str) -> Revocation:
        """As the port says. Instances that die in between leave streams of the device as they are;
        its appends are refused all the same."""
        ((status, before_ms),) = await self._wire.call(self._log(session, "revoke", device))
        if status == b"missing":
            raise await self._missing(session)
        member = msgspec.json.encode((session.tenant, session.session, device))
        await self._wire.call(
            ("ZADD", REVOKED_KEY, before_ms, member),
            ("ZREMRANGEBYSCORE", REVOKED_KEY, "-inf", before_ms - _REVOKED_KEPT_MS),
        )
        return Revocation(session, device, before_ms)

    async def revocations(self, since_ms: int) -> list[Revocation]:
        """As the port says."""
        (found,) = await self._wire.call(
            ("ZRANGEBYSCORE", REVOKED_KEY, since_ms, "+inf", "WITHSCORES")
        )
        told = []
        for member, at_ms in zip(found[::2], found[1::2], strict=True):
            tenant, session, device = msgspec.json.decode(member, type=tuple[str, str, str])
            told.append(Revocation(SessionName(tenant, session), device, int(at_ms)))
        return told

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
    ) -> TurnClaim:
        rows.check_ops(ops, least=0)
        nonce = self._nonce()
        verb = self._log(
            session, "begin", turn, int(lease_s * 1000), self._turn_ids, title, nonce, digest,
            int(WAITING_LEASE_S * 1000), int(abandon_s * 1000), self.quotas.bytes, *ops,
        )  # fmt: skip
        row = await self._write(session, verb, listed=True, waits=True)
        return rows.claim(row[:-1], nonce)

    async def wait_turn(
        self, session: SessionName, turn: str, digest: str, mode: str, *, abandon_s: float = 0.0
    ) -> TurnClaim:
        verb = self._log(
            session, "wait", turn, digest, mode, int(WAITING_LEASE_S * 1000),
            MAX_TURNS_WAITING_PER_SESSION, int(abandon_s * 1000),
        )  # fmt: skip
        return rows.claim((await self._wire.call(verb))[0], "")

    def running_turns(self, model: str) -> RunningTurns:
        """The sessions in which a turn of `model` runs, of all instances."""
        return RunningTurns(self._wire, model)

    async def take_over(
        self, session: SessionName, turn: str, lease_s: float, *, quiet_s: float = 0.0
    ) -> TurnClaim:
        mode = "quiet" if quiet_s else "now"
        return await self._take(session, turn, lease_s, mode, quiet_s)

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
                encode_state(state),
            )
        )  # fmt: skip

    async def mend(self, session: SessionName, state: SessionState) -> None:
        await self._wire.call(
            self._log(
                session, "mend", state.cursor.generation, state.cursor.offset, encode_state(state)
            )
        )

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
        decoding = decode_state_in_slices(data[data.index(b"\n") + 1 :], STATE_SLICE_BYTES)
        while True:
            try:
                next(decoding)
            except StopIteration as done:
                state: SessionState = done.value
                return state
            await asyncio.sleep(0)

    # -- the fan-out's book-keeping -----------------------------------------------------------

    async def take_dirty(self, max_sessions: int, older_than_s: float) -> list[SessionName]:
        """As the port says; each call looks at the next `max_sessions` active sessions."""
        each = -(-max_sessions // ACTIVE_SHARDS)
        start, stop = self._looked_at, self._looked_at + each - 1
        shards = await self._wire.call_each(
            *(("ZREVRANGE", active_key(shard), start, stop) for shard in range(ACTIVE_SHARDS))
        )
        more = any(len(shard) == each for shard in shards)
        self._looked_at = stop + 1 if more else 0
        active = [SessionName.parse(member.decode()) for shard in shards for member in shard]
        if not active:
            return []
        now, *since = await self._wire.call_each(
            ("TIME",), *(("HGET", SessionKeys.of(one).meta, "da") for one in active)
        )
        latest_ms = int(now[0]) * 1000 + int(now[1]) // 1000 - older_than_s * 1000
        dirty = [
            one
            for one, at in zip(active, since, strict=True)
            if at is not None and 0 < int(at) <= latest_ms
        ]
        return dirty[:max_sessions]

    async def take_idle(self, max_sessions: int, idle_s: float) -> list[SessionName]:
        """As the port says. A dirty one stays in the lists, for the sweep to find."""
        each = -(-max_sessions // ACTIVE_SHARDS)
        idle_ms = int(idle_s * 1000)
        shards = await self._wire.call_each(
            *(
                _ACTIVE.call((active_key(shard),), "idle", idle_ms, each)
                for shard in range(ACTIVE_SHARDS)
            )
        )
        idle = [SessionName.parse(member.decode()) for shard in shards for member in shard]
        if not idle:
            return []
        dirty = await self._wire.call_each(
            *(("HGET", SessionKeys.of(one).meta, "da") for one in idle)
        )
        members: dict[int, list[str]] = {}
        commands: list[Command] = []
        for session, since in zip(idle, dirty, strict=True):
            shard = active_shard(session)
            if since is not None and int(since) > 0:
                commands.append(_ACTIVE.call((active_key(shard),), "touch", str(session)))
            else:
                members.setdefault(shard, []).append(str(session))
        touched = len(commands)
        for shard, names in members.items():
            commands.append(_ACTIVE.call((active_key(shard),), "take", idle_ms, *names))
        taken = (await self._wire.call_each(*commands))[touched:]
        return [SessionName.parse(member.decode()) for shard in taken for member in shard]

    async def mark_published(self, session: SessionName, cursor: Cursor) -> None:
        await self._wire.call(self._log(session, "published", cursor.generation, cursor.offset))

    # -- inside -------------------------------------------------------------------------------

    def _log(self, session: SessionName, verb: str, *args: str | bytes | int) -> Command:
        return _LOG.call(SessionKeys.of(session).all, verb, *args)

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
        return self._log(
            session, "append", producer.name, producer.epoch, producer.first_seq, hold.turn,
            hold.nonce, hold.generation, int(ends), self._lease_ms, PRODUCER_RUNS,
            PRODUCER_MEMORY, quotas.bytes, takes,
            f"{quotas.values}:{quotas.docs}:{quotas.kept_ops}", _bearer(producer.bearer), *ops,
        )  # fmt: skip

    async def _take(
        self, session: SessionName, turn: str, lease_s: float, mode: str, quiet_s: float = 0.0
    ) -> TurnClaim:
        nonce = self._nonce()
        lease_ms, quiet_ms = int(lease_s * 1000), int(quiet_s * 1000)
        verb = self._log(session, "take", turn, lease_ms, mode, nonce, quiet_ms)
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
        now = self._monotonic()
        named = self._named.get(session)
        fresh = named is not None and now - named < ACTIVE_REFRESH_S
        if listed or not fresh:
            commands.insert(0, self._index(session))
        if not fresh:
            shard = active_key(active_shard(session))
            commands.insert(0, _ACTIVE.call((shard,), "touch", str(session)))
        count = rows.replicas if waits else None
        reply = (await self._wire.call(*commands, replicas=count))[-1]
        if not fresh:
            self._named[session] = now
            self._named.move_to_end(session)
            while len(self._named) > SESSION_CACHE:
                self._named.popitem(last=False)
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
