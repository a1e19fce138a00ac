"""The part of the store port for sessions as wholes: listed, deleted, made of an export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from segue_contract.ids import SessionName
from segue_contract.sync.state import Cursor, SessionState


@dataclass(frozen=True)
class SessionSummary:
    session: str
    cursor: Cursor
    updated_ms: int
    title: str
    turns: int
    running_turn: str


class Deleted(StrEnum):
    YES = "yes"
    MISSING = "missing"  # there is no session of that name
    USED = "used"  # somebody used it lately


@dataclass(frozen=True)
class SessionImport:
    """A session that is to be made as a whole.

    `ops`: its entries, from the offset `first` up to `tail`; `state`: what the snapshot key holds
    ("<generation> <offset>\\n" and the encoded state at `folded`), empty where there is none.
    `session`: all of it, folded, its turns ended.
    """

    generation: int
    first: int
    ops: Sequence[bytes]
    folded: int
    state: bytes
    session: SessionState
    title: str

    @property
    def tail(self) -> int:
        return self.first + len(self.ops) - 1


Shown = Callable[[str], bool]


def all_shown(session: str) -> bool:
    return True


class Keeping(Protocol):
    """Sessions as wholes."""

    async def list_sessions(
        self, tenant: str, max_sessions: int, after: str = "", shown: Shown = all_shown
    ) -> tuple[list[SessionSummary], str]:
        """A page of sessions, newest first, and the place where the next page begins ("": none).

        One that is written to meanwhile moves to the front: it may come twice, or have been there.
        `shown` says of a name whether it is on the list: a place names no other. A page may have
        none of them, and the next ones more: of some, `LIST_LOOKED` are looked at for one page.

        Raises:
            InvalidArgument: `after` is no such place.
        """
        ...

    async def count(self, tenant: str) -> int:
        """The tenant's sessions."""
        ...

    async def summary(self, session: SessionName) -> SessionSummary | None: ...

    async def delete(self, session: SessionName, idle_s: float | None = None) -> Deleted:
        """All keys of it, and its name in the lists; with `idle_s`, only if nobody wrote to it,
        opened or used it for so long.

        Raises:
            SessionBusy: a turn runs in it.
        """
        ...

    async def oldest(self, tenant: str, idle_s: float, most: int) -> list[SessionName]:
        """Sessions that `delete` may find idle, the oldest first."""
        ...

    async def postpone(self, session: SessionName) -> None:
        """It is in use: among the `oldest` it comes last."""
        ...

    async def latest_generation(self, session: SessionName) -> int:
        """No log of that name had a later one, and no clock is behind it."""
        ...

    async def make(self, session: SessionName, made: SessionImport, nonce: str) -> Cursor:
        """Write all of it where nobody looks, then let it be the session, at once.

        Raises:
            SessionNotEmpty: there is a session of that name with entries.
            SessionBusy: one was opened meanwhile, so that the generation is no later one.
        """
        ...
