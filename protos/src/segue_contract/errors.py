"""The one error tree of Segue.

SegueError
├── InvalidArgument            the caller's request cannot be served as written
│   ├── EmptyPrompt            nothing to answer
│   ├── PromptTooLong          prompt + max_tokens exceed the model's context
│   └── BadSampling            temperature, top_p, top_k, min_p or max_tokens out of range
├── NotFound
│   ├── UnknownSession         no such session (and the caller did not want one created)
│   │   └── SessionDeleted     it was deleted, or expired
│   ├── UnknownDevice          the device never joined this session
│   ├── UnknownTurn            no such turn in this session
│   └── UnknownModel           this node serves another model
├── SessionBusy                another turn runs, and the caller chose not to wait
├── TurnConflict               the turn's id was used for something else in this session
├── TurnCancelled              the turn was stopped while it waited; nothing of it is in the log
├── Overloaded                 a bound is reached; `retry_after_s` says when to come back
├── StaleEpoch                 a newer holder exists; `current` is its epoch
├── SequenceGap                `expected` is the sequence number the log waits for
├── OutcomeUnknown             an append may be in the log or not: read before repeating it
├── CursorAhead                the log ends before the place that was asked for
├── QuotaExceeded              a session or tenant has as much as it may; `retry_after_s`: of a rate
├── SessionNotEmpty            an import needs a new name, or a session without entries
├── BadExport                  the file is no whole export of a session; nothing was written
├── StoreUnavailable           no answer of the store in time; a write may have been applied
├── Unreachable                the other side cannot be reached
├── RankLost                   a rank of a tensor-parallel engine ended or did not answer in time
├── EngineGone                 this engine computes no more; a turn of it goes on elsewhere
├── DeadlineExceeded           it took longer than its bound
├── TurnFailed                 the turn ended with an error after it began
├── ModelError                 a model directory is missing, of another family, or was changed
│   ├── ModelMissing           no built model of that name
│   ├── ModelMismatch          manifest and files, or edge and cloud, disagree
│   └── ModelBuildFailed       the build stopped; nothing half-built is left
├── KvError                    bytes of a KV stream that are no KV of ours
│   ├── BadMagic · BadVersion · BadLength · BadChecksum · BadRecipe · BadBlock · Truncated
├── Unauthenticated            nobody knows who calls: no token or certificate, or a bad one
│   ├── UnknownNode            the connection's certificate is missing, or not of the right node
│   └── Revoked                the device's tokens for the session were made void
├── PermissionDenied           it is known who calls, and they may not do that
├── NotLoopback                a listener would leave this machine without authentication
├── PortInUse                  another program listens there
├── OtherBroker                the clouds on this store publish through another broker; `url`
├── MissingExtra               a package of an optional extra is not installed
├── StartFailed                a program that we started ended, or was not ready in time
└── Internal                   a fault of ours

Every error has a stable `code` (its snake_case name), a `message` that says what happened, a
`hint` that says what to do, and `fields` that programs may read. `grpc_code` names the gRPC
status that carries it; `segue_contract.transport.status` does the mapping.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import msgspec

from segue_contract.limits import (
    MAX_ERROR_FIELD_BYTES,
    MAX_ERROR_FIELDS,
    MAX_ERROR_TEXT_BYTES,
)

# What msgspec raises on bytes from elsewhere: no MessagePack or another type, text that is no
# UTF-8, nesting without end.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_TREE: dict[str, type[SegueError]] = {}


class SegueError(Exception):
    """Root of the tree.

    Args:
        message: what happened, one sentence.
        hint: what the reader can do about it, one sentence.
        fields: machine-readable facts; values are str, int, float or bool.
    """

    grpc_code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    code: ClassVar[str] = "segue_error"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
        _TREE[cls.code] = cls

    def __init__(self, message: str, *, hint: str = "", **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields = fields

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    @property
    def retry_after_s(self) -> float | None:
        """Seconds after which the same call has a chance; None: nobody said.

        Made from `fields`, which a peer may have sent.
        """
        wait_s = self.fields.get("retry_after_s")
        if isinstance(wait_s, bool) or not isinstance(wait_s, int | float):
            return None
        return float(wait_s) if 0 <= wait_s < float("inf") else None

    def to_bytes(self) -> bytes:
        """MessagePack of {code, message, hint, fields}; `from_bytes` reads it back.

        Bounded, since it travels in a header: what somebody sent may be part of a message.
        """
        fields = {
            name: shorten(value, MAX_ERROR_FIELD_BYTES) if isinstance(value, str) else value
            for name, value in list(self.fields.items())[:MAX_ERROR_FIELDS]
        }
        message = shorten(self.message, MAX_ERROR_TEXT_BYTES)
        hint = shorten(self.hint, MAX_ERROR_TEXT_BYTES)
        return msgspec.msgpack.encode(_Wire(self.code, message, hint, fields))

    @staticmethod
    def from_bytes(data: bytes) -> SegueError:
        """The error that a peer sent; an unknown code or unreadable bytes become `Internal`."""
        try:
            wire = msgspec.msgpack.decode(data, type=_Wire)
        except UNREADABLE:
            return Internal("The peer sent an error that cannot be read.")
        error = SegueError.of(wire.code, wire.message, wire.hint)
        error.fields = wire.fields  # a peer's names must not meet our parameters' names
        return error

    @staticmethod
    def of(code: str, message: str, hint: str = "", **fields: Any) -> SegueError:
        """The error class of that `code`; an unknown code becomes `Internal`."""
        return _TREE.get(code, Internal)(message, hint=hint, **fields)


def shorten(text: str, size: int) -> str:
    """`text`, cut so that it has `size` bytes of UTF-8 at the most."""
    data = text.encode(errors="replace")
    return text if len(data) <= size else data[: size - 3].decode(errors="ignore") + "…"


class _Wire(msgspec.Struct, array_like=True):
    code: str
    message: str
    hint: str
    fields: dict[str, str | int | float | bool]


class InvalidArgument(SegueError):
    grpc_code = "INVALID_ARGUMENT"


class EmptyPrompt(InvalidArgument):
    pass


class PromptTooLong(InvalidArgument):
    pass


class BadSampling(InvalidArgument):
    pass


class NotFound(SegueError):
    grpc_code = "NOT_FOUND"


class UnknownSession(NotFound):
    pass


class SessionDeleted(UnknownSession):
    """Its name may be used again, for another session."""


class UnknownDevice(NotFound):
    pass


class UnknownTurn(NotFound):
    pass


class UnknownModel(NotFound):
    pass


class SessionBusy(SegueError):
    grpc_code = "ABORTED"
    retryable = True


class TurnConflict(SegueError):
    grpc_code = "ALREADY_EXISTS"


class TurnCancelled(SegueError):
    grpc_code = "ABORTED"


class Overloaded(SegueError):
    """`retry_after_s`, where it is known: when a retry has a chance."""

    grpc_code = "RESOURCE_EXHAUSTED"
    retryable = True


class StaleEpoch(SegueError):
    """`fields["current"]`: the epoch that holds now."""

    grpc_code = "FAILED_PRECONDITION"


class SequenceGap(SegueError):
    """`fields["expected"]`: the sequence number that the log waits for."""

    grpc_code = "FAILED_PRECONDITION"


class OutcomeUnknown(SegueError):
    """It may have been done: look before doing it again."""

    grpc_code = "ABORTED"


class CursorAhead(SegueError):
    """`fields["generation"]`, `fields["offset"]`: where the log ends."""

    grpc_code = "OUT_OF_RANGE"


class QuotaExceeded(SegueError):
    """`fields["what"]` and `fields["limit"]`: which bound, and how much it allows. What a session
    may hold is bytes, values, docs or kept_ops.

    One of a rate carries `retry_after_s` and passes by itself; where that is None, something has to
    be given up first. Other nodes count alike, so none of them is tried instead.
    """

    grpc_code = "RESOURCE_EXHAUSTED"


class SessionNotEmpty(SegueError):
    grpc_code = "ALREADY_EXISTS"


class BadExport(SegueError):
    grpc_code = "DATA_LOSS"


class StoreUnavailable(SegueError):
    grpc_code = "UNAVAILABLE"
    retryable = True


class Unreachable(SegueError):
    grpc_code = "UNAVAILABLE"
    retryable = True


class RankLost(SegueError):
    grpc_code = "UNAVAILABLE"
    retryable = True


class EngineGone(SegueError):
    grpc_code = "UNAVAILABLE"
    retryable = True


class DeadlineExceeded(SegueError):
    grpc_code = "DEADLINE_EXCEEDED"
    retryable = True


class TurnFailed(SegueError):
    grpc_code = "ABORTED"


class ModelError(SegueError):
    grpc_code = "FAILED_PRECONDITION"


class ModelMissing(ModelError):
    pass


class ModelMismatch(ModelError):
    pass


class ModelBuildFailed(ModelError):
    pass


class KvError(SegueError):
    grpc_code = "DATA_LOSS"


class BadMagic(KvError):
    pass


class BadVersion(KvError):
    pass


class BadLength(KvError):
    pass


class BadChecksum(KvError):
    pass


class BadRecipe(KvError):
    pass


class BadBlock(KvError):
    pass


class Truncated(KvError):
    pass


class Unauthenticated(SegueError):
    """Never quotes a token. With a new token the same call may be made again."""

    grpc_code = "UNAUTHENTICATED"


class UnknownNode(Unauthenticated):
    """The certificate of the connection is missing, or not that of a node which may do this."""


class Revoked(Unauthenticated):
    """Tokens that are issued from now on count again."""


class PermissionDenied(SegueError):
    """`fields["verb"]`, `fields["rights"]`: what was asked, and what is missing, where known."""

    grpc_code = "PERMISSION_DENIED"


class NotLoopback(SegueError):
    grpc_code = "INVALID_ARGUMENT"


class PortInUse(SegueError):
    grpc_code = "INVALID_ARGUMENT"


class OtherBroker(SegueError):
    grpc_code = "FAILED_PRECONDITION"


class MissingExtra(SegueError):
    grpc_code = "UNIMPLEMENTED"


class StartFailed(SegueError):
    """`fields["program"]`, and `fields["exit_code"]` where it ended."""

    grpc_code = "UNAVAILABLE"


class Internal(SegueError):
    grpc_code = "INTERNAL"
