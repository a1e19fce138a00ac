"""The part of the store port that tells of tails: where a log ends, and that it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from segue_contract.ids import SessionName
from segue_contract.sync.state import Cursor


@dataclass(frozen=True)
class LogTail:
    """How far a log goes. `digest`: of all its ops up to there, b"" where it is not known."""

    cursor: Cursor
    digest: bytes = b""


@dataclass(frozen=True)
class TailTold:
    """The session's log goes up to `tail` now."""

    session: SessionName
    tail: LogTail


@dataclass(frozen=True)
class Watched:
    """From here on every change of the session's tail is told."""

    session: SessionName


@dataclass(frozen=True)
class Beat:
    """What was told before `number` was sent has been heard."""

    number: int


class Changes(Protocol):
    """A link over which the store tells of tails as they change, each after the one before.

    It does not heal: whoever had it connects anew, and looks up what changed meanwhile.
    All methods raise StoreUnavailable where it is lost.
    """

    async def watch(self, sessions: Sequence[SessionName]) -> None:
        """Ask to be told of these; `next` says of each when that begins."""
        ...

    async def forget(self, sessions: Sequence[SessionName]) -> None: ...

    async def beat(self, number: int) -> None:
        """Say something on the way of all writers, to hear it here."""
        ...

    async def next(self) -> TailTold | Watched | Beat:
        """The next news; waits as long as there is none."""
        ...
