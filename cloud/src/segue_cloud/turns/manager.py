"""Begins turns, keeps the running ones, finds them for those who join."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import structlog

from segue_cloud.sessions.port import TurnHold
from segue_cloud.tenants.usage import TenantUsage, unlimited
from segue_cloud.turns.claims import SessionClaims
from segue_cloud.turns.opening import TurnRequest
from segue_cloud.turns.owner import OwnerDeps, TurnOwner
from segue_cloud.turns.places import Places
from segue_cloud.turns.ports import RunningTurns
from segue_cloud.turns.prompts import encode_prompt
from segue_cloud.turns.spec import OwnedTurn
from segue_cloud.turns.takeover import Takeover
from segue_cloud.turns.writer import TurnKey
from segue_contract.errors import (
    EngineGone,
    Overloaded,
    SegueError,
    StaleEpoch,
    StoreUnavailable,
    Unreachable,
)
from segue_contract.ids import SessionName, TurnName
from segue_contract.limits import (
    LOST_OWNER_LOOKS,
    LOST_OWNER_PAUSE_S,
    PLACE_RETRY_MAX_S,
    RELEASE_TIMEOUT_S,
    TurnLimits,
)
from segue_contract.plan import Shape
from segue_contract.sync.ops import Op, TurnStarted
from segue_contract.sync.state import Cursor

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

    @property
    def context_from(self) -> str:
        """Id of the first turn that the model sees; empty: all."""
        started = (op for op in self.opening if isinstance(op, TurnStarted))
        return next((op.context_from for op in started), "")


class TurnManager:
    """All turns that this process owns.

    Args:
        model, weights: name and digest written into turn_started.
        max_turns: turns begun and not ended, beyond which `begin` refuses.
        usage: what tenants may have, and use; without it they have no quotas, and equal weights.

    Attributes:
        leaving: set once this instance is being stopped.
    """

    def __init__(
        self,
        deps: OwnerDeps,
        running: RunningTurns,
        *,
        model: str,
        max_turns: int,
        weights: str = "",
        usage: TenantUsage | None = None,
    ) -> None:
        self._deps = deps
        self._running = running
        self._usage = usage or unlimited(deps.monotonic)
        self.places = Places(max_turns, self._usage.weight, deps.monotonic)
        self._takeover = Takeover(deps, self, self.places, running, model=model, usage=self._usage)
        self._claims = SessionClaims(
            deps,
            self.places,
            running,
            model=model,
            weights=weights,
            recover=self._takeover.recover,
            overloaded=self._overloaded,
            check_quota=self._check_quota,
        )
        self._owners: dict[TurnName, TurnOwner] = {}
        self._begun: dict[TurnName, Begun] = {}
        self._beginning: dict[TurnName, tuple[str, asyncio.Task[Begun]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.leaving = asyncio.Event()

    @property
    def limits(self) -> TurnLimits:
        return self._deps.limits

    @property
    def running(self) -> int:
        return len(self._owners)

    @property
    def waiting(self) -> int:
        """Turns that wait here for their session; they hold no place."""
        return self._claims.waiting

    @property
    def room(self) -> int:
        """How many turns more this instance would take."""
        return 0 if self.leaving.is_set() or self._deps.engine.died.is_set() else self.places.free

    # -- beginning -----------------------------------------------------------------------------

    async def begin(self, request: TurnRequest, *, expect_open: bool) -> Begun:
        """Claim the session and append user_message and turn_started.

        With `expect_open` an edge will open the turn; if it does not within
        `open_timeout_s`, this instance runs the turn by itself. A caller that is cancelled
        leaves the turn to begin: `StopTurn` takes it back, a disconnect does not.

        Raises:
            Overloaded, SessionBusy, DeadlineExceeded, StoreUnavailable, TurnConflict,
            TurnCancelled, Revoked.
            QuotaExceeded: its tenant has too many turns or tokens; nothing was written.
        """
        self._check_serving()
        under_way = self._beginning.get(request.name)
        if under_way is not None and under_way[0] == request.digest:
            return replace(await asyncio.shield(under_way[1]), known=True)
        beginning = self._spawn(self._begin(request, expect_open), f"begin {request.turn}")
        if under_way is None:
            self._beginning[request.name] = request.digest, beginning
            beginning.add_done_callback(lambda _: self._beginning.pop(request.name, None))
        return await asyncio.shield(beginning)

    async def _begin(self, request: TurnRequest, expect_open: bool) -> Begun:
        claim = await self._claims.claim(request)
        begun = Begun(
            claim.epoch, claim.cursor, claim.known, claim.ended, claim.nonce, claim.opening
        )
        if not claim.known:
            self._begun[request.name] = begun
            if expect_open:
                self._spawn(self._run_if_unopened(request, begun), f"watch {request.turn}")
        return begun

    def admit(self, turn: TurnName) -> None:
        """A place for `turn`. Raises Overloaded where none is left, EngineGone after the engine."""
        self._check_serving()
        if not self.places.take(turn):
            raise self._overloaded()

    def _check_quota(self, turn: TurnName) -> None:
        """Raises QuotaExceeded where its tenant may begin no more, for now."""
        if not self.places.holds(turn):
            tenant = turn.session.tenant
            self._usage.turn(tenant, self.places.of(tenant))

    def _check_serving(self) -> None:
        if self._deps.engine.died.is_set():
            raise EngineGone("The engine of this instance died.", hint="Another instance goes on.")
        if self.leaving.is_set():
            raise Unreachable("This cloud is shutting down.", hint="Another instance goes on.")

    def _overloaded(self) -> Overloaded:
        stats = self._deps.engine.stats()
        return Overloaded(
            f"This cloud already serves {self.places.held} turns.",
            hint="Try again a little later.",
            retry_after_s=round(min(max(0.2, stats.queue_s), PLACE_RETRY_MAX_S), 3),
        )

    async def _run_if_unopened(self, request: TurnRequest, begun: Begun) -> None:
        """Hold a turn for the edge that began it, for a while."""
        hold = TurnHold(request.turn, begun.epoch, begun.nonce)
        limits = self.limits
        looks = max(1, math.ceil(limits.open_timeout_s / limits.renew_s))
        for _ in range(looks):
            await asyncio.sleep(limits.open_timeout_s / looks)
            if request.name not in self._begun:
                return
            with contextlib.suppress(StoreUnavailable):
                await self._deps.log.renew_turn(request.session, hold, limits.lease_s)
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
            prompt = await encode_prompt(
                self._deps, earlier, request.turn, request.prompt, begun.context_from
            )
        except BaseException:
            # Its lease runs out, and `recover` finds it.
            self._begun.pop(request.name, None)
            if request.name not in self._owners:
                self.places.give_back(request.name)
            raise
        return self.start(
            OwnedTurn(
                key=TurnKey(
                    request.session, request.turn, begun.epoch, request.device, begun.nonce
                ),
                prompt=prompt,
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
            StaleEpoch: it did not begin here under this epoch; it can be taken over.
        """
        self._check_serving()
        running = self._owners.get(spec.key.name)
        if running is not None:
            return running, True
        begun = self._begun.get(spec.key.name)
        if begun is None or begun.epoch != spec.key.epoch:
            raise StaleEpoch(
                f"Turn {spec.key.turn} did not begin at this instance under epoch "
                f"{spec.key.epoch}.",
                hint="Take it over.",
                current=0 if begun is None else begun.epoch,
            )
        key = replace(spec.key, nonce=begun.nonce)
        return self.start(
            replace(spec, key=key, started=begun.cursor, opening=begun.opening)
        ), False

    def start(self, spec: OwnedTurn) -> TurnOwner:
        """Own `spec` from now on; a turn that runs here already stays with its owner."""
        key = spec.key.name
        known = self._owners.get(key)
        if known is not None:
            return known
        owner = TurnOwner(spec, self._deps)
        self._usage.computed(spec.key.session.tenant, len(spec.prompt))
        self._owners[key] = owner
        self._begun.pop(key, None)
        self._spawn(self._run(key, owner), f"turn {spec.key.turn}")
        return owner

    async def _run(self, key: TurnName, owner: TurnOwner) -> None:
        try:
            await owner.run()
        finally:
            made = owner.next_index - len(owner.spec.made)
            self._usage.computed(key.session.tenant, made)
            if self._owners.get(key) is owner:
                del self._owners[key]
                self.places.give_back(key)
            self._claims.wake(key.session)

    # -- finding -------------------------------------------------------------------------------

    def owned(self, session: SessionName, turn: str) -> TurnOwner | None:
        return self._owners.get(TurnName(session, turn))

    def knows(self, session: SessionName, turn: str) -> bool:
        """The turn runs here, or is about to."""
        name = TurnName(session, turn)
        return name in self._owners or name in self._begun

    def stalled(self, session: SessionName, turn: str) -> bool:
        """The turn runs here, and waits for an engine that hangs."""
        owner = self.owned(session, turn)
        return owner is not None and owner.stalled

    def stop(self, session: SessionName, turn: str) -> None:
        """At once, if the turn runs here; the log's stop mark reaches it wherever it runs."""
        owner = self._owners.get(TurnName(session, turn))
        if owner is not None:
            owner.stop()
        else:
            self._claims.wake(session)

    async def take_over(
        self, spec: OwnedTurn, known_tokens: tuple[int, ...]
    ) -> tuple[TurnOwner, bool]:
        """As `Takeover.take_over`."""
        return await self._takeover.take_over(spec, known_tokens)

    async def prepare(
        self, session: SessionName, turn: str, *, leaving: bool, edge: str = ""
    ) -> bool:
        """As `Takeover.prepare`; a caller that is cancelled leaves it to its end.

        Raises:
            Overloaded, EngineGone, Unreachable: it cannot be taken over here.
        """
        self._check_serving()
        work = self._takeover.prepare(TurnName(session, turn), leaving=leaving, edge=edge)
        preparing = self._spawn(work, f"prepare {turn}")
        return await asyncio.shield(preparing)

    async def recover(self, session: SessionName) -> bool:
        """As `Takeover.recover`."""
        if self.leaving.is_set():
            return False
        return await self._takeover.recover(session)

    async def succeed(self, session: SessionName, turn: str) -> None:
        """A reader of the turn lost its owner: look whether this one is silent to the log as well,
        and go on here then, before its lease has run out; at once where that owner leaves."""
        if self.leaving.is_set() or await self._takeover.go_on(TurnName(session, turn)):
            return
        self._spawn(self._succeed(session, turn), f"succeed {turn}")

    async def _succeed(self, session: SessionName, turn: str) -> None:
        for _ in range(LOST_OWNER_LOOKS):
            if self.leaving.is_set() or self.knows(session, turn):
                return
            await self._takeover.recover(session, self.limits.lost_owner_quiet_s)
            await asyncio.sleep(LOST_OWNER_PAUSE_S)

    # -- ending --------------------------------------------------------------------------------

    async def name_running(self) -> None:
        """Name the sessions of this instance's turns again, for whoever looks for orphans."""
        sessions = {name.session for name in (*self._owners, *self._begun)}
        await self._running.name(sorted(sessions), self.limits.lease_s)

    async def close(self) -> None:
        """Let running turns end within a part of the grace period, then give the leases of the
        others back: whoever has room goes on with them at once."""
        self.leaving.set()
        ending = [asyncio.ensure_future(owner.ended.wait()) for owner in self._owners.values()]
        if ending:
            await asyncio.wait(ending, timeout=self.limits.stop_grace_s)
        for one in ending:
            one.cancel()
        left = [name.session for name in (*self._owners, *self._begun)]
        if left:
            log.warning("turns_left_to_others", turns=len(left))
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(SegueError, TimeoutError):
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                for name, begun in self._begun.items():
                    hold = TurnHold(name.turn, begun.epoch, begun.nonce)
                    await self._deps.log.release_turn(name.session, hold)
                await self._running.name(left, 0.0)

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
