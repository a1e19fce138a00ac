"""The store port: one fenced, idempotent, server-sequenced log per session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from segue_contract.sync.state import Cursor, SessionState


class Status(StrEnum):
    OK = "ok"
    DUP = "dup"  # these sequence numbers were taken already; `first_offset` is what they got then
    STALE = "stale"  # `current_epoch` holds now
    GAP = "gap"  # `expected_seq` is what the log waits for
    BUSY = "busy"  # another turn holds the session
    MISSING = "missing"  # no such session


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


@dataclass(frozen=True)
class StoredEntry:
    cursor: Cursor
    op: bytes


@dataclass(frozen=True)
class SessionSummary:
    session: str
    cursor: Cursor
    updated_ms: int
    title: str
    turns: int
    running_turn: str


class SessionStore(Protocol):
    """All methods raise StoreUnavailable when the store does not answer within its deadline.

    A call that raised may be repeated with the same arguments: every write is idempotent.
    """

    async def open_session(
        self, tenant: str, session: str, *, must_exist: bool = False, device: str = ""
    ) -> tuple[Cursor, bool]:
        """Tail and whether it was created; `device` becomes one of the session's devices.

        Raises:
            UnknownSession: `must_exist` and it is not there.
        """
        ...

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
        """Append a batch atomically. `first_seq` counts from 1 for each (producer, epoch).

        With `turn` the producer is that turn's decoder: `epoch` is the turn epoch, the turn's
        lease is renewed, and `ends_turn` releases the session.
        """
        ...

    async def begin_turn(
        self, tenant: str, session: str, turn: str, ops: Sequence[bytes], lease_s: float
    ) -> TurnClaim:
        """Claim the session for `turn` and append its first ops (user_message, turn_started).

        BUSY while another turn's lease holds. A known turn id appends nothing (`known`).
        turn_started carries epoch 1 on a first claim; every take-over counts up by one.
        """
        ...

    async def check_device(self, tenant: str, session: str, device: str) -> None:
        """See that `device` opened the session, and remember that it is in use.

        Of more than MAX_SESSION_DEVICES, those unused for longest are forgotten.

        Raises:
            UnknownSession.
            UnknownDevice: it never opened the session, or is forgotten.
        """
        ...

    async def take_over(
        self, tenant: str, session: str, turn: str, lease_s: float, *, only_expired: bool = False
    ) -> TurnClaim:
        """Raise a running turn's epoch by one: whoever held the old one is fenced off.

        MISSING where the turn does not run; with `only_expired`, BUSY while its lease holds.
        """
        ...

    async def fence_turn(self, tenant: str, session: str, turn: str) -> TurnClaim:
        """As `take_over`, without claiming the session: to end a turn whose owner is gone."""
        ...

    async def renew_turn(
        self, tenant: str, session: str, turn: str, epoch: int, lease_s: float
    ) -> AppendResult:
        """Extend the lease; also says whether a stop was requested."""
        ...

    async def request_stop(self, tenant: str, session: str, turn: str = "") -> str:
        """Ask the running turn (or `turn`) to stop; returns its id, or "" where none runs."""
        ...

    async def read(
        self, tenant: str, session: str, after: int, max_entries: int
    ) -> tuple[Cursor, list[StoredEntry]]:
        """Tail, and entries with offset > `after`, oldest first. May start later: see `compact`."""
        ...

    async def tails(self, sessions: Sequence[tuple[str, str]]) -> list[Cursor | None]:
        """The tail of each (tenant, session); None where there is no such session."""
        ...

    async def report_loss(self, tenant: str, session: str, known: Cursor) -> Cursor:
        """The log ends before `known`, which it once acknowledged: go on under generation + 1.

        Returns the tail. Raises UnknownSession.
        """
        ...

    async def load_snapshot(self, tenant: str, session: str) -> SessionState | None:
        """The last folded state, or None where the log is whole."""
        ...

    async def compact(self, tenant: str, session: str, state: SessionState, keep_from: int) -> None:
        """Store `state` and drop entries with offset < `keep_from` (<= the state's offset).

        Nothing is done for a state of another generation, or older than the one stored.
        """
        ...

    async def list_sessions(self, tenant: str, max_sessions: int) -> list[SessionSummary]:
        """Newest first."""
        ...

    async def take_dirty(self, max_sessions: int, older_than_s: float) -> list[tuple[str, str]]:
        """(tenant, session) appended to but not confirmed as published for `older_than_s`."""
        ...

    async def take_idle(self, max_sessions: int, idle_s: float) -> list[tuple[str, str]]:
        """(tenant, session) that nobody appended to for `idle_s`; each is handed out once."""
        ...

    async def mark_published(self, tenant: str, session: str, cursor: Cursor) -> None:
        """The fan-out of everything up to `cursor` was handed to the broker."""
        ...

    async def close(self) -> None: ...
