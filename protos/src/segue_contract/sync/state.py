"""The folded form of a session log: what a late joiner gets instead of every entry."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import msgspec

from segue_contract.errors import UNREADABLE, InvalidArgument
from segue_contract.sync.ops import Sampling, Usage


class Cursor(msgspec.Struct, frozen=True, order=True):
    """Everything up to and including `offset` of `generation` is known; offset 0: nothing is."""

    generation: int = 1
    offset: int = 0


class TurnState(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One turn as the log has it so far.

    `pieces[i]` is the text that token `i` completed; `reason` is empty while the turn runs.
    `last_offset` is the offset of the last op that changed it. The model saw the conversation from
    turn `context_from` on (this one: no other); empty: from its beginning. `offline`: it was served
    out of reach of the log, after the turn `follows` (`segue_contract.sync.branches`). `edge`: to
    which one it was granted.
    """

    turn: str
    device: str = ""
    prompt: str = ""
    epoch: int = 0
    model: str = ""
    weights: str = ""  # digest of the model's weights
    max_tokens: int = 0
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    context_from: str = ""
    offline: bool = False
    follows: str = ""
    edge: str = ""
    tokens: list[int] = []
    pieces: list[str] = []
    reason: str = ""
    usage: Usage = Usage()
    plan: bytes = b""
    error_code: str = ""
    error_message: str = ""
    feedback: str = ""
    last_offset: int = 0

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def ended(self) -> bool:
        return bool(self.reason)


class WaitingTurn(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A message that waits for the session's turn; `prompt` is its beginning."""

    turn: str
    device: str = ""
    prompt: str = ""


class SessionState(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A whole session folded at `cursor`. `turns` are in order of their user_message, `waiting`
    (begun by nobody yet) in the order in which they came."""

    cursor: Cursor = Cursor()
    turns: list[TurnState] = []
    waiting: list[WaitingTurn] = []
    values: dict[str, bytes] = {}
    docs: dict[str, list[bytes]] = {}
    control_holder: str = ""
    control_epoch: int = 0
    claims: dict[str, str] = {}
    results: dict[str, bytes] = {}


def heard(turns: Iterable[TurnState]) -> list[TurnState]:
    """The turns that a later prompt carries on from.

    Left out: those that failed before a single token. Their user saw the error and asks again; a
    message beyond the context would otherwise make every later turn fail as well.
    """
    return [turn for turn in turns if _is_heard(turn)]


def without_unheard(turn: TurnState) -> TurnState:
    """`turn`, without its message where no later prompt has it: a few messages beyond the context
    are larger than a reply of gRPC."""
    return turn if _is_heard(turn) else msgspec.structs.replace(turn, prompt="")


def _is_heard(turn: TurnState) -> bool:
    return bool(turn.tokens) or turn.reason != "error"


_state_decoder = msgspec.msgpack.Decoder(SessionState)
_turns_decoder = msgspec.msgpack.Decoder(list[TurnState])


def find_turn(state: SessionState, turn: str) -> TurnState | None:
    """The turn of that id; None where the session has none."""
    return next((known for known in reversed(state.turns) if known.turn == turn), None)


def encode_state(state: SessionState) -> bytes:
    return msgspec.msgpack.encode(state)


def decode_state(data: bytes) -> SessionState:
    """Raises InvalidArgument where the bytes are no session state."""
    try:
        return _state_decoder.decode(data)
    except UNREADABLE as error:
        raise InvalidArgument(f"These bytes are no session state: {error}.") from error


class _RawState(msgspec.Struct, kw_only=True):
    """A `SessionState` whose turns are encoded: nearly all of a large one."""

    cursor: Cursor = Cursor()
    turns: list[msgspec.Raw] = []
    waiting: list[WaitingTurn] = []
    values: dict[str, bytes] = {}
    docs: dict[str, list[bytes]] = {}
    control_holder: str = ""
    control_epoch: int = 0
    claims: dict[str, str] = {}
    results: dict[str, bytes] = {}


assert _RawState.__struct_fields__ == SessionState.__struct_fields__, "one lacks a field"
_raw_decoder = msgspec.msgpack.Decoder(_RawState)
_turn_decoder = msgspec.msgpack.Decoder(TurnState)


def decode_state_in_slices(data: bytes, slice_bytes: int) -> Generator[None, None, SessionState]:
    """As `decode_state`, a piece at a time: yields after each `slice_bytes` of turns or so.

    Decoding makes an object of each token: 25 ms a MiB.
    """
    try:
        raw = _raw_decoder.decode(data)
        turns: list[TurnState] = []
        size = 0
        for one in raw.turns:
            turns.append(_turn_decoder.decode(one))
            size += len(memoryview(one))
            if size >= slice_bytes:
                size = 0
                yield
    except UNREADABLE as error:
        raise InvalidArgument(f"These bytes are no session state: {error}.") from error
    rest = {name: getattr(raw, name) for name in raw.__struct_fields__ if name != "turns"}
    return SessionState(turns=turns, **rest)


def encode_state_in_slices(state: SessionState, slice_bytes: int) -> Generator[None, None, bytes]:
    """As `encode_state`, a piece at a time, alike; 3 ms a MiB. Nobody may change `state` meanwhile.

    The bytes may differ from those of `encode_state`; they say the same.
    """
    turns: list[msgspec.Raw] = []
    size = 0
    for turn in state.turns:
        data = msgspec.msgpack.encode(turn)
        turns.append(msgspec.Raw(data))
        size += len(data)
        if size >= slice_bytes:
            size = 0
            yield
    rest = {name: getattr(state, name) for name in state.__struct_fields__ if name != "turns"}
    return msgspec.msgpack.encode(_RawState(turns=turns, **rest))


def encode_turns(turns: list[TurnState]) -> bytes:
    return msgspec.msgpack.encode(turns)


def decode_turns(data: bytes) -> list[TurnState]:
    """Raises InvalidArgument where the bytes are no list of turns."""
    try:
        return _turns_decoder.decode(data)
    except UNREADABLE as error:
        raise InvalidArgument(f"These bytes are no list of turns: {error}.") from error
