"""The claim of a session for a new turn: one turn at a time, others wait in order or are told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from segue_cloud.sessions.port import Status, TurnClaim
from segue_cloud.turns.gate import SessionGate
from segue_cloud.turns.opening import TurnRequest, opening_ops
from segue_cloud.turns.owner import OwnerDeps
from segue_contract.errors import DeadlineExceeded, SessionBusy
from segue_contract.ids import SessionName
from segue_contract.limits import TURN_LEASE_S, TURN_WAIT_TIMEOUT_S

# Another instance may hold the session: its end is not heard here, so look again this often.
_RETRY_S = 0.25


class SessionClaims:
    """Claims sessions for turns of this instance.

    Args:
        model: name written into turn_started.
        recover: finishes a turn of a session whose owner died, if there is one.
    """

    def __init__(
        self, deps: OwnerDeps, *, model: str, recover: Callable[[SessionName], Awaitable[bool]]
    ) -> None:
        self._deps = deps
        self._model = model
        self._recover = recover
        self._gate = SessionGate()

    def release(self, session: SessionName) -> None:
        """A turn of the session ended in this instance."""
        self._gate.release(session)

    async def claim(self, request: TurnRequest) -> TurnClaim:
        """Append user_message and turn_started once the session is free; a turn that is known
        already is said to be.

        Raises:
            SessionBusy, Overloaded, DeadlineExceeded, StoreUnavailable.
        """
        session = request.session
        if not request.wait and self._gate.waiting(session):
            raise _busy(session, "")
        claim = await self._try_claim(request)
        if claim.status is not Status.BUSY:
            return claim
        if not request.wait:
            raise _busy(session, claim.holder)
        try:
            async with (
                asyncio.timeout(TURN_WAIT_TIMEOUT_S),
                self._gate.pass_through(session) as ended,
            ):
                while True:
                    ended.clear()
                    claim = await self._try_claim(request)
                    if claim.status is not Status.BUSY:
                        return claim
                    try:
                        async with asyncio.timeout(_RETRY_S):
                            await ended.wait()
                    except TimeoutError:
                        continue
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"Session {session.session} was busy for {TURN_WAIT_TIMEOUT_S:.0f} s.",
                hint="Stop the running turn, or ask again.",
            ) from error

    async def _try_claim(self, request: TurnRequest) -> TurnClaim:
        # A turn whose owner died is finished first: the claim would only end it.
        await self._recover(request.session)
        ops = opening_ops(request, model=self._model, now_ms=self._deps.now_ms())
        return await self._deps.log.begin_turn(request.session, request.turn, ops, TURN_LEASE_S)


def _busy(session: SessionName, holder: str) -> SessionBusy:
    return SessionBusy(
        f"Session {session.session} has a running turn.",
        hint="Wait for it (when_busy='wait') or stop it.",
        turn=holder,
    )
