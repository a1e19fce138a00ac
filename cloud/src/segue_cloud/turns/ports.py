"""What a turn needs of the session log (implemented by `segue_cloud.sessions.log.SessionLog`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from segue_cloud.sessions.port import AppendResult, TurnClaim
from segue_contract.sync.state import SessionState


class TurnLog(Protocol):
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
    ) -> AppendResult: ...

    async def begin_turn(
        self, tenant: str, session: str, turn: str, ops: Sequence[bytes], lease_s: float
    ) -> TurnClaim: ...

    async def take_over(
        self, tenant: str, session: str, turn: str, lease_s: float, *, only_expired: bool = False
    ) -> TurnClaim: ...

    async def renew_turn(
        self, tenant: str, session: str, turn: str, epoch: int, lease_s: float
    ) -> AppendResult: ...

    async def state(self, tenant: str, session: str) -> SessionState: ...
