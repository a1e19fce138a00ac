"""Begins turns, keeps the running ones, finds them for those who join, finishes orphans."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import structlog

from segue_cloud.sessions.port import Status, TurnClaim
from segue_cloud.turns.gate import SessionGate
from segue_cloud.turns.owner import OwnerDeps, TurnOwner
from segue_cloud.turns.spec import OwnedTurn
from segue_cloud.turns.writer import TurnKey
from segue_contract.errors import (
    DeadlineExceeded,
    Overloaded,
    SegueError,
    SessionBusy,
    UnknownTurn,
)
from segue_contract.limits import (
    OPEN_TURN_TIMEOUT_S,
    SHUTDOWN_GRACE_S,
    TURN_LEASE_S,
    TURN_WAIT_TIMEOUT_S,
)
from segue_contract.plan import Shape
from segue_contract.sync.ops import Op, Sampling, TurnStarted, UserMessage, encode_op
from segue_contract.sync.state import Cursor, SessionState, TurnState, heard

log = structlog.get_logger("segue.turns")

# Another instance may hold the session: its end is not heard here, so look again this often.
_RETRY_S = 0.25


TurnName = tuple[str, str, str]  # tenant, session, turn
_T = TypeVar("_T")


@dataclass(frozen=True)
class TurnRequest:
    """What a device asked for, checked."""

    tenant: str
    session: str
    device: str
    turn: str
    prompt: str
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    wait: bool = True

    @property
    def key(self) -> TurnName:
        return self.tenant, self.session, self.turn


@dataclass(frozen=True)
class Begun:
    """`known`: this turn id began earlier; follow it instead of running it."""

    epoch: int
    cursor: Cursor
    known: bool
    ended: bool


class TurnManager:
    """All turns that this process owns.

    Args:
        model: name written into turn_started.
        max_turns: turns begun and not ended, beyond which `begin` refuses.
    """

    def __init__(self, deps: OwnerDeps, *, model: str, max_turns: int) -> None:
        self._deps = deps
        self._model = model
        self._max_turns = max_turns
        self._gate = SessionGate()
        self._owners: dict[TurnName, TurnOwner] = {}
        self._begun: dict[TurnName, TurnRequest] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._hands: WeakValueDictionary[TurnName, asyncio.Lock] = WeakValueDictionary()
        self._admitted = 0

    @property
    def running(self) -> int:
        return len(self._owners)

    # -- beginning -----------------------------------------------------------------------------

    async def begin(self, request: TurnRequest, *, expect_open: bool) -> Begun:
        """Claim the session and append user_message and turn_started.

        With `expect_open` an edge will open the turn; if it does not within
        `OPEN_TURN_TIMEOUT_S`, this instance runs the turn by itself.

        Raises:
            Overloaded, SessionBusy, DeadlineExceeded, StoreUnavailable.
        """
        known = await self._known(request)
        if known is not None:
            return known
        self._admitted += 1
        try:
            claim = await self._claim(request)
        finally:
            self._admitted -= 1
        begun = Begun(claim.epoch, claim.cursor, claim.known, claim.ended)
        if not claim.known:
            self._begun[request.key] = request
            if expect_open:
                self._spawn(self._run_if_unopened(request, begun), f"watch {request.turn}")
        return begun

    async def _known(self, request: TurnRequest) -> Begun | None:
        """A turn that runs here is joined, however full this instance is; others are admitted."""
        owner = self._owners.get(request.key)
        if owner is not None:
            cursor = Cursor(0, owner.spec.started_offset)
            return Begun(owner.spec.key.epoch, cursor, known=True, ended=False)
        try:
            self.admit()
        except Overloaded:
            state = await self._deps.log.state(request.tenant, request.session)
            turn = find_turn(state, request.turn)
            if turn is None:
                raise
            return Begun(turn.epoch, state.cursor, known=True, ended=turn.ended)
        return None

    def admit(self) -> None:
        """Raises Overloaded where the bound of turns is reached."""
        busy = len(self._owners) + len(self._begun) + self._admitted
        if busy >= self._max_turns:
            stats = self._deps.engine.stats()
            raise Overloaded(
                f"This cloud already serves {busy} turns.",
                hint="Try again a little later.",
                retry_after_s=round(max(0.2, stats.queue_s), 3),
            )

    async def _claim(self, request: TurnRequest) -> TurnClaim:
        key = (request.tenant, request.session)
        if not request.wait and self._gate.waiting(key):
            raise _busy(request.session, "")
        claim = await self._try_claim(request)
        if claim.status is not Status.BUSY:
            return claim
        if not request.wait:
            raise _busy(request.session, claim.holder)
        try:
            async with asyncio.timeout(TURN_WAIT_TIMEOUT_S), self._gate.pass_through(key) as ended:
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
                f"Session {request.session} was busy for {TURN_WAIT_TIMEOUT_S:.0f} s.",
                hint="Stop the running turn, or ask again.",
            ) from error

    async def _try_claim(self, request: TurnRequest) -> TurnClaim:
        # A turn whose owner died is finished first: the claim would only end it.
        await self.recover(request.tenant, request.session)
        now = self._deps.now_ms()
        ops: list[Op] = [
            UserMessage(
                id=f"{request.turn}.user",
                device=request.device,
                at_ms=now,
                turn=request.turn,
                text=request.prompt,
            ),
            TurnStarted(
                id=f"{request.turn}.started",
                device=request.device,
                at_ms=now,
                turn=request.turn,
                epoch=1,
                model=self._model,
                max_tokens=request.max_tokens,
                sampling=request.sampling,
                stop=request.stop,
            ),
        ]
        return await self._deps.log.begin_turn(
            request.tenant,
            request.session,
            request.turn,
            [encode_op(op) for op in ops],
            TURN_LEASE_S,
        )

    async def _run_if_unopened(self, request: TurnRequest, begun: Begun) -> None:
        await asyncio.sleep(OPEN_TURN_TIMEOUT_S)
        if request.key in self._begun:
            log.warning("turn_not_opened", session=request.session, turn=request.turn)
            await self._run_here(request, begun)

    # -- running -------------------------------------------------------------------------------

    async def run(self, request: TurnRequest) -> tuple[Begun, TurnOwner | None]:
        """Begin a turn and run it here, without an edge; no owner where the turn was known.

        A caller that is cancelled leaves the turn running: a disconnect never cancels.

        Raises:
            As `begin`.
        """
        running = self._spawn(self._begin_and_run(request), f"begin {request.turn}")
        return await asyncio.shield(running)

    async def _begin_and_run(self, request: TurnRequest) -> tuple[Begun, TurnOwner | None]:
        begun = await self.begin(request, expect_open=False)
        return begun, None if begun.known else await self._run_here(request, begun)

    async def _run_here(self, request: TurnRequest, begun: Begun) -> TurnOwner:
        """Tokenize, prefill and decode a begun turn in this instance."""
        try:
            state = await self._deps.log.state(request.tenant, request.session)
            earlier = [turn for turn in state.turns if turn.turn != request.turn]
            prompt = await asyncio.to_thread(
                self._deps.tokenizer.encode_conversation, heard(earlier), request.prompt
            )
        except BaseException:
            self._begun.pop(request.key, None)  # its lease runs out, and `recover` finds it
            raise
        return self.start(
            OwnedTurn(
                key=TurnKey(
                    request.tenant, request.session, request.turn, begun.epoch, request.device
                ),
                prompt=tuple(prompt),
                max_tokens=request.max_tokens,
                sampling=request.sampling,
                stop=request.stop,
                shape=Shape.TEXT,
                started_offset=begun.cursor.offset,
            )
        )

    def open(self, spec: OwnedTurn) -> tuple[TurnOwner, bool]:
        """Own a turn that an edge opens; True where it was running here already.

        Raises:
            Overloaded: the turn did not begin here, and there is no room for it.
        """
        key = (spec.key.tenant, spec.key.session, spec.key.turn)
        running = self._owners.get(key)
        if running is not None:
            return running, True
        if key not in self._begun:
            self.admit()
        return self.start(spec), False

    def start(self, spec: OwnedTurn) -> TurnOwner:
        """Own `spec` from now on; a turn that runs here already stays with its owner."""
        key = (spec.key.tenant, spec.key.session, spec.key.turn)
        known = self._owners.get(key)
        if known is not None:
            return known
        owner = TurnOwner(spec, self._deps)
        self._owners[key] = owner
        self._begun.pop(key, None)
        self._spawn(self._run(key, owner), f"turn {spec.key.turn}")
        return owner

    async def _run(self, key: TurnName, owner: TurnOwner) -> None:
        try:
            await owner.run()
        finally:
            if self._owners.get(key) is owner:
                del self._owners[key]
            self._gate.release(key[:2])

    # -- finding -------------------------------------------------------------------------------

    def owned(self, tenant: str, session: str, turn: str) -> TurnOwner | None:
        return self._owners.get((tenant, session, turn))

    def knows(self, tenant: str, session: str, turn: str) -> bool:
        """The turn runs here, or is about to."""
        return (tenant, session, turn) in self._owners or (tenant, session, turn) in self._begun

    def stop(self, tenant: str, session: str, turn: str) -> None:
        """At once, if the turn runs here; the log's stop mark reaches it wherever it runs."""
        owner = self._owners.get((tenant, session, turn))
        if owner is not None:
            owner.stop()

    async def take_over(
        self, spec_of: OwnedTurn, known_tokens: tuple[int, ...]
    ) -> tuple[TurnOwner, bool]:
        """Own a turn whose decoder is gone: epoch + 1, from the first token that is not durable.

        Returns the owner and whether it was running here already (then nothing changed hands).

        Raises:
            UnknownTurn: the log has no such turn, or it has ended.
            Overloaded: there is no room for it here.
        """
        key = spec_of.key
        async with self._changing_hands(key.tenant, key.session, key.turn):
            running = self.owned(key.tenant, key.session, key.turn)
            if running is not None:
                return running, True
            if (key.tenant, key.session, key.turn) not in self._begun:
                self.admit()
            claim = await self._deps.log.take_over(key.tenant, key.session, key.turn, TURN_LEASE_S)
            state = await self._deps.log.state(key.tenant, key.session)
            turn = find_turn(state, key.turn)
            if turn is None or claim.status is not Status.OK:
                raise UnknownTurn(
                    f"Turn {key.turn} does not run in session {key.session}.",
                    hint="Read the session's log: the turn may have ended.",
                )
            durable = tuple(turn.tokens)
            adopted: tuple[int, ...] = ()
            if known_tokens[: len(durable)] == durable:
                adopted = known_tokens[len(durable) :]
            return self.start(_resumed(spec_of, claim, turn, adopted)), False

    def _changing_hands(self, tenant: str, session: str, turn: str) -> asyncio.Lock:
        """Held while a turn's epoch is raised and its owner made: two at once would fence off
        each other and leave the turn to nobody."""
        return self._hands.setdefault((tenant, session, turn), asyncio.Lock())

    async def recover(self, tenant: str, session: str) -> bool:
        """Finish a turn whose decoder and edge are both gone; True where one was found.

        Its lease must have run out: `take_over` refuses while somebody renews it.
        """
        state = await self._deps.log.state(tenant, session)
        for position, turn in enumerate(state.turns):
            key = (tenant, session, turn.turn)
            if turn.ended or key in self._owners or key in self._begun:
                continue
            async with self._changing_hands(*key):
                if key not in self._owners and await self._finish_orphan(tenant, session, position):
                    return True
        return False

    async def _finish_orphan(self, tenant: str, session: str, position: int) -> bool:
        state = await self._deps.log.state(tenant, session)
        name = state.turns[position].turn
        claim = await self._deps.log.take_over(
            tenant, session, name, TURN_LEASE_S, only_expired=True
        )
        if claim.status is not Status.OK:
            return False
        state = await self._deps.log.state(tenant, session)  # with all that the old owner wrote
        turn = state.turns[position]
        prompt = await asyncio.to_thread(
            self._deps.tokenizer.encode_conversation, heard(state.turns[:position]), turn.prompt
        )
        spec = OwnedTurn(
            key=TurnKey(tenant, session, name, claim.epoch, turn.device),
            prompt=tuple(prompt),
            max_tokens=turn.max_tokens,
            sampling=turn.sampling,
            stop=turn.stop,
            shape=Shape.TEXT,
        )
        log.info("turn_recovered", session=session, turn=name, epoch=claim.epoch)
        self.start(_resumed(spec, claim, turn, ()))
        return True

    # -- ending --------------------------------------------------------------------------------

    async def close(self) -> None:
        """Let running turns end within the grace period, then leave them to whoever takes over."""
        owners = list(self._owners.values())
        try:
            async with asyncio.timeout(SHUTDOWN_GRACE_S / 2):
                await asyncio.gather(*(owner.ended.wait() for owner in owners))
        except TimeoutError:
            log.warning("turns_left_running", turns=len(self._owners))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, coroutine: Coroutine[Any, Any, _T], name: str) -> asyncio.Task[_T]:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            error = task.exception()
            level = log.warning if isinstance(error, SegueError) else log.error
            level("turn_task_failed", task=task.get_name(), error=repr(error))


def find_turn(state: SessionState, turn: str) -> TurnState | None:
    return next((known for known in reversed(state.turns) if known.turn == turn), None)


def _resumed(
    spec: OwnedTurn, claim: TurnClaim, turn: TurnState, adopted: tuple[int, ...]
) -> OwnedTurn:
    return OwnedTurn(
        key=TurnKey(spec.key.tenant, spec.key.session, spec.key.turn, claim.epoch, spec.key.device),
        prompt=spec.prompt,
        max_tokens=spec.max_tokens,
        sampling=spec.sampling,
        stop=spec.stop,
        shape=spec.shape,
        blocks=spec.blocks,
        ship_blocks=spec.ship_blocks,
        made=tuple(turn.tokens),
        made_pieces=tuple(turn.pieces),
        adopted=adopted,
        edge_cached_tokens=spec.edge_cached_tokens,
        has_edge=spec.has_edge,
        started_offset=claim.cursor.offset,
    )


def _busy(session: str, holder: str) -> SessionBusy:
    return SessionBusy(
        f"Session {session} has a running turn.",
        hint="Wait for it (when_busy='wait') or stop it.",
        turn=holder,
    )
