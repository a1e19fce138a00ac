"""What a turn needs of the session log (implemented by `segue_cloud.log.SessionLog`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from segue_cloud.sessions.port import AppendResult, Bearer, TurnClaim, TurnHold
from segue_contract.ids import SessionName
from segue_contract.sync.ops import Op, TurnWaiting, TurnWithdrawn
from segue_contract.sync.state import SessionState


class TurnLog(Protocol):
    async def begin_turn(
        self,
        session: SessionName,
        turn: str,
        ops: Sequence[Op],
        lease_s: float,
        *,
        digest: str = "",
        abandon_s: float = 0.0,
        bearer: Bearer | None = None,
    ) -> TurnClaim: ...

    async def wait_turn(
        self,
        session: SessionName,
        turn: str,
        digest: str,
        mode: str,
        *,
        abandon_s: float = 0.0,
        bearer: Bearer | None = None,
    ) -> TurnClaim: ...

    async def end_abandoned(self, session: SessionName, turn: str) -> None: ...

    async def note(self, session: SessionName, op: TurnWaiting | TurnWithdrawn) -> None: ...

    async def take_over(
        self,
        session: SessionName,
        turn: str,
        lease_s: float,
        *,
        quiet_s: float = 0.0,
        from_epoch: int = 0,
    ) -> TurnClaim: ...

    async def append_turn(
        self,
        session: SessionName,
        hold: TurnHold,
        first_seq: int,
        ops: Sequence[Op],
        *,
        ends: bool = False,
    ) -> AppendResult: ...

    async def renew_turn(
        self, session: SessionName, hold: TurnHold, lease_s: float
    ) -> AppendResult: ...

    async def release_turn(self, session: SessionName, hold: TurnHold) -> None: ...

    async def state(self, session: SessionName) -> SessionState: ...


class RunningTurns(Protocol):
    """As `segue_cloud.sessions.running.RunningTurns`."""

    async def name(self, sessions: Sequence[SessionName], look_in_s: float) -> None: ...

    async def due(self, most: int) -> list[SessionName]: ...
