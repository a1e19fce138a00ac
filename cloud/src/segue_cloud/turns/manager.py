"""Begins turns, keeps the running ones, finds them for those who join."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import structlog

from segue_cloud.turns.claims import SessionClaims
from segue_cloud.turns.opening import TurnRequest, opening_ops
from segue_cloud.turns.owner import OwnerDeps, TurnOwner
from segue_cloud.turns.spec import OwnedTurn
from segue_cloud.turns.succession import Succession
from segue_cloud.turns.writer import TurnKey
from segue_contract.errors import EngineGone, Overloaded, SegueError
from segue_contract.ids import SessionName, TurnName
from segue_contract.limits import OPEN_TURN_TIMEOUT_S, SHUTDOWN_GRACE_S
from segue_contract.plan import Shape
from segue_contract.sync.ops import Op
from segue_contract.sync.state import Cursor, find_turn, heard

log = structlog.get_logger("segue.turns")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Begun:
    """`known`: this turn id began earlier; follow it instead of running it."""

    epoch: int
    cursor: Cursor
    known: bool
    ended: bool
    nonce: str = ""  # of the claim that began it
    opening: tuple[Op, ...] = ()


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
        self._succession = Succession(deps, self)
        self._claims = SessionClaims(deps, model=model, recover=self._succession.recover)
        self._owners: dict[TurnName, TurnOwner] = {}
        self._begun: dict[TurnName, Begun] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
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
            claim = await self._claims.claim(request)
        finally:
            self._admitted -= 1
        opening = opening_ops(request, model=self._model, now_ms=self._deps.now_ms())
        begun = Begun(claim.epoch, claim.cursor, claim.known, claim.ended, claim.nonce, opening)
        if not claim.known:
            self._begun[request.name] = begun
            if expect_open:
                self._spawn(self._run_if_unopened(request, begun), f"watch {request.turn}")
        return begun

    async def _known(self, request: TurnRequest) -> Begun | None:
        """A turn that runs here is joined, however full this instance is; others are admitted."""
        owner = self._owners.get(request.name)
        if owner is not None:
            return Begun(owner.spec.key.epoch, owner.spec.started, known=True, ended=False)
        try:
            self.admit()
        except Overloaded:
            state = await self._deps.log.state(request.session)
            turn = find_turn(state, request.turn)
            if turn is None:
                raise
            return Begun(turn.epoch, state.cursor, known=True, ended=turn.ended)
        return None

    def admit(self) -> None:
        """Raises Overloaded where the bound of turns is reached, EngineGone after the engine."""
        if self._deps.engine.died.is_set():
            raise EngineGone("The engine of this instance died.", hint="Another instance goes on.")
        busy = len(self._owners) + len(self._begun) + self._admitted
        if busy >= self._max_turns:
            stats = self._deps.engine.stats()
            raise Overloaded(
                f"This cloud already serves {busy} turns.",
                hint="Try again a little later.",
                retry_after_s=round(max(0.2, stats.queue_s), 3),
            )

    async def _run_if_unopened(self, request: TurnRequest, begun: Begun) -> None:
        await asyncio.sleep(OPEN_TURN_TIMEOUT_S)
        if request.name in self._begun:
            log.warning("turn_not_opened", session=request.session.session, turn=request.turn)
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
            state = await self._deps.log.state(request.session)
            earlier = [turn for turn in state.turns if turn.turn != request.turn]
            prompt = await asyncio.to_thread(
                self._deps.tokenizer.encode_conversation, heard(earlier), request.prompt
            )
        except BaseException:
            self._begun.pop(request.name, None)  # its lease runs out, and `recover` finds it
            raise
        return self.start(
            OwnedTurn(
                key=TurnKey(
                    request.session, request.turn, begun.epoch, request.device, begun.nonce
                ),
                prompt=tuple(prompt),
                max_tokens=request.max_tokens,
                sampling=request.sampling,
                stop=request.stop,
                shape=Shape.TEXT,
                started=begun.cursor,
                opening=begun.opening,
            )
        )

    def open(self, spec: OwnedTurn) -> tuple[TurnOwner, bool]:
        """Own a turn that an edge opens; True where it was running here already.

        Raises:
            Overloaded: the turn did not begin here, and there is no room for it.
        """
        running = self._owners.get(spec.key.name)
        if running is not None:
            return running, True
        begun = self._begun.get(spec.key.name)
        if begun is None:
            self.admit()
        elif begun.epoch == spec.key.epoch:
            key = replace(spec.key, nonce=begun.nonce)
            spec = replace(spec, key=key, started=begun.cursor, opening=begun.opening)
        return self.start(spec), False

    def start(self, spec: OwnedTurn) -> TurnOwner:
        """Own `spec` from now on; a turn that runs here already stays with its owner."""
        key = spec.key.name
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
            self._claims.release(key.session)

    # -- finding -------------------------------------------------------------------------------

    def owned(self, session: SessionName, turn: str) -> TurnOwner | None:
        return self._owners.get(TurnName(session, turn))

    def knows(self, session: SessionName, turn: str) -> bool:
        """The turn runs here, or is about to."""
        name = TurnName(session, turn)
        return name in self._owners or name in self._begun

    def stop(self, session: SessionName, turn: str) -> None:
        """At once, if the turn runs here; the log's stop mark reaches it wherever it runs."""
        owner = self._owners.get(TurnName(session, turn))
        if owner is not None:
            owner.stop()

    async def take_over(
        self, spec: OwnedTurn, known_tokens: tuple[int, ...]
    ) -> tuple[TurnOwner, bool]:
        """As `Succession.take_over`."""
        return await self._succession.take_over(spec, known_tokens)

    async def recover(self, session: SessionName) -> bool:
        """As `Succession.recover`."""
        return await self._succession.recover(session)

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
