"""The store port: one fenced, idempotent, server-sequenced log per session.

    Sessions   open, list, append       what devices do
    Turns      begin, take over, append what the owner of a turn does
    Reading    read, tails, changes     what the reader and the hub need
    Fanout     dirty, idle, published   what the publisher needs
    Store      all of it, and `Keeping` what `segue_cloud.log` stands on

All methods raise StoreUnavailable when the store does not answer within its deadline. A call that
raised may be repeated with the same arguments: every write is idempotent.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from segue_cloud.sessions.news import Changes, LogTail
from segue_cloud.sessions.whole import Keeping
from segue_contract.ids import SessionName
from segue_contract.limits import READ_PAGE_BYTES, SessionQuotas
from segue_contract.sync.ops import Op, decode_op, encode_op
from segue_contract.sync.state import Cursor, SessionState


class Status(StrEnum):
    OK = "ok"
    DUP = "dup"  # these very ops were appended already; `first_offset` is what they got then
    TAKEN = "taken"  # these sequence numbers were used for other ops
    UNKNOWN = "unknown"  # they were used, and what for can no longer be compared
    STALE = "stale"  # `current_epoch` holds now (0: none is known), or another owner under this one
    MOVED = "moved"  # a turn's own: the log goes on under `generation`, see `lost_from`
    # A quota of the session is reached: see `SessionQuotas`.
    NO_ROOM = "no_room"  # of bytes
    NO_VALUES = "no_values"
    NO_DOCS = "no_docs"
    NO_KEPT_OPS = "no_kept_ops"
    GAP = "gap"  # `expected_seq` is what the log waits for
    BUSY = "busy"  # another turn holds the session
    MISSING = "missing"  # no such session
    FULL = "full"  # too many turns wait for the session
    CANCELLED = "cancelled"  # the turn was stopped before it began
    REVOKED = "revoked"  # the device's token is void
    CONFLICT = "conflict"  # the turn's id was used for something else


@dataclass(frozen=True)
class Bearer:
    """A device by its token, valid since `issued_ms` (Unix time)."""

    device: str
    issued_ms: int


@dataclass(frozen=True)
class Revocation:
    """Tokens of the device for the session that are valid since before `before_ms` are void.

    In place of a session's name `session` may have the beginning of names and "*": all of them.
    """

    session: SessionName
    device: str
    before_ms: int


@dataclass(frozen=True)
class Producer:
    """Who appends, and the number of the batch's first op: they count from 1 in each epoch.

    `bearer`: the device's token, where it has one; a void one appends nothing (REVOKED).
    """

    name: str
    epoch: int
    first_seq: int = 1
    bearer: Bearer | None = None


@dataclass(frozen=True)
class TurnHold:
    """A turn's right to append, as `begin_turn` or `take_over` gave it.

    The nonce is the claim's own: of two owners under one epoch the log knows one.
    """

    turn: str
    epoch: int
    nonce: str
    # The log's generation as the owner knows it: nothing is appended behind a loss that the owner
    # did not hear of. 0: whichever there is.
    generation: int = 0


@dataclass(frozen=True)
class LogOp:
    """An op and its bytes. What a peer sent stays as it came, with fields that we do not know."""

    op: Op
    data: bytes

    @classmethod
    def of(cls, op: Op) -> LogOp:
        """Raises InvalidArgument where it is too large."""
        return cls(op, encode_op(op))

    @classmethod
    def read(cls, data: bytes) -> LogOp:
        """Raises InvalidArgument where the bytes are no op."""
        return cls(decode_op(data), data)


@dataclass(frozen=True)
class StoredEntry:
    """`op`: its bytes. `value`: the op itself, where this process made or checked it."""

    cursor: Cursor
    op: bytes
    value: Op | None = field(default=None, compare=False)


@dataclass(frozen=True)
class AppendResult:
    status: Status
    generation: int
    first_offset: int = 0
    tail: int = 0
    current_epoch: int = 0
    expected_seq: int = 0
    # somebody asked the session's running turn to stop
    stop_requested: bool = False
    # how many of the batch's last ops this call appended: they end at `tail`
    appended: int = 0
    # since the last snapshot: what a late joiner has to be given besides it
    log_entries: int = 0
    log_bytes: int = 0
    # MOVED: entries of the generation that the owner knew are in the log up to here, exclusive
    lost_from: int = 0


@dataclass(frozen=True)
class OpenedSession:
    """`epoch`: the producer's, where one was named; nothing older of it is taken from here on."""

    tail: Cursor
    created: bool
    epoch: int = 0


class PageStatus(StrEnum):
    OK = "ok"
    LOST = "lost"  # the cursor's owner saw entries from `lost_from` on that are not in the log
    AHEAD = "ahead"  # the cursor lies beyond the log's end: nobody was ever told of it


@dataclass(frozen=True)
class RawPage:
    """What `read` found. `entries` may start later than asked for: see `compact`.

    `snapshot_offset`: up to where the log was folded. `written`: bytes of all ops up to `tail`.
    `bare`: the store forgot which turns the log has; see `restore`.
    """

    status: PageStatus
    tail: Cursor
    entries: list[StoredEntry]
    snapshot_offset: int = 0
    written: int = 0
    lost_from: int = 0
    digest: bytes = b""  # at the tail
    bare: bool = False


@dataclass(frozen=True)
class TurnClaim:
    """Outcome of `begin_turn` and `take_over`: the turn's epoch, and whether it was known."""

    status: Status
    epoch: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    known: bool = False  # this turn id began earlier
    ended: bool = False  # and has ended since
    # BUSY: the turn that holds the session. OK: one whose owner let its lease run out, and which
    # this claim fenced off without ending it.
    holder: str = ""
    appended: int = 0  # how many opening ops this call appended; they end at `cursor`
    # BUSY: how much longer the holder holds the session; not positive: nobody renews its lease
    lease_left_s: float = 0.0
    nonce: str = ""  # OK, unless `begin_turn` found the turn `known`: what the owner appends with
    opening: tuple[Op, ...] = ()  # the turn's first ops, where it began just now

    def hold(self, turn: str) -> TurnHold:
        return TurnHold(turn, self.epoch, self.nonce, self.cursor.generation)


class Sessions(Protocol):
    """What devices do with sessions."""

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
        """`device` becomes one of the session's devices, `producer` gets an epoch to append under.

        A session that is made anew has a later generation than `after_generation`.

        Raises:
            UnknownSession: `must_exist` and it is not there.
            Revoked: the bearer's token is void.
        """
        ...

    async def check_device(
        self, session: SessionName, device: str, bearer: Bearer | None = None
    ) -> None:
        """See that `device` opened the session, and remember that it is in use.

        Of more than MAX_SESSION_DEVICES, those unused for longest are forgotten.

        Raises:
            UnknownSession.
            UnknownDevice: it never opened the session, or is forgotten.
            Revoked: the bearer's token is void.
        """
        ...

    async def revoke(self, session: SessionName, device: str) -> Revocation:
        """Make void what tokens the device has for the session now, in the log at once; also those
        of the next `CLOCK_SKEW_S`, as their issuer's clock may be ahead.

        Args:
            session: may have the beginning of names and "*" in place of a name: all sessions that
                there are, and those to come.

        Raises:
            UnknownSession: of a single one.
        """
        ...

    async def revocations(self, since_ms: int) -> tuple[list[Revocation], int]:
        """Of all sessions, from then on (by the store's clock), oldest first; and that clock, ms,
        before they were read."""
        ...

    async def append(
        self, session: SessionName, producer: Producer, ops: Sequence[bytes], takes: str = ""
    ) -> AppendResult:
        """Append a batch atomically. `takes`: what its ops take of the session's quotas, see
        `quota.slots`; empty: only their bytes."""
        ...


class Turns(Protocol):
    """What owners of turns do with sessions. A lease is renewed by every append, too."""

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
        """Claim the session for `turn` and append its first ops (user_message, turn_started).

        BUSY while another turn's lease holds. A known turn id appends nothing (`known`).
        turn_started carries epoch 1 on a first claim; every take-over counts up by one.
        `title` names a session that has no title yet. `digest` says what was asked for: the same
        id with another one is CONFLICT, for as long as the session lives. A turn whose owner let
        its lease run out is left to those who could go on with it for `abandon_s`. Others that
        wait come first; CANCELLED where the turn was stopped while it waited, REVOKED where the
        token is void that it is asked with.
        """
        ...

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
        """Where `turn` stands before it begins; OK and not known: it may begin now.

        Mode "join" gives it a place among those that wait, or keeps it: a place is lost that nobody
        names for WAITING_LEASE_S (FULL: too many wait). "leave" gives it up, "look" does nothing.
        """
        ...

    async def append_turn(
        self,
        session: SessionName,
        hold: TurnHold,
        first_seq: int,
        ops: Sequence[bytes],
        *,
        ends: bool = False,
    ) -> AppendResult:
        """Append a batch atomically; `first_seq` counts from 1 in each turn epoch.

        `ends` closes the turn and releases the session. STALE where `hold` holds no more.
        """
        ...

    async def take_over(
        self,
        session: SessionName,
        turn: str,
        lease_s: float,
        *,
        quiet_s: float = 0.0,
        from_epoch: int = 0,
    ) -> TurnClaim:
        """Raise a running turn's epoch by one: whoever held the old one is fenced off.

        MISSING where the turn does not run; with `quiet_s`, BUSY while its lease of
        `lease_s` holds and was renewed within so long: `lease_s` itself lets it run out. With
        `from_epoch`, BUSY where the turn has another epoch by now.
        """
        ...

    async def fence_turn(self, session: SessionName, turn: str) -> TurnClaim:
        """As `take_over`, without claiming the session: to end a turn that lost it to another one.

        BUSY where it has its session still.
        """
        ...

    async def renew_turn(
        self, session: SessionName, hold: TurnHold, lease_s: float
    ) -> AppendResult:
        """Extend the lease; also says whether a stop was requested."""
        ...

    async def release_turn(self, session: SessionName, hold: TurnHold) -> None:
        """Give the lease back: another owner may take the turn over at once."""
        ...

    async def request_stop(self, session: SessionName, turn: str = "") -> str:
        """Ask the running turn (or `turn`) to stop; returns its id, or "" where none runs."""
        ...


class Reading(Protocol):
    """What the reader and the hub need."""

    async def read(
        self,
        session: SessionName,
        after: Cursor,
        max_entries: int,
        max_bytes: int = READ_PAGE_BYTES,
        *,
        judged: bool = False,
    ) -> RawPage:
        """Entries after `after`, oldest first: at most so many, and so many bytes but for one.

        `judged`: `after` comes from elsewhere, and may be of a generation that lost entries.
        """
        ...

    async def tails(self, sessions: Sequence[SessionName]) -> list[LogTail | None]:
        """The tail of each session; None where there is no such session."""
        ...

    def changes(self, name: str) -> AbstractAsyncContextManager[Changes]:
        """A link for the listener `name`, which no other one may have."""

    async def deleted(self, sessions: Sequence[SessionName]) -> set[SessionName]:
        """Those that are not there because they were deleted lately."""
        ...

    async def mend(self, session: SessionName, state: SessionState) -> None:
        """Entries are gone from the store: go on behind them, from `state` of what is left, under
        the next generation. Nothing is done where none is missing, or one came meanwhile.

        A turn that is not in `state` counts as never begun, as after a fail-over that lost it; one
        that is there without an end has none.
        """
        ...

    async def restore(self, session: SessionName, state: SessionState) -> None:
        """What the store knew of the session besides its log is gone: make it anew of the log,
        folded. Until then no turn begins. Nothing is done where somebody did so before.
        """
        ...

    async def load_snapshot(self, session: SessionName) -> SessionState | None:
        """The last folded state, or None where the log is whole."""
        ...


class Fanout(Protocol):
    """What the publisher needs."""

    async def tails(self, sessions: Sequence[SessionName]) -> list[LogTail | None]: ...

    async def take_dirty(self, max_sessions: int, older_than_s: float) -> list[SessionName]:
        """Sessions appended to but not confirmed as published for `older_than_s`."""
        ...

    async def take_idle(self, max_sessions: int, idle_s: float) -> list[SessionName]:
        """Sessions that nobody appended to for `idle_s` and that are not dirty, each once."""
        ...

    async def mark_published(self, session: SessionName, cursor: Cursor) -> None:
        """The fan-out of everything up to `cursor` was handed to the broker."""
        ...

    async def agree_secret(self, ours: bytes) -> bytes:
        """The secret of all instances of this store: `ours`, where it has none."""
        ...


class Store(Sessions, Turns, Reading, Protocol):
    """All that a session log stands on."""

    @property
    def keeper(self) -> Keeping: ...

    @property
    def quotas(self) -> SessionQuotas: ...

    async def compact(
        self, session: SessionName, state: SessionState, keep_from: int, written: int
    ) -> None:
        """Store `state`, made of `written` bytes of ops, and drop entries with offset <
        `keep_from` (at most the state's offset + 1).

        Nothing is done for a state of another generation, or older than the one stored.
        """
        ...
