"""A session log in memory with the fencing rules of the real one, that can lose its tail.

For tests of whoever owns a turn: what the script of the log itself does is tested on real servers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from segue_cloud.sessions.port import AppendResult, Status, TurnClaim, TurnHold
from segue_contract.ids import SessionName
from segue_contract.sync.ops import Op
from segue_contract.sync.replica import Replica
from segue_contract.sync.state import Cursor, SessionState


@dataclass
class _Record:
    epoch: int = 1
    seq: int = 0
    nonce: str = ""
    ended: bool = False


@dataclass
class _Data:
    ops: list[tuple[int, Op]] = field(default_factory=list)  # with their generation
    turns: dict[str, _Record] = field(default_factory=dict)
    current: str = ""


class ModelLog:
    """`segue_cloud.turns.ports.TurnLog` for one session."""

    def __init__(self) -> None:
        self.generation = 1
        self._data = _Data()
        self._earlier: list[_Data] = []
        self._nonces = 0

    @property
    def ops(self) -> list[Op]:
        return [op for _, op in self._data.ops]

    def lose(self, changes: int) -> None:
        """The store goes on without its last `changes` changes."""
        for _ in range(min(changes, len(self._earlier))):
            self._data = self._earlier.pop()
        self.generation += 1

    def _change(self) -> None:
        self._earlier.append(copy.deepcopy(self._data))

    def _nonce(self) -> str:
        self._nonces += 1
        return str(self._nonces)

    def _append(self, ops: Sequence[Op]) -> None:
        self._data.ops += [(self.generation, op) for op in ops]

    async def begin_turn(
        self, session: SessionName, turn: str, ops: Sequence[Op], lease_s: float
    ) -> TurnClaim:
        tail = Cursor(self.generation, len(self._data.ops))
        if (known := self._data.turns.get(turn)) is not None:
            return TurnClaim(Status.OK, known.epoch, tail, known=True, ended=known.ended)
        if self._data.current:
            return TurnClaim(Status.BUSY, 0, tail, holder=self._data.current)
        self._change()
        record = self._data.turns[turn] = _Record(nonce=self._nonce())
        self._data.current = turn
        self._append(ops)
        tail = Cursor(self.generation, len(self._data.ops))
        return TurnClaim(Status.OK, 1, tail, appended=len(ops), nonce=record.nonce)

    async def take_over(
        self,
        session: SessionName,
        turn: str,
        lease_s: float,
        *,
        quiet_s: float = 0.0,
        from_epoch: int = 0,
    ) -> TurnClaim:
        record = self._data.turns.get(turn)
        if record is None or record.ended:
            return TurnClaim(Status.MISSING)
        self._change()
        record = self._data.turns[turn]
        record.epoch, record.seq, record.nonce = record.epoch + 1, 0, self._nonce()
        tail = Cursor(self.generation, len(self._data.ops))
        return TurnClaim(Status.OK, record.epoch, tail, known=True, nonce=record.nonce)

    async def append_turn(
        self,
        session: SessionName,
        hold: TurnHold,
        first_seq: int,
        ops: Sequence[Op],
        *,
        ends: bool = False,
    ) -> AppendResult:
        record = self._data.turns.get(hold.turn, _Record(epoch=0))
        tail = len(self._data.ops)
        held = (record.epoch, record.nonce) == (hold.epoch, hold.nonce)
        if not held or (record.ended and first_seq > record.seq):
            return AppendResult(Status.STALE, self.generation, 0, tail, record.epoch)
        if first_seq + len(ops) - 1 <= record.seq:
            return AppendResult(Status.DUP, self.generation, tail, tail, record.epoch)
        if first_seq > record.seq + 1:
            return AppendResult(Status.GAP, self.generation, 0, tail, record.epoch, record.seq + 1)
        self._change()
        record = self._data.turns[hold.turn]
        self._append(ops)
        record.seq, record.ended = first_seq + len(ops) - 1, ends
        if ends:
            self._data.current = ""
        new_tail = len(self._data.ops)
        return AppendResult(
            Status.OK, self.generation, tail + 1, new_tail, record.epoch, appended=len(ops)
        )

    async def renew_turn(
        self, session: SessionName, hold: TurnHold, lease_s: float
    ) -> AppendResult:
        record = self._data.turns.get(hold.turn, _Record(epoch=0))
        held = (record.epoch, record.nonce) == (hold.epoch, hold.nonce)
        status = Status.OK if held and not record.ended else Status.STALE
        return AppendResult(status, self.generation, 0, len(self._data.ops), record.epoch)

    async def note(self, session: SessionName, op: Op) -> None:
        self._append([op])

    async def release_turn(self, session: SessionName, hold: TurnHold) -> None:
        return None

    async def state(self, session: SessionName) -> SessionState:
        replica = Replica()
        for offset, (_, op) in enumerate(self._data.ops, 1):
            replica.apply_op(self.generation, offset, op)
        replica.adopt_generation(self.generation)
        return replica.state
