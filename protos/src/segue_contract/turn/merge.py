"""One turn's reply merged from previews and log entries, by token index.

The asking device gets frames from its edge (maybe before the log has them) and from the log; both
arrive in any order, repeated, overlapping, and from more than one decoder. Pure.

Which token stands at an index:

- a durable one is final; it replaces whatever was shown there before;
- of two undurable ones the higher turn epoch stands; of equals the first;
- an undurable one of an epoch below the highest seen is not believed at all.

Where a shown token changes, everything shown from there on is taken back (`Rewound`). Tokens that
another decoder made alike are no change: sampling is counter-based, so mostly nothing is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from segue_contract.errors import InvalidArgument
from segue_contract.limits import MAX_NEW_TOKENS
from segue_contract.turn.events import Durable, Frame, MadeBy, Rewound

Merged: TypeAlias = Frame | Durable | Rewound


@dataclass
class _Slot:
    token: int
    piece: str
    epoch: int
    durable: bool
    made_by: MadeBy
    offset: int

    def joins(self, other: _Slot) -> bool:
        """Whether both may be told in one frame."""
        return (self.durable, self.made_by) == (other.durable, other.made_by)


class Merger:
    """Collects the tokens of one turn; each call returns what its reader must do, in order."""

    def __init__(self) -> None:
        self._slots: dict[int, _Slot] = {}
        self._shown = 0
        self._durable = 0
        self._epoch = 0
        self._end: int | None = None

    @property
    def next_index(self) -> int:
        """The number of tokens shown."""
        return self._shown

    @property
    def durable_index(self) -> int:
        """The number of tokens, from the first on, that the log is known to hold."""
        return self._durable

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def complete(self) -> bool:
        """The turn has ended and all its tokens are shown."""
        return self._end is not None and self._shown == self._end

    @property
    def tokens(self) -> list[int]:
        return [self._slots[i].token for i in range(self._shown)]

    @property
    def pieces(self) -> list[str]:
        return [self._slots[i].piece for i in range(self._shown)]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def shows(self, index: int, tokens: Sequence[int]) -> bool:
        """Whether just these tokens are shown from `index` on."""
        return index + len(tokens) <= self._shown and all(
            self._slots[at].token == token for at, token in enumerate(tokens, index)
        )

    def push(self, frame: Frame) -> list[Merged]:
        """Take one frame in.

        Raises:
            InvalidArgument: tokens and pieces differ in length, or the index is out of bounds.
        """
        tokens, pieces = frame.tokens, frame.pieces
        if len(tokens) != len(pieces):
            raise InvalidArgument(f"A frame has {len(tokens)} tokens and {len(pieces)} pieces.")
        if frame.index < 0 or frame.next_index > MAX_NEW_TOKENS:
            raise InvalidArgument(
                f"A frame of {len(tokens)} tokens at index {frame.index} is no reply."
            )
        if frame.epoch < self._epoch and not frame.durable:
            return []
        self._epoch = max(self._epoch, frame.epoch)
        changed = self._shown
        for at, (token, piece) in enumerate(zip(tokens, pieces, strict=True), frame.index):
            if self._end is not None and at >= self._end:
                break
            slot = _Slot(token, piece, frame.epoch, frame.durable, frame.made_by, frame.offset)
            if self._put(at, slot):
                changed = min(changed, at)
        return self._settle(changed)

    def confirm(self, next_index: int, offset: int = 0) -> list[Merged]:
        """The log holds the tokens before `next_index`, as they were sent under this epoch."""
        for at in range(self._durable, next_index):
            slot = self._slots.get(at)
            if slot is None:
                break
            self._slots[at] = replace(slot, durable=True, offset=offset)
        return self._settle(self._shown)

    def rewind(self, epoch: int, index: int) -> list[Merged]:
        """A decoder of `epoch` goes on at `index`: older previews from there on are void.

        An `index` below what is durable says that the log itself lost those tokens.
        """
        if epoch < self._epoch:
            return []
        self._epoch = epoch
        if index < self._durable:
            for at in range(index, self._durable):
                del self._slots[at]
        return self._settle(min(self._drop(index, epoch), max(index, 0)))

    def end(self, next_index: int) -> list[Merged]:
        """The turn ended with `next_index` tokens: undurable ones beyond never were."""
        self._end = next_index
        changed = self._shown
        for at in [at for at in self._slots if at >= next_index]:
            del self._slots[at]
            changed = min(changed, at)
        return self._settle(changed)

    def reopen(self) -> None:
        """The end was not the log's: what the log says of the turn may go on otherwise."""
        self._end = None

    def check_integrity(self) -> None:
        """Assert what must always hold."""
        assert 0 <= self._durable <= self._shown
        assert all(self._slots[i].durable for i in range(self._durable))
        assert all(i in self._slots for i in range(self._shown))
        assert self._shown not in self._slots, "something could be shown and is not"
        assert self._end is None or all(i < self._end for i in self._slots)

    # -- inside -------------------------------------------------------------------------------

    def _put(self, at: int, new: _Slot) -> bool:
        """Put one token at its place; True where another one stood there."""
        old = self._slots.get(at)
        if old is None:
            self._slots[at] = new
            return False
        if old.durable or not (new.durable or new.epoch > old.epoch):
            return False
        self._slots[at] = new
        if (old.token, old.piece) == (new.token, new.piece):
            return False
        # What followed the old token followed from it.
        self._drop(at + 1, new.epoch + new.durable)
        return True

    def _drop(self, index: int, epoch: int) -> int:
        """Forget undurable tokens of epochs below `epoch` from `index` on; the first such shown."""
        void = [
            at
            for at, slot in self._slots.items()
            if at >= index and not slot.durable and slot.epoch < epoch
        ]
        for at in void:
            del self._slots[at]
        return min([self._shown, *void])

    def _settle(self, changed: int) -> list[Merged]:
        """Compare what is known with what is shown, from the first changed index on."""
        events: list[Merged] = []
        preview_to = self._shown
        if changed < self._shown:
            events.append(Rewound(self._epoch, changed))
            self._shown = preview_to = changed
            self._durable = min(self._durable, changed)
        while (slot := self._slots.get(self._shown)) is not None:
            start, run = self._shown, [slot]
            while (nxt := self._slots.get(start + len(run))) is not None and nxt.joins(slot):
                run.append(nxt)
            self._shown += len(run)
            events.append(
                Frame(
                    self._epoch,
                    start,
                    tuple(one.token for one in run),
                    tuple(one.piece for one in run),
                    slot.durable,
                    run[-1].offset if slot.durable else 0,
                    slot.made_by,
                )
            )
        before = self._durable
        while self._durable < self._shown and self._slots[self._durable].durable:
            self._durable += 1
        # Said only where a preview became durable: fresh durable tokens say it themselves.
        if self._durable > before and before < preview_to:
            events.append(Durable(self._durable, self._slots[self._durable - 1].offset))
        return events
