"""Puts a turn's tokens into the session log, in order, once, under the turn's epoch.

Tokens that come while an append is under way travel together in the next one: no timer, and
under load the batches grow by themselves.

While the store stands still the writer repeats the same batch, which is idempotent. Where the store
goes on in a new generation, it may have lost tokens that readers were shown: the writer compares
what the log has of the turn, puts back what is missing, and goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from segue_cloud.sessions.port import AppendResult, Status, TurnHold
from segue_cloud.turns.frames import Chunk, after, frames_of
from segue_cloud.turns.patience import store_call
from segue_cloud.turns.ports import TurnLog
from segue_contract.errors import Internal, StaleEpoch, StoreUnavailable, UnknownSession
from segue_contract.ids import SessionName, TurnName
from segue_contract.limits import (
    MAX_APPEND_OPS,
    TurnLimits,
)
from segue_contract.sync.ops import Frame, Op, TurnEnded
from segue_contract.sync.state import find_turn

log = structlog.get_logger("segue.turn")

_T = TypeVar("_T")


@dataclass(frozen=True)
class TurnKey:
    """Which turn writes, and as whom."""

    session: SessionName
    turn: str
    epoch: int
    device: str
    nonce: str = ""  # of the claim that made the epoch

    @property
    def name(self) -> TurnName:
        return TurnName(self.session, self.turn)

    @property
    def hold(self) -> TurnHold:
        return TurnHold(self.turn, self.epoch, self.nonce)


class TurnWriter:
    """One per turn and epoch. `run` must be running for anything to be written.

    Args:
        generation: of the log, as the claim said.
        opening: the turn's first ops, for a log that lost them.
        made: what the log has of the reply already.
        on_durable: told each frame with the offset it got, in order, each token once.
        on_stop: told that somebody asked this turn to stop; maybe more than once.
        now_ms: wall clock for the ops' `at_ms`.
        limits: how long the turn is held, and the store waited for.
        stalled: whether the turn waits for an engine that hangs.
    """

    def __init__(
        self,
        key: TurnKey,
        log: TurnLog,
        *,
        generation: int,
        opening: Sequence[Op],
        made: Chunk | None,
        on_durable: Callable[[Frame, int], None],
        on_stop: Callable[[], None],
        now_ms: Callable[[], int],
        limits: TurnLimits = TurnLimits(),
        stalled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._key = key
        self._log = log
        self._generation = generation
        self._opening = opening
        self._on_durable = on_durable
        self._on_stop = on_stop
        self._now_ms = now_ms
        self._limits = limits
        self._lease_s = limits.lease_s
        self._all: list[Chunk] = [made] if made is not None else []
        self._sent = len(self._all)  # chunks of `_all` that the log has, or had
        self._published = made.next_index if made is not None else 0
        self._wake = asyncio.Event()
        self._closing = False
        self._seq = 1
        self._stalled = stalled
        self._offers = 0  # looks since the lease was given back for a hung engine

    @property
    def hold(self) -> TurnHold:
        """What the turn is held by now."""
        return self._key.hold

    def add(
        self, index: int, tokens: tuple[int, ...], pieces: tuple[str, ...], made_by: str
    ) -> None:
        """Queue tokens [index, index + len(tokens)); the caller adds them in order."""
        self._all.append(Chunk(index, tokens, pieces, made_by))
        self._wake.set()

    def close(self) -> None:
        """`run` returns once everything added is durable."""
        self._closing = True
        self._wake.set()

    async def run(self) -> None:
        """Append until `close`; renews the turn's lease while there is nothing to append.

        Raises:
            StaleEpoch: another decoder took the turn over.
            StoreUnavailable: the store stood still for longer than the turn may take.
        """
        while True:
            if self._sent < len(self._all):
                await self._flush()
            elif self._closing:
                return
            else:
                await self._wait_or_renew()

    async def end(self, op: TurnEnded) -> int:
        """Append the turn's last op, releasing the session; returns its offset."""
        while True:
            result = await self._append([op], ends=True)
            if result is not None:
                return result.first_offset
            await self.run()  # what the log lost comes before the end

    async def _wait_or_renew(self) -> None:
        try:
            async with asyncio.timeout(self._limits.renew_s):
                await self._wake.wait()
            self._wake.clear()
        except TimeoutError:
            if await self._offered():
                return
            result = await self._call(
                lambda: self._log.renew_turn(self._key.session, self._key.hold, self._lease_s)
            )
            await self._accept(result)

    async def _offered(self) -> bool:
        """While the engine hangs the turn is left to whoever has one that does not, for
        `stall_offer_s`; where nobody took it by then it stays here."""
        if not self._stalled():
            self._offers = 0
            return False
        self._offers += 1
        if self._offers == 1:
            log.warning("turn_offered", turn=self._key.turn)
            await self._call(lambda: self._log.release_turn(self._key.session, self._key.hold))
        return self._offers * self._limits.renew_s < self._limits.stall_offer_s

    async def _flush(self) -> None:
        upto = len(self._all)
        frames = frames_of(
            self._all[self._sent : upto],
            turn=self._key.turn,
            epoch=self._key.epoch,
            device=self._key.device,
            at_ms=self._now_ms(),
        )
        for start in range(0, len(frames), MAX_APPEND_OPS):
            batch = frames[start : start + MAX_APPEND_OPS]
            result = await self._append(list(batch))
            if result is None:
                return  # `_sent` went back
            for place, frame in enumerate(batch):
                self._publish(frame, result.first_offset + place)
        self._sent = upto

    def _publish(self, frame: Frame, offset: int) -> None:
        """Readers get each token once, also where the log gets it a second time."""
        fresh = after(frame, self._published)
        if fresh is not None:
            self._published = fresh.next_index
            self._on_durable(fresh, offset)

    async def _append(self, ops: list[Op], *, ends: bool = False) -> AppendResult | None:
        """None where the log lost some of the turn: `run` has to begin there again."""
        key, seq = self._key, self._seq
        result = await self._call(
            lambda: self._log.append_turn(
                key.session,
                replace(key.hold, generation=self._generation),
                seq,
                ops,
                ends=ends,
            )
        )
        if result.status in (Status.OK, Status.DUP):
            self._seq = seq + len(ops)
        return result if await self._accept(result) else None

    async def _call(self, call: Callable[[], Awaitable[_T]]) -> _T:
        return await store_call(
            call,
            calls=self._limits.store_calls,
            pause_s=self._limits.store_pause_s,
            what=self._key.turn,
        )

    async def _accept(self, result: AppendResult) -> bool:
        """False where the log lost some of the turn. Raises StaleEpoch, Internal."""
        if result.stop_requested:
            self._on_stop()
        if result.generation != self._generation or result.status is Status.MISSING:
            return not await self._compare(result)
        if result.status is Status.STALE:
            raise self._taken_over(result.current_epoch)
        if result.status not in (Status.OK, Status.DUP):
            raise Internal(f"The log answered {result.status} to a turn's own append.")
        return True

    def _taken_over(self, current: int) -> StaleEpoch:
        return StaleEpoch(
            f"Turn {self._key.turn} was taken over by another decoder.",
            hint="Follow the session; its log goes on.",
            current=current,
        )

    # -- a new generation of the log -----------------------------------------------------------

    async def _compare(self, result: AppendResult) -> bool:
        """See what of the turn the log still has; True where some is to be written again.

        Raises:
            StaleEpoch: the turn goes on, or has ended, under another owner.
        """
        key = self._key
        try:
            state = await self._call(lambda: self._log.state(key.session))
        except UnknownSession as error:
            raise StoreUnavailable(
                f"The store lost session {key.session.session}.", hint="Open it again."
            ) from error
        if state.cursor.generation != result.generation:
            return True  # it lost more meanwhile; the next append says how the turn is held now
        self._generation = result.generation
        turn = find_turn(state, key.turn)
        if turn is None:
            await self._begin_again()
            return True
        made = [token for chunk in self._all for token in chunk.tokens]
        if turn.epoch > key.epoch or turn.tokens != made[: len(turn.tokens)]:
            raise self._taken_over(turn.epoch)
        match result.status:
            case Status.OK | Status.DUP:  # also where this was the turn's end
                if turn.ended or len(turn.tokens) >= self._published:
                    return False
            case Status.GAP | Status.MOVED:
                self._seq = result.expected_seq
            case _:
                if turn.ended or result.current_epoch >= key.epoch:
                    raise self._taken_over(result.current_epoch)
                await self._take_again()
        self._go_back(len(turn.tokens))
        return True

    async def _take_again(self) -> None:
        """The log forgot that this instance took the turn over."""
        key = self._key
        while True:
            claim = await self._call(
                lambda: self._log.take_over(key.session, key.turn, self._lease_s)
            )
            if claim.status is not Status.OK:
                raise self._taken_over(claim.epoch)
            if claim.epoch >= key.epoch:  # readers believe no lower one
                break
        self._key = replace(key, epoch=claim.epoch, nonce=claim.nonce)
        self._seq = 1

    async def _begin_again(self) -> None:
        """The log lost the turn from its first op on."""
        key = self._key
        claim = await self._call(
            lambda: self._log.begin_turn(key.session, key.turn, self._opening, self._lease_s)
        )
        if claim.status is not Status.OK or claim.known:
            raise self._taken_over(claim.epoch)
        self._key = replace(key, epoch=claim.epoch, nonce=claim.nonce)
        self._seq = 1
        self._generation = claim.cursor.generation
        if claim.epoch < key.epoch:
            await self._take_again()
        self._go_back(0)

    def _go_back(self, index: int) -> None:
        """The log has the tokens before `index`."""
        log.warning("turn_written_again", turn=self._key.turn, from_index=index)
        chunks = [chunk.after(index) for chunk in self._all]
        whole = [token for chunk in self._all for token in chunk.tokens]
        pieces = [piece for chunk in self._all for piece in chunk.pieces]
        kept = [Chunk(0, tuple(whole[:index]), tuple(pieces[:index]), "")] if index else []
        self._all = kept + [chunk for chunk in chunks if chunk is not None]
        self._sent = len(kept)
        self._wake.set()
