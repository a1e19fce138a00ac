"""A session folded from its log, op by op: the same on every device and in the cloud.

Pure: no clocks, no I/O. The rules that make replicas equal:

- ops apply in offset order only; a repeated one changes nothing, a later one waits (a gap);
- a turn's tokens are addressed by index: what is known already is skipped, the rest is added;
- ops of an older turn epoch than the turn has, and anything after its end (a message under
  its id, too), have no effect;
- a message waits until it begins, is withdrawn, or one that came after it begins;
- a name's last writer by offset wins; the first claim and the first result of a tool call win.
"""

from __future__ import annotations

from collections.abc import Generator
from enum import StrEnum

from segue_contract.sync import ops
from segue_contract.sync.state import Cursor, SessionState, TurnState, WaitingTurn


class Applied(StrEnum):
    APPLIED = "applied"
    DUPLICATE = "duplicate"  # known already; nothing changed
    GAP = "gap"  # an earlier entry is missing; nothing changed: Read from the cursor
    NEW_GENERATION = "new_generation"  # the log lost entries; nothing changed: take a snapshot


class Replica:
    """Folds log entries into `state`, which it owns: readers must not change it."""

    def __init__(self, state: SessionState | None = None) -> None:
        self._state = state if state is not None else SessionState()
        self._turns = {turn.turn: turn for turn in self._state.turns}

    @property
    def state(self) -> SessionState:
        return self._state

    @property
    def cursor(self) -> Cursor:
        return self._state.cursor

    def turn(self, turn: str) -> TurnState | None:
        return self._turns.get(turn)

    def load(self, state: SessionState) -> None:
        """Start over from a snapshot, whatever was known."""
        self._state = state
        self._turns = {turn.turn: turn for turn in state.turns}

    def free_in_slices(self, turns: int) -> Generator[None, None, None]:
        """Let go of a state that nobody needs any more, so many turns at a time: to free a large
        one at once takes 4 ms a MiB."""
        while self._state.turns:
            for turn in self._state.turns[-turns:]:
                self._turns.pop(turn.turn, None)
            del self._state.turns[-turns:]
            yield

    def adopt_generation(self, generation: int) -> None:
        """What is known was read from the log itself, which now lives on as `generation`."""
        self._state.cursor = Cursor(generation, self._state.cursor.offset)

    def load_cursor(self, cursor: Cursor) -> None:
        """Stand at `cursor`: what lies between is gone for good."""
        self._state.cursor = cursor

    def apply_op(self, generation: int, offset: int, op: ops.Op | bytes) -> Applied:
        """Fold one entry of the log, its op as bytes or decoded, or say why not.

        Raises:
            InvalidArgument: `op` are bytes of no op; nothing changed.
        """
        known = self._state.cursor
        # Who knows nothing yet belongs to no generation.
        if known.offset or offset != 1:
            if generation < known.generation:
                return Applied.DUPLICATE
            if generation > known.generation and known.offset:
                return Applied.NEW_GENERATION
            if offset <= known.offset:
                return Applied.DUPLICATE
            if offset > known.offset + 1:
                return Applied.GAP
        self._fold(offset, ops.decode_op(op) if isinstance(op, bytes) else op)
        self._state.cursor = Cursor(generation, offset)
        return Applied.APPLIED

    def check_integrity(self) -> None:
        """Assert what must always hold."""
        assert len(self._turns) == len(self._state.turns), "a turn twice"
        for turn in self._state.turns:
            assert self._turns[turn.turn] is turn
            assert len(turn.tokens) == len(turn.pieces), turn.turn
            assert turn.last_offset <= self._state.cursor.offset, turn.turn

    # -- one rule per kind of op --------------------------------------------------------------

    def _fold(self, offset: int, op: ops.Op) -> None:
        state = self._state
        match op:
            case ops.TurnWaiting():
                names = {one.turn for one in state.waiting}
                if op.turn not in self._turns and op.turn not in names:
                    one = WaitingTurn(turn=op.turn, device=op.device, prompt=op.text)
                    state.waiting.append(one)
            case ops.TurnWithdrawn():
                state.waiting = [one for one in state.waiting if one.turn != op.turn]
            case ops.UserMessage():
                self._begin(op.turn)
                known = self._turns.get(op.turn)
                if known is None or not known.ended:
                    turn = self._touch(op.turn, offset)
                    turn.device, turn.prompt = op.device, op.text
            case ops.TurnStarted() | ops.Frame() | ops.TurnEnded():
                self._fold_turn(offset, op)
            case ops.ToolCall():
                self._touch(op.turn, offset)
            case ops.ToolClaim():
                state.claims.setdefault(op.call, op.device)
            case ops.ToolResult():
                state.results.setdefault(op.call, op.result)
            case ops.Control():
                if op.epoch > state.control_epoch:
                    state.control_holder, state.control_epoch = op.holder, op.epoch
            case ops.Set():
                state.values[op.name] = op.value
            case ops.Doc():
                state.docs.setdefault(op.name, []).append(op.update)
            case ops.Feedback():
                if op.turn in self._turns:
                    self._touch(op.turn, offset).feedback = op.value
            case ops.Unknown():
                pass

    def _begin(self, turn: str) -> None:
        """First come, first served: who waited before the turn that begins lost its place."""
        places = [place for place, one in enumerate(self._state.waiting) if one.turn == turn]
        self._state.waiting = self._state.waiting[places[0] + 1 :] if places else []

    def _fold_turn(self, offset: int, op: ops.TurnStarted | ops.Frame | ops.TurnEnded) -> None:
        known = self._turns.get(op.turn)
        if known is not None and (known.ended or op.epoch < known.epoch):
            return
        turn = self._touch(op.turn, offset)
        turn.epoch = op.epoch
        match op:
            case ops.TurnStarted():
                turn.model, turn.max_tokens = op.model, op.max_tokens
                turn.weights = op.weights
                turn.sampling, turn.stop = op.sampling, op.stop
                turn.context_from = op.context_from
                turn.offline, turn.follows = op.offline, op.follows
                turn.edge = op.edge or turn.edge  # a take-over grants nothing anew
            case ops.Frame():
                have = len(turn.tokens)
                # A frame that begins beyond what the log has would leave a hole for ever.
                if op.index <= have < op.next_index:
                    turn.tokens.extend(op.tokens[have - op.index :])
                    turn.pieces.extend(op.pieces[have - op.index :])
            case ops.TurnEnded():
                turn.reason = op.reason
                turn.usage, turn.plan = op.usage, op.plan
                turn.error_code, turn.error_message = op.error_code, op.error_message

    def _touch(self, name: str, offset: int) -> TurnState:
        turn = self._turns.get(name)
        if turn is None:
            turn = TurnState(turn=name)
            self._turns[name] = turn
            self._state.turns.append(turn)
        turn.last_offset = offset
        return turn
