"""The claim of a session for a new turn: one turn at a time, others wait in order or are told.

The order is kept in the store, so it holds for newcomers and across instances: who waits names
itself now and then, and is told when its turn has come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import structlog

from segue_cloud.sessions.port import Status, TurnClaim
from segue_cloud.turns.opening import TurnRequest, opening_ops
from segue_cloud.turns.owner import OwnerDeps
from segue_cloud.turns.patience import done_within
from segue_cloud.turns.places import Places
from segue_cloud.turns.ports import RunningTurns
from segue_cloud.turns.prompts import prompt_begins
from segue_contract.errors import (
    DeadlineExceeded,
    Overloaded,
    QuotaExceeded,
    SegueError,
    SessionBusy,
    TurnCancelled,
    TurnConflict,
    UnknownSession,
)
from segue_contract.identity.rights import access_revoked
from segue_contract.ids import SessionName, TurnName
from segue_contract.limits import (
    MAX_TURNS_WAITING_PER_SESSION,
    ORPHAN_PATIENCE_S,
    TURN_WAIT_TIMEOUT_S,
    WAIT_POLL_LATER_S,
    WAIT_POLL_S,
    WAITING_TEXT_CHARS,
)
from segue_contract.sync.ops import Op, TurnWaiting, TurnWithdrawn

log = structlog.get_logger("segue.turns")


class SessionClaims:
    """Claims sessions for turns of this instance.

    Args:
        model, weights: name and digest written into turn_started.
        recover: finishes a turn of a session whose owner died, if there is one and room for it.
        overloaded: the error for a turn that finds no room.
        check_quota: raises QuotaExceeded where a turn's tenant may begin no more, for now.
    """

    def __init__(
        self,
        deps: OwnerDeps,
        places: Places,
        running: RunningTurns,
        *,
        model: str,
        weights: str,
        recover: Callable[[SessionName], Awaitable[bool]],
        overloaded: Callable[[], Overloaded],
        check_quota: Callable[[TurnName], None] = lambda turn: None,
    ) -> None:
        self._deps = deps
        self._places = places
        self._running = running
        self._model = model
        self._weights = weights
        self._recover = recover
        self._overloaded = overloaded
        self._check_quota = check_quota
        self._waiting: dict[SessionName, set[asyncio.Future[None]]] = {}

    @property
    def waiting(self) -> int:
        """Turns that wait here for their session."""
        return sum(len(some) for some in self._waiting.values())

    def wake(self, session: SessionName) -> None:
        """Something changed for those who wait here: a turn ended, or one of them was stopped."""
        for woken in self._waiting.get(session, ()):
            if not woken.done():
                woken.set_result(None)

    async def claim(self, request: TurnRequest) -> TurnClaim:
        """Append user_message and turn_started once the session is free; a turn that is known
        already is said to be. A turn that begins holds a place from then on.

        Raises:
            SessionBusy, Overloaded, QuotaExceeded, DeadlineExceeded, StoreUnavailable.
            TurnConflict: the id was used for something else.
            TurnCancelled: it was stopped while it waited.
            Revoked: its device was revoked meanwhile.
        """
        claim = await self._try(request)
        if claim.status is Status.OK:
            return claim
        if not request.wait:
            raise SessionBusy(
                f"Session {request.session.session} has a running turn.",
                hint="Wait for it (when_busy='wait') or stop it.",
                turn=claim.holder,
            )
        shown: list[bool] = []  # to the session's other devices
        try:
            return await self._wait(request, shown)
        except SegueError:  # where this instance closes, its place is kept for another one's call
            await self._leave(request)
            if any(shown):
                gone = TurnWithdrawn(id=f"{request.turn}.withdrawn", turn=request.turn)
                await self._note(request, gone)
            raise

    async def _try(self, request: TurnRequest) -> TurnClaim:
        """Begin the turn if its session is free and there is room: OK or BUSY."""
        name, digest = request.name, request.digest
        refused = self._refused(name)
        if refused is not None:
            claim = await self._stand(request, "look")
            if _checked(claim, request).status is Status.OK and not claim.known:
                raise refused
            return claim
        begun = False
        try:
            await self._running.name([request.session], self._deps.limits.lease_s)
            opening = await self._opening(request)
            claim = await self._deps.log.begin_turn(
                request.session,
                request.turn,
                opening,
                self._deps.limits.lease_s,
                digest=digest,
                abandon_s=ORPHAN_PATIENCE_S,
                bearer=request.bearer,
            )
            begun = claim.status is Status.OK and not claim.known
            return _checked(replace(claim, opening=opening) if begun else claim, request)
        finally:
            if not begun:
                self._places.give_back(name)

    def _refused(self, turn: TurnName) -> Overloaded | QuotaExceeded | None:
        """Why there is no place for the turn here; None: it has one now."""
        try:
            self._check_quota(turn)
        except QuotaExceeded as error:
            return error
        return None if self._places.take(turn) else self._overloaded()

    async def _opening(self, request: TurnRequest) -> tuple[Op, ...]:
        """The turn's first ops, with what the model will see, by the log as it is now."""
        state = await self._deps.log.state(request.session)
        earlier = [turn for turn in state.turns if turn.turn != request.turn]
        context_from = await prompt_begins(self._deps, earlier, request)
        return opening_ops(
            request,
            model=self._model,
            weights=self._weights,
            now_ms=self._deps.now_ms(),
            context_from=context_from,
        )

    async def _wait(self, request: TurnRequest, shown: list[bool]) -> TurnClaim:
        session = request.session
        waited_s = 0.0
        while waited_s < TURN_WAIT_TIMEOUT_S:
            woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(session, set()).add(woken)
            try:
                claim = await self._stand(request, "join")
                if _checked(claim, request).status is Status.OK:
                    if claim.known:
                        return claim
                    try:
                        claim = await self._try(request)
                    except (Overloaded, QuotaExceeded) as error:
                        # It keeps its place in the session until there is room here.
                        if "retry_after_s" not in error.fields:
                            raise
                    else:
                        if claim.status is Status.OK:
                            return claim
                elif claim.lease_left_s <= 0:  # the running turn's owner died
                    await self._recover(session)
                if not shown:
                    shown.append(await self._show_waiting(request))
                first = claim.status is Status.OK or claim.lease_left_s <= self._deps.limits.lease_s
                pause_s = WAIT_POLL_S if first else WAIT_POLL_LATER_S
                await done_within({woken}, pause_s, looks=1)
                waited_s += pause_s  # not by a clock: a process that was stopped has not waited
            finally:
                self._waiting[session].discard(woken)
                if not self._waiting[session]:
                    del self._waiting[session]
        raise DeadlineExceeded(
            f"Session {session.session} was busy for {TURN_WAIT_TIMEOUT_S:.0f} s.",
            hint="Stop the running turn, or ask again.",
        )

    async def _stand(self, request: TurnRequest, mode: str) -> TurnClaim:
        """Where the turn stands before it begins; `mode` as `wait_turn`."""
        return await self._deps.log.wait_turn(
            request.session,
            request.turn,
            request.digest,
            mode,
            abandon_s=ORPHAN_PATIENCE_S,
            bearer=request.bearer,
        )

    async def _show_waiting(self, request: TurnRequest) -> bool:
        """Show the message to the session's other devices; False where the log took it not."""
        said = TurnWaiting(
            id=f"{request.turn}.waiting",
            device=request.device,
            at_ms=self._deps.now_ms(),
            turn=request.turn,
            text=request.prompt[:WAITING_TEXT_CHARS],
        )
        return await self._note(request, said)

    async def _note(self, request: TurnRequest, op: TurnWaiting | TurnWithdrawn) -> bool:
        """False where the log took it not: the turn itself depends on none of it."""
        try:
            await self._deps.log.note(request.session, op)
        except SegueError as error:
            log.info("waiting_not_shown", turn=request.turn, error=str(error))
            return False
        return True

    async def _leave(self, request: TurnRequest) -> None:
        """Give the place in the session up; where the store is away it is lost by itself."""
        try:
            await self._stand(request, "leave")
        except SegueError:
            return


def _checked(claim: TurnClaim, request: TurnRequest) -> TurnClaim:
    """`claim`, OK or BUSY; what else the log says is raised."""
    session = request.session.session
    match claim.status:
        case Status.CONFLICT:
            raise TurnConflict(
                f"Turn {request.turn} of session {session} was asked for something else.",
                hint="Give each question an id of its own; the same id joins the same turn.",
                turn=request.turn,
            )
        case Status.CANCELLED:
            raise TurnCancelled(
                f"Turn {request.turn} was stopped while it waited for session {session}.",
                hint="Nothing of it is in the log; ask again under another id.",
                turn=request.turn,
            )
        case Status.REVOKED:
            raise access_revoked(session)
        case Status.FULL:
            raise Overloaded(
                f"{MAX_TURNS_WAITING_PER_SESSION} turns already wait for this session.",
                hint="Wait for the running reply, or stop it.",
                retry_after_s=1.0,
            )
        case Status.MISSING:
            raise UnknownSession(f"There is no session {session!r}.", hint="Open it first.")
    return claim
