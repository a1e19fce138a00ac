"""A turn goes on after its decoder: taken over by whoever asks, or found as an orphan."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import structlog

from segue_cloud.engine.port import EngineTurn
from segue_cloud.sessions.port import Status, TurnClaim
from segue_cloud.tenants.usage import TenantUsage
from segue_cloud.turns.decoding import leave
from segue_cloud.turns.opening import opening_of
from segue_cloud.turns.owner import OwnerDeps, TurnOwner
from segue_cloud.turns.places import Places
from segue_cloud.turns.ports import RunningTurns
from segue_cloud.turns.prompts import encode_known_prompt
from segue_cloud.turns.spec import OwnedTurn
from segue_cloud.turns.writer import TurnKey
from segue_contract.errors import Overloaded, UnknownTurn
from segue_contract.ids import SessionName, TurnName
from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.limits import (
    PREPARE_ROUNDS,
    PREPARED_S,
    PREPARES_AT_ONCE,
    TAKEOVER_PREPARE_S,
)
from segue_contract.plan import Shape
from segue_contract.sync.state import TurnState, find_turn

log = structlog.get_logger("segue.turns")


AT_ONCE = 0.0  # seconds of quiet that a take-over waits for, where the owner itself leaves


class Awaited(NamedTuple):
    """A turn that was prepared here: its epoch then, and until when its reader is waited for."""

    epoch: int
    until: float


class TurnsHere(Protocol):
    """The turns of this instance (implemented by `manager.TurnManager`)."""

    def admit(self, turn: TurnName) -> None: ...

    def owned(self, session: SessionName, turn: str) -> TurnOwner | None: ...

    def knows(self, session: SessionName, turn: str) -> bool: ...

    def start(self, spec: OwnedTurn) -> TurnOwner: ...


class Takeover:
    """Raises the epoch of turns that lost their owner, and starts them here.

    Args:
        model: what the orphans are computed with; those of other models are left alone.
    """

    def __init__(
        self,
        deps: OwnerDeps,
        turns: TurnsHere,
        places: Places,
        running: RunningTurns,
        *,
        model: str,
        usage: TenantUsage,
    ) -> None:
        self._deps = deps
        self._lease_s = deps.limits.lease_s
        self._turns = turns
        self._places = places
        self._running = running
        self._model = model
        self._usage = usage
        self._preparing: dict[TurnName, asyncio.Task[int]] = {}
        self._at_work = asyncio.Semaphore(PREPARES_AT_ONCE)
        self._awaited: dict[TurnName, Awaited] = {}
        self._hands: WeakValueDictionary[TurnName, asyncio.Lock] = WeakValueDictionary()

    async def take_over(
        self, spec: OwnedTurn, known_tokens: tuple[int, ...]
    ) -> tuple[TurnOwner, bool]:
        """Own a turn whose decoder is gone: epoch + 1, from the first token that is not durable.

        Returns the owner and whether it was running here already (then nothing changed hands).

        Raises:
            UnknownTurn: the log has no such turn, or it has ended.
            Overloaded: there is no room for it here.
        """
        key = spec.key
        async with self._changing_hands(key.name):
            running = self._turns.owned(key.session, key.turn)
            if running is not None:
                return running, True
            begun_here = self._turns.knows(key.session, key.turn)
            self._turns.admit(key.name)
            owner: TurnOwner | None = None
            try:
                await self._running.name([key.session], self._lease_s)
                claim = await self._deps.log.take_over(key.session, key.turn, self._lease_s)
                state = await self._deps.log.state(key.session)
                turn = find_turn(state, key.turn)
                if turn is None or claim.status is not Status.OK:
                    raise UnknownTurn(
                        f"Turn {key.turn} does not run in session {key.session.session}.",
                        hint="Read the session's log: the turn may have ended.",
                    )
                durable = tuple(turn.tokens)
                adopted: tuple[int, ...] = ()
                if known_tokens[: len(durable)] == durable:
                    adopted = known_tokens[len(durable) :]
                owner = self._turns.start(_resumed(spec, claim, turn, adopted))
                return owner, False
            finally:
                if owner is None or begun_here:  # what began here holds its place already
                    self._places.give_back(key.name)

    # -- beforehand ----------------------------------------------------------------------------

    async def prepare(self, name: TurnName, *, leaving: bool, edge: str = "") -> bool:
        """Compute the KV of a turn that runs elsewhere, so that taking it over is quick.

        Args:
            leaving: its owner says that it stops. Else somebody doubts that it lives, and the
                engine computes nothing while others wait for it.
            edge: through which the turn comes, by its certificate.

        Returns:
            Whether the KV is in the prefix cache now.

        Raises:
            Overloaded: there is no room for it here.
        """
        if self._turns.knows(name.session, name.turn):
            return False
        busy = self._at_work.locked() or self._deps.engine.stats().waiting
        under_way = self._preparing.get(name)
        if under_way is None:
            place = TurnName(name.session, f"{name.turn}.prepared")
            refused = (busy and not leaving) or not self._places.free
            if refused or not self._places.take(place):
                raise Overloaded(
                    "This cloud has no room to prepare a turn.", hint="Ask another one."
                )
            under_way = asyncio.ensure_future(self._prefill(name, place, edge))
            self._preparing[name] = under_way
            under_way.add_done_callback(lambda _: self._preparing.pop(name, None))
        epoch = await under_way
        if leaving and epoch:
            now = self._deps.monotonic()
            self._awaited = {one: it for one, it in self._awaited.items() if it.until > now}
            self._awaited[name] = Awaited(epoch, now + PREPARED_S)
        return epoch > 0

    async def _prefill(self, name: TurnName, place: TurnName, edge: str) -> int:
        """And again, while the reply grows meanwhile: a take-over computes the rest. Returns the
        turn's epoch; 0 where there is nothing to do."""
        known = epoch = 0
        try:
            async with asyncio.timeout(TAKEOVER_PREPARE_S), self._at_work:
                for _ in range(PREPARE_ROUNDS):
                    epoch, tokens = await self._prefill_known(name, place, edge, known)
                    if tokens - known < BLOCK_TOKENS:
                        break
                    known = tokens
        except TimeoutError:
            raise Overloaded(
                "This cloud could not prepare a turn in time.", hint="Ask another one."
            ) from None
        finally:
            self._places.give_back(place)
        return epoch

    async def _prefill_known(
        self, name: TurnName, place: TurnName, edge: str, known: int
    ) -> tuple[int, int]:
        """The turn's epoch, and how many tokens are computed; (0, 0): it is not to be taken over.
        `known`: so many were computed just now."""
        state = await self._deps.log.state(name.session)
        turn = find_turn(state, name.turn)
        if turn is None or turn.ended or turn.model not in ("", self._model):
            return 0, 0
        prompt = await encode_known_prompt(self._deps, state.turns, turn)
        made = tuple(turn.tokens)
        tenant = name.session.tenant
        computed = EngineTurn(
            turn=place.turn,
            prompt=prompt,
            made=made,
            sampling=turn.sampling,
            max_tokens=len(made) + 1,
        )
        outputs = self._deps.engine.submit(self._deps.as_of(computed, tenant, edge))
        try:
            await anext(outputs, None)
        finally:
            await leave(outputs)
        tokens = len(prompt) + len(made)
        self._usage.computed(tenant, max(0, tokens - known))
        return turn.epoch, tokens

    async def go_on(self, name: TurnName) -> bool:
        """Take a turn over at once that was prepared here because its owner leaves; once. False
        where it was not, or somebody else took it over since."""
        awaited = self._awaited.pop(name, None)
        if awaited is None or awaited.until <= self._deps.monotonic():
            return False
        return await self.recover(name.session, AT_ONCE, only=name.turn, epoch=awaited.epoch)

    # -- taking over ---------------------------------------------------------------------------

    def _changing_hands(self, turn: TurnName) -> asyncio.Lock:
        """Held while a turn's epoch is raised and its owner made: two at once would fence off
        each other and leave the turn to nobody."""
        return self._hands.setdefault(turn, asyncio.Lock())

    async def recover(
        self,
        session: SessionName,
        quiet_s: float | None = None,
        *,
        only: str = "",
        epoch: int = 0,
    ) -> bool:
        """Finish a turn whose decoder and edge are both gone; True where one was found.

        Its lease must have run out, or nobody have renewed it for `quiet_s` (0: it is taken from
        whoever holds it), and there must be room: others may have some. Turns that lost their
        session to a later one, and have no end, get theirs. `only`: this turn, or none, and with
        this `epoch`.
        """
        if self._deps.engine.died.is_set():
            return False
        state = await self._deps.log.state(session)
        for turn in state.turns[:-1]:
            if not turn.ended and not self._turns.knows(session, turn.turn):
                await self._deps.log.end_abandoned(session, turn.turn)
        if not state.turns:
            return False
        last = state.turns[-1]
        if only and last.turn != only:
            return False
        if last.ended or last.model not in ("", self._model):
            return False
        name = TurnName(session, last.turn)
        async with self._changing_hands(name):
            if self._turns.knows(session, last.turn) or not self._places.take(name):
                return False
            started = False
            try:
                started = await self._finish_orphan(
                    name, self._lease_s if quiet_s is None else quiet_s, epoch
                )
            finally:
                if not started:
                    self._places.give_back(name)
            return started

    async def _finish_orphan(self, name: TurnName, quiet_s: float, epoch: int) -> bool:
        session = name.session
        await self._running.name([session], self._lease_s)
        claim = await self._deps.log.take_over(
            session, name.turn, self._lease_s, quiet_s=quiet_s, from_epoch=epoch
        )
        if claim.status is not Status.OK:
            return False
        state = await self._deps.log.state(session)  # with all that the old owner wrote
        turn = find_turn(state, name.turn)
        if turn is None:  # the log lost it
            return False
        prompt = await encode_known_prompt(self._deps, state.turns, turn)
        spec = OwnedTurn(
            key=TurnKey(session, name.turn, claim.epoch, turn.device, claim.nonce),
            prompt=prompt,
            max_tokens=turn.max_tokens,
            sampling=turn.sampling,
            stop=turn.stop,
            shape=Shape.TEXT,
        )
        log.info("turn_recovered", session=session.session, turn=name.turn, epoch=claim.epoch)
        self._turns.start(_resumed(spec, claim, turn, ()))
        return True


def _resumed(
    spec: OwnedTurn, claim: TurnClaim, turn: TurnState, adopted: tuple[int, ...]
) -> OwnedTurn:
    return replace(
        spec,
        key=replace(spec.key, epoch=claim.epoch, nonce=claim.nonce),
        made=tuple(turn.tokens),
        made_pieces=tuple(turn.pieces),
        adopted=adopted,
        started=claim.cursor,
        opening=opening_of(spec.key.session, turn, now_ms=0),
    )
