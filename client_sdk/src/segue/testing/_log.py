"""One session's log in memory, by the rules of the real one: offsets, generations, digests, and
writers' epochs and numbers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from segue_contract.errors import CursorAhead, OutcomeUnknown, SequenceGap, StaleEpoch
from segue_contract.sync.chain import chained
from segue_contract.sync.ops import Op, encode_op
from segue_contract.sync.replica import Replica
from segue_contract.sync.state import Cursor, SessionState, encode_state
from segue_contract.v1 import agent_pb2 as pb


@dataclass(slots=True)
class _Producer:
    epoch: int
    offsets: list[int] = field(default_factory=list)  # of each op, by its number from 1 on


class MemoryLog:
    """`changed` is set, and replaced, with every change. `deleted`: nothing further comes."""

    def __init__(
        self, session: str, generation: int = 1, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.session = session
        self.generation = generation
        self.devices: set[str] = set()
        self.revoked: set[str] = set()
        self.deleted = False
        self.used_s = time.time()
        self.changed = asyncio.Event()
        self._on_change = on_change
        self._ops: list[bytes] = []
        self._digests: list[bytes] = [b""]
        self._replica = Replica(SessionState(cursor=Cursor(generation, 0)))
        self._kept = 0  # entries that earlier generations share with this one
        self._producers: dict[str, _Producer] = {}
        self._epochs = 0

    @property
    def tail(self) -> Cursor:
        return Cursor(self.generation, len(self._ops))

    @property
    def digest(self) -> bytes:
        return self._digests[-1]

    @property
    def state(self) -> SessionState:
        return self._replica.state

    @property
    def title(self) -> str:
        return self.state.turns[0].prompt[:80] if self.state.turns else ""

    def new_epoch(self, producer: str) -> int:
        self._epochs += 1
        self._producers[producer] = _Producer(self._epochs)
        return self._epochs

    def append(self, *ops: Op | bytes) -> int:
        """Returns the offset of the first one."""
        first = len(self._ops) + 1
        for op in ops:
            data = op if isinstance(op, bytes) else encode_op(op)
            self._ops.append(data)
            self._digests.append(chained(self._digests[-1], data))
            self._replica.apply_op(self.generation, len(self._ops), data)
        self.used_s = time.time()
        self.wake()
        return first

    def append_of(self, producer: str, epoch: int, first_seq: int, ops: Sequence[bytes]) -> int:
        """Of a writer with numbers: each number once. Returns the offset of the first one.

        Raises:
            StaleEpoch, SequenceGap, OutcomeUnknown.
        """
        known = self._producers.get(producer)
        if known is None or known.epoch != epoch:
            current = known.epoch if known is not None else 0
            raise StaleEpoch(
                f"Epoch {epoch} was given up; {current} holds now.",
                hint="Open the session again to get a new epoch.",
                current=current,
            )
        expected = len(known.offsets) + 1
        if first_seq > expected:
            raise SequenceGap(f"Op {first_seq} came, {expected} is next.", expected=expected)
        if first_seq < expected:
            offsets = known.offsets[first_seq - 1 : first_seq - 1 + len(ops)]
            if [self._ops[offset - 1] for offset in offsets] != list(ops):
                raise OutcomeUnknown("The numbers were used for other ops.")
            return offsets[0]
        first = self.append(*ops)
        known.offsets += range(first, first + len(ops))
        return first

    def entries(self, after: int) -> list[pb.LogEntry]:
        return [
            pb.LogEntry(generation=self.generation, offset=offset, op=op)
            for offset, op in enumerate(self._ops[after:], after + 1)
        ]

    def since(self, after: Cursor) -> tuple[pb.Snapshot | None, list[pb.LogEntry]]:
        """What a reader that knows the log up to `after` has to be told.

        Raises:
            CursorAhead: the log ends before.
        """
        if after.offset and after.generation != self.generation:
            return self.snapshot(lost_from=self._kept + 1 if after.offset > self._kept else 0), []
        if after.offset > len(self._ops):
            raise CursorAhead(
                f"The log ends at {len(self._ops)}, before {after.offset}.",
                generation=self.generation,
                offset=len(self._ops),
            )
        return None, self.entries(after.offset)

    def snapshot(self, *, lost_from: int = 0) -> pb.Snapshot:
        at = pb.Cursor(generation=self.generation, offset=len(self._ops))
        return pb.Snapshot(at=at, state=encode_state(self.state), lost_from=lost_from)

    def lose(self, entries: int) -> None:
        """The store failed over, and its last entries are gone: a new generation says so."""
        kept = self._ops[: max(0, len(self._ops) - entries)]
        self._kept = min(self._kept, len(kept)) if self._kept else len(kept)
        self.generation += 1
        self._ops, self._digests = [], [b""]
        self._producers.clear()
        self._replica = Replica(SessionState(cursor=Cursor(self.generation, 0)))
        self.append(*kept)

    def delete(self) -> None:
        self.deleted = True
        self.wake()

    def wake(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()
        self._on_change()
