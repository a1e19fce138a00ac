"""Puts a turn's tokens into the session log, in order, once, under the turn's epoch.

Tokens that come while an append is under way travel together in the next one: no timer, and
under load the batches grow by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from segue_cloud.sessions.port import AppendResult, Status, TurnHold
from segue_cloud.turns.ports import TurnLog
from segue_contract.errors import Internal, StaleEpoch
from segue_contract.ids import SessionName, TurnName
from segue_contract.limits import MAX_APPEND_OPS, TURN_LEASE_S
from segue_contract.sync.ops import Frame, Op, TurnEnded

_MAX_FRAME_TOKENS = 1024


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
        on_durable: told each frame with the offset it got, in order.
        on_stop: told once that somebody asked this turn to stop.
        now_ms: wall clock for the ops' `at_ms`.
    """

    def __init__(
        self,
        key: TurnKey,
        log: TurnLog,
        *,
        on_durable: Callable[[Frame, int], None],
        on_stop: Callable[[], None],
        now_ms: Callable[[], int],
    ) -> None:
        self._key = key
        self._log = log
        self._on_durable = on_durable
        self._on_stop = on_stop
        self._now_ms = now_ms
        self._pending: list[tuple[int, tuple[int, ...], tuple[str, ...], str]] = []
        self._wake = asyncio.Event()
        self._closing = False
        self._seq = 1

    def add(
        self, index: int, tokens: tuple[int, ...], pieces: tuple[str, ...], made_by: str
    ) -> None:
        """Queue tokens [index, index + len(tokens)); the caller adds them in order."""
        self._pending.append((index, tokens, pieces, made_by))
        self._wake.set()

    def close(self) -> None:
        """`run` returns once everything added is durable."""
        self._closing = True
        self._wake.set()

    async def run(self) -> None:
        """Append until `close`; renews the turn's lease while there is nothing to append.

        Raises:
            StaleEpoch: another decoder took the turn over.
            StoreUnavailable: the store did not take an append within its deadline.
        """
        while True:
            if self._pending:
                await self._flush()
            elif self._closing:
                return
            else:
                await self._wait_or_renew()

    async def end(self, op: TurnEnded) -> int:
        """Append the turn's last op, releasing the session; returns its offset."""
        result = await self._append([op], ends_turn=True)
        return result.first_offset

    async def _wait_or_renew(self) -> None:
        try:
            async with asyncio.timeout(TURN_LEASE_S / 3):
                await self._wake.wait()
            self._wake.clear()
        except TimeoutError:
            key = self._key
            result = await self._log.renew_turn(key.session, key.hold, TURN_LEASE_S)
            self._check(result)

    async def _flush(self) -> None:
        taken, self._pending = self._pending, []
        frames = self._frames(taken)
        for start in range(0, len(frames), MAX_APPEND_OPS):
            batch = frames[start : start + MAX_APPEND_OPS]
            result = await self._append(list(batch))
            for place, frame in enumerate(batch):
                self._on_durable(frame, result.first_offset + place)

    def _frames(
        self, taken: list[tuple[int, tuple[int, ...], tuple[str, ...], str]]
    ) -> list[Frame]:
        """Neighbouring tokens of one maker become one frame."""
        frames: list[Frame] = []
        now = self._now_ms()
        for index, tokens, pieces, made_by in taken:
            last = frames[-1] if frames else None
            if (
                last is not None
                and last.made_by == made_by
                and len(last.tokens) + len(tokens) <= _MAX_FRAME_TOKENS
            ):
                index, tokens, pieces = last.index, last.tokens + tokens, last.pieces + pieces
                frames.pop()
            frames.append(
                Frame(
                    id=f"{self._key.turn}.{self._key.epoch}.{index}",
                    device=self._key.device,
                    at_ms=now,
                    turn=self._key.turn,
                    epoch=self._key.epoch,
                    index=index,
                    tokens=tokens,
                    pieces=pieces,
                    made_by=made_by,
                )
            )
        return frames

    async def _append(self, ops: list[Op], *, ends_turn: bool = False) -> AppendResult:
        key = self._key
        result = await self._log.append_turn(key.session, key.hold, self._seq, ops, ends=ends_turn)
        self._check(result)
        self._seq += len(ops)
        return result

    def _check(self, result: AppendResult) -> None:
        if result.status is Status.STALE:
            raise StaleEpoch(
                f"Turn {self._key.turn} was taken over by another decoder.",
                hint="Follow the session; its log goes on.",
                current=result.current_epoch,
            )
        if result.status not in (Status.OK, Status.DUP):
            raise Internal(f"The log answered {result.status} to a turn's own append.")
        if result.stop_requested:
            self._on_stop()
