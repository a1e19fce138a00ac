"""The entries of the session log: what each op says, and its bytes.

An op is MessagePack of a map with a `kind` tag. Readers ignore fields they do not know, so fields
may be added; a kind that a reader does not know decodes to `Unknown` and keeps its place.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from segue_contract.errors import UNREADABLE, InvalidArgument
from segue_contract.ids import digest
from segue_contract.limits import MAX_OP_BYTES


class _Op(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True):
    """Fields of every op: `id` is unique in the session, `at_ms` is the writer's wall clock."""

    id: str
    device: str = ""
    at_ms: int = 0


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen; the rule is `segue_contract.sampling`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0


class Usage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    edge_cached_tokens: int = 0
    cloud_cached_tokens: int = 0


class UserMessage(_Op, frozen=True, kw_only=True, tag="user_message"):
    turn: str
    text: str


class TurnStarted(_Op, frozen=True, kw_only=True, tag="turn_started"):
    """The turn's first op, and again with a higher epoch when another decoder takes it over.

    `weights`: digest of the model's weights that decode it. `context_from`: id of the first turn
    that the model sees (this one: no other); empty: all.
    `offline`: it was served out of reach of the log, by a node that knew the session up to the
    turn `follows` (empty: nothing of it). `edge`: the certificate's name of the edge that it was
    granted to, which alone may give its tokens and KV; empty: none.
    """

    turn: str
    epoch: int
    model: str = ""
    weights: str = ""
    max_tokens: int = 0
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    context_from: str = ""
    offline: bool = False
    follows: str = ""
    edge: str = ""


class TurnWaiting(_Op, frozen=True, kw_only=True, tag="turn_waiting"):
    """A message that waits for the session's turn; `text` is its beginning. Its user_message, or
    turn_withdrawn, ends the wait."""

    turn: str
    text: str = ""


class TurnWithdrawn(_Op, frozen=True, kw_only=True, tag="turn_withdrawn"):
    """The turn waits no more, and will not begin: it was stopped, or nobody waits for it."""

    turn: str


class Frame(_Op, frozen=True, kw_only=True, tag="frame"):
    """Tokens [index, index + len(tokens)) of a turn's reply; `pieces` joined are their text."""

    turn: str
    epoch: int
    index: int
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    made_by: str = "cloud"

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def next_index(self) -> int:
        return self.index + len(self.tokens)


class ToolCall(_Op, frozen=True, kw_only=True, tag="tool_call"):
    turn: str
    call: str
    name: str
    arguments: bytes = b""


class ToolClaim(_Op, frozen=True, kw_only=True, tag="tool_claim"):
    call: str


class ToolResult(_Op, frozen=True, kw_only=True, tag="tool_result"):
    call: str
    result: bytes = b""


class TurnEnded(_Op, frozen=True, kw_only=True, tag="turn_ended"):
    """Closes a turn. `reason`: stop, length, cancelled or error."""

    turn: str
    epoch: int
    reason: str
    usage: Usage = Usage()
    plan: bytes = b""
    error_code: str = ""
    error_message: str = ""


class Control(_Op, frozen=True, kw_only=True, tag="control"):
    """`holder` holds the right to act from here on, under `epoch`; empty: nobody does."""

    holder: str
    epoch: int


class Set(_Op, frozen=True, kw_only=True, tag="set"):
    """A named value; the last writer by offset wins."""

    name: str
    value: bytes


class Doc(_Op, frozen=True, kw_only=True, tag="doc"):
    """An opaque CRDT update of a shared free text."""

    name: str
    update: bytes


class Feedback(_Op, frozen=True, kw_only=True, tag="feedback"):
    turn: str
    value: str


class Unknown(_Op, frozen=True, kw_only=True, tag="unknown"):
    """An op of a later version: it has an offset and no effect here."""

    original: bytes = b""


Op: TypeAlias = (
    UserMessage
    | TurnStarted
    | TurnWaiting
    | TurnWithdrawn
    | Frame
    | ToolCall
    | ToolClaim
    | ToolResult
    | TurnEnded
    | Control
    | Set
    | Doc
    | Feedback
    | Unknown
)

# What a device may append itself; the rest is written by the owner of a turn.
DEVICE_KINDS = (ToolCall, ToolClaim, ToolResult, Set, Doc, Feedback)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Op)


class _Head(msgspec.Struct):
    id: str = ""
    kind: str = ""


_head_decoder = msgspec.msgpack.Decoder(_Head)


def encode_op(op: Op) -> bytes:
    """Bytes of one op.

    Raises:
        InvalidArgument: larger than `MAX_OP_BYTES`.
    """
    data = _encoder.encode(op)
    if len(data) > MAX_OP_BYTES:
        raise InvalidArgument(
            f"One log entry would have {len(data)} bytes; {MAX_OP_BYTES} are allowed.",
            hint="Send the content in smaller parts.",
        )
    return data


def request_digest(prompt: str, max_tokens: int, sampling: Sampling, stop: tuple[str, ...]) -> str:
    """What tells the same question, asked again, from another one under the same turn id."""
    floats = (float(sampling.temperature), float(sampling.top_p), float(sampling.min_p))
    # By its numbers: `omit_defaults` leaves out by identity, so equal structs may differ in bytes.
    asked = (prompt, max_tokens, floats, sampling.top_k, sampling.seed, stop)
    return digest(_encoder.encode(asked)).hex()


def decode_op(data: bytes) -> Op:
    """The op in `data`; a kind of a later version becomes `Unknown`.

    Raises:
        InvalidArgument: the bytes are no op.
    """
    if len(data) > MAX_OP_BYTES:
        raise InvalidArgument(f"A log entry of {len(data)} bytes is over the limit.")
    try:
        op: Op = _decoder.decode(data)
        return op
    except UNREADABLE as error:
        try:
            head = _head_decoder.decode(data)
        except UNREADABLE:
            head = _Head()
        if head.id and head.kind and head.kind not in _KINDS:
            return Unknown(id=head.id, original=data)
        raise InvalidArgument(f"These bytes are no log entry: {error}.") from error


_KINDS = frozenset(
    str(cls.__struct_config__.tag)
    for cls in (
        UserMessage, TurnStarted, TurnWaiting, TurnWithdrawn, Frame, ToolCall, ToolClaim,
        ToolResult, TurnEnded, Control, Set, Doc, Feedback, Unknown,
    )
)  # fmt: skip
