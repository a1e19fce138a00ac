"""What the first rank tells the others, and how bytes become it again.

MessagePack under a length that is checked before anything is allocated, over a Unix socket in a
folder that only this user may enter. Arrays are their bytes in this machine's order: both ends are
processes of one program on one machine.
"""

from __future__ import annotations

import contextlib
import math
import socket
import struct
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from segue_cloud.engine.options import EngineOptions
from segue_contract.errors import UNREADABLE, BadLength, RankLost, SegueError
from segue_contract.limits import MAX_RANK_MESSAGE_BYTES, RANK_STEP_TIMEOUT_S
from segue_contract.model.manifest import ModelGeometry

_LENGTH = struct.Struct("<Q")
_DTYPES = frozenset(("float16", "float32", "uint16", "int32", "int64"))


class Array(msgspec.Struct, frozen=True, array_like=True):
    """A numpy array: dtype by name, shape, and its bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @staticmethod
    def of(values: NDArray[Any]) -> Array:
        return Array(values.dtype.name, values.shape, values.tobytes())

    def numpy(self) -> NDArray[Any]:
        """A copy that may be written to.

        Raises:
            BadLength: dtype, shape and bytes do not belong together.
        """
        if self.dtype not in _DTYPES or any(size < 0 for size in self.shape):
            raise BadLength(f"An array of {self.dtype} {list(self.shape)} is none of ours.")
        if len(self.data) != math.prod(self.shape) * np.dtype(self.dtype).itemsize:
            raise BadLength(f"{len(self.data)} bytes are no {self.dtype} {list(self.shape)}.")
        return np.frombuffer(self.data, self.dtype).reshape(self.shape).copy()


class SetUp(msgspec.Struct, frozen=True, tag="set_up"):
    """`options` are the whole engine's; `pages` are what each rank's pool holds."""

    directory: str
    geometry: ModelGeometry
    pages: int
    options: EngineOptions


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The rank has its weights and kernels, and goes to meet the others."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The rank cannot go on. `error`: see `SegueError.to_bytes`."""

    error: bytes


class WarmUp(msgspec.Struct, frozen=True, tag="warm_up"):
    """Compute what `Runner.touch` does, together."""


class ComputeStep(msgspec.Struct, frozen=True, tag="step"):
    """One step's input; see `step_input.StepInput` for shapes.

    `segments`: int64 `[N, 4]` (first, count, start, number of slots); `segment_slots`: the slots of
    all segments that have some, one after another. A rank makes the masks itself.
    """

    tokens: Array
    positions: Array
    slots: Array
    rows: Array
    tables: Array
    segments: Array
    segment_slots: Array
    logit_rows: Array


class WriteBlock(msgspec.Struct, frozen=True, tag="write"):
    """The rank's KV heads of a block, `[layers, its kv_heads, 64, head_dim]`, into four pages."""

    pages: tuple[int, ...]
    k: Array
    v: Array


class ReadBlock(msgspec.Struct, frozen=True, tag="read"):
    pages: tuple[int, ...]


class BlockRead(msgspec.Struct, frozen=True, tag="was_read"):
    """float32, shapes as in `WriteBlock`."""

    k: Array
    v: Array


Message: TypeAlias = (
    SetUp | Loaded | Failed | WarmUp | ComputeStep | WriteBlock | ReadBlock | BlockRead
)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """With its length in front."""
    body = _encoder.encode(message)
    assert len(body) <= MAX_RANK_MESSAGE_BYTES
    return _LENGTH.pack(len(body)) + body


class Control:
    """One end of a rank's socket. Used by one thread at a time.

    `rank`: whose socket it is, for messages of errors.
    """

    def __init__(self, rank: int, connection: socket.socket) -> None:
        self.rank = rank
        self._socket = connection

    def send(self, message: Message | bytes) -> None:
        """Send a message, or one that `encode` made already.

        Raises:
            RankLost: the other end is gone, or took nothing for `RANK_STEP_TIMEOUT_S`.
        """
        data = message if isinstance(message, bytes) else encode(message)
        try:
            self._socket.settimeout(RANK_STEP_TIMEOUT_S)
            self._socket.sendall(data)
        except OSError as error:
            raise self._lost(error) from error

    def receive(self, timeout_s: float | None) -> Message:
        """The next message; None waits as long as the other end lives.

        Raises:
            RankLost: the other end is gone, silent for `timeout_s`, or sent what is no message.
            SegueError: what the other end failed with.
        """
        try:
            self._socket.settimeout(timeout_s)
            (size,) = _LENGTH.unpack(self._read(_LENGTH.size))
            if size > MAX_RANK_MESSAGE_BYTES:
                raise RankLost(f"Rank {self.rank} announced a message of {size} bytes.")
            message: Message = _decoder.decode(self._read(size))
        except (OSError, *UNREADABLE) as error:
            raise self._lost(error) from error
        if isinstance(message, Failed):
            raise SegueError.from_bytes(message.error)
        return message

    def close(self) -> None:
        """Both ends notice; safe to call twice, and while another thread waits here."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._socket.recv_into(view)
            if count == 0:
                raise ConnectionResetError("it closed its socket")
            view = view[count:]
        return data

    def _lost(self, error: BaseException) -> RankLost:
        return RankLost(
            f"Rank {self.rank} is gone or does not answer: {error}.", hint="Its log says why."
        )
