"""Bytes off a stream, in pieces of any size, to committed blocks. No I/O.

What a peer sends becomes a block or a KvError, never anything else, and partial KV is never
handed out: a block appears with its commit record, after every checksum agreed. Memory is bounded
by `MAX_OPEN_BLOCKS` blocks of the geometry that the receiver serves.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import DTypeLike, NDArray

from segue_contract.errors import BadBlock, BadChecksum, BadRecipe, KvError, Truncated
from segue_contract.kv.frame import HEADER_BYTES, FrameHeader, Kind, commit_crc, read_header
from segue_contract.kv.layout import KvBlock, KvGeometry
from segue_contract.kv.quantize import decode_layers, empty_block
from segue_contract.kv.steps import Step, check_geometry, codec_named
from segue_contract.limits import MAX_OPEN_BLOCKS


@dataclass(frozen=True)
class EncodedPart:
    """The payload of layers [first, stop), its checksum verified."""

    first: int
    stop: int
    payload: NDArray[np.uint8]
    crc: int


@dataclass(frozen=True)
class EncodedBlock:
    """A committed block, complete and verified, not yet turned back into numbers."""

    id: bytes
    recipe: str
    geometry: KvGeometry
    step: Step
    sink_tokens: int
    parts: tuple[EncodedPart, ...]

    @property
    def wire_bytes(self) -> int:
        """Bytes that the block took on the stream, headers and commit record included."""
        payload = sum(part.payload.size for part in self.parts)
        return payload + HEADER_BYTES * (len(self.parts) + 1)


def decode_encoded(block: EncodedBlock, dtype: DTypeLike = np.float32) -> KvBlock:
    """The numbers of a committed block, float16 or float32; may run in any thread.

    Raises:
        BadBlock: a scale is out of range, or float16 cannot hold a number.
    """
    k, v = empty_block(block.geometry, dtype)
    for part in block.parts:
        decode_layers(
            part.payload, block.step, k[part.first : part.stop], v[part.first : part.stop],
            sink_tokens=block.sink_tokens,
        )  # fmt: skip
    return KvBlock(block.id, block.recipe, k, v)


@dataclass
class _Open:
    """A block begun and not committed."""

    recipe: str
    step: Step
    sink_tokens: int
    parts: list[EncodedPart] = field(default_factory=list)


class Assembler:
    """Collects one stream's frames.

    Args:
        geometry: the only one accepted.
        recipes: digests of the accepted recipes; as a mapping, each with the name of the codec
            that it stands for, which is then checked as well.
        expected: ids of the blocks that may come, each once; None: any block.
        dtype: what `feed` decodes to, float16 or float32.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        recipes: Collection[str],
        expected: Iterable[bytes] | None = None,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        check_geometry(geometry)
        self._geometry = geometry
        self._recipes = recipes
        self._expected = None if expected is None else set(expected)
        self._dtype = np.dtype(dtype)
        self._open: dict[bytes, _Open] = {}
        self._head = bytearray(HEADER_BYTES)
        self._frame: FrameHeader | None = None
        self._payload: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._have = 0  # bytes of the header or of the payload that came
        self._crc = 0
        self._failure: KvError | None = None
        self._closed = False
        self.received_bytes = 0

    @property
    def failure(self) -> KvError | None:
        """What broke the stream. It is refused from then on."""
        return self._failure

    def feed(self, data: bytes | bytearray | memoryview) -> list[KvBlock]:
        """Take the stream's next bytes; the blocks that became whole with them, decoded.

        Raises:
            KvError: the bytes are no KV stream of ours. Blocks that were whole before the fault
                are returned first: then the next call raises.
        """
        blocks = self.feed_encoded(data)
        try:
            return [decode_encoded(block, self._dtype) for block in blocks]
        except KvError as error:
            self._fail(error)
            raise

    def feed_encoded(self, data: bytes | bytearray | memoryview) -> list[EncodedBlock]:
        """As `feed`, but leaves the numbers to `decode_encoded`, off the event loop."""
        self._refuse_if_over()
        whole: list[EncodedBlock] = []
        try:
            self._take(memoryview(data).cast("B"), whole)
        except KvError as error:
            self._fail(error)
            if not whole:
                raise
        return whole

    def close(self) -> None:
        """The stream ended.

        Raises:
            Truncated: in mid-frame or in mid-block.
            KvError: the stream was broken before.
        """
        self._refuse_if_over()
        self._closed = True
        if self._have or self._frame is not None or self._open:
            open_blocks = len(self._open) or 1
            self._open.clear()
            raise Truncated(
                f"A KV stream ended with {open_blocks} block(s) not committed.",
                hint="The receiver recomputes them from the token ids.",
            )

    def check_integrity(self) -> None:
        """Assert what must hold between calls."""
        assert len(self._open) <= MAX_OPEN_BLOCKS
        assert self._failure is None or not self._open
        limit = HEADER_BYTES if self._frame is None else self._frame.payload_bytes
        assert 0 <= self._have < limit
        for block in self._open.values():
            layers = [n for part in block.parts for n in range(part.first, part.stop)]
            assert len(layers) == len(set(layers))
            assert all(n < self._geometry.layers for n in layers)

    def _refuse_if_over(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(self._failure.message, hint=self._failure.hint)
        if self._closed:
            raise BadBlock("This KV stream is closed.")

    def _fail(self, error: KvError) -> None:
        self._failure = error
        self._open.clear()
        self._frame = None
        self._payload = np.empty(0, np.uint8)
        self._have = 0

    def _take(self, data: memoryview, whole: list[EncodedBlock]) -> None:
        self.received_bytes += len(data)
        position = 0
        while position < len(data):
            if self._frame is None:
                position += self._take_header(data[position:], whole)
            else:
                position += self._take_payload(self._frame, data[position:])

    def _take_header(self, data: memoryview, whole: list[EncodedBlock]) -> int:
        piece = data[: HEADER_BYTES - self._have]
        self._head[self._have : self._have + len(piece)] = piece
        self._have += len(piece)
        if self._have == HEADER_BYTES:
            self._have = 0
            header = read_header(self._head)
            self._check_wanted(header)
            if header.kind is Kind.COMMIT:
                whole.append(self._commit(header))
            else:
                self._begin(header)
        return len(piece)

    def _take_payload(self, header: FrameHeader, data: memoryview) -> int:
        piece = data[: header.payload_bytes - self._have]
        self._payload[self._have : self._have + len(piece)] = np.frombuffer(piece, np.uint8)
        self._crc = zlib.crc32(piece, self._crc)
        self._have += len(piece)
        if self._have == header.payload_bytes:
            if self._crc != header.payload_crc:
                raise BadChecksum(
                    "A KV payload was changed on its way.", hint="Recompute or send it again."
                )
            part = EncodedPart(header.first_layer, header.stop_layer, self._payload, self._crc)
            self._open[header.block].parts.append(part)
            self._frame = None
            self._have = 0
        return len(piece)

    def _check_wanted(self, header: FrameHeader) -> None:
        """Raises BadRecipe or BadBlock where this receiver did not ask for such a block."""
        if header.geometry != self._geometry:
            raise BadBlock(
                f"A KV block has {header.geometry}; this model has {self._geometry}.",
                hint="Serve the same model on both sides.",
            )
        step = header.step.name
        if not self._accepts(header):
            raise BadRecipe(
                f"A KV block has recipe {header.recipe} ({step}), not allowed here.",
                hint="Serve the same build of the model on both sides.",
            )
        if self._expected is not None and header.block not in self._expected:
            raise BadBlock(f"KV block {header.block.hex()} was not asked for, or came before.")

    def _accepts(self, header: FrameHeader) -> bool:
        """The recipe is allowed, and the frame is coded as that recipe says."""
        if header.recipe not in self._recipes:
            return False
        if not isinstance(self._recipes, Mapping):
            return True
        codec = codec_named(self._recipes[header.recipe])
        return codec.step == header.step and header.sink_tokens in (0, codec.sink_tokens)

    def _begin(self, header: FrameHeader) -> None:
        """Make room for a data frame's payload; its size follows from the geometry."""
        block = self._open.get(header.block)
        if block is None:
            if len(self._open) >= MAX_OPEN_BLOCKS:
                raise BadBlock(
                    f"A KV stream began {MAX_OPEN_BLOCKS + 1} blocks without a commit.",
                    hint="Commit a block before beginning the next.",
                )
            block = _Open(header.recipe, header.step, header.sink_tokens)
            self._open[header.block] = block
        self._check_same(block, header)
        for part in block.parts:
            if header.first_layer < part.stop and part.first < header.stop_layer:
                raise BadBlock(
                    f"KV block {header.block.hex()} has layers "
                    f"[{header.first_layer}, {header.stop_layer}) twice."
                )
        self._frame = header
        self._payload = np.empty(header.payload_bytes, np.uint8)
        self._crc = 0

    def _commit(self, header: FrameHeader) -> EncodedBlock:
        block = self._open.get(header.block)
        if block is None:
            raise BadBlock(f"KV block {header.block.hex()} was committed before it began.")
        self._check_same(block, header)
        parts = tuple(sorted(block.parts, key=lambda part: part.first))
        # no two overlap, so the count decides
        if sum(part.stop - part.first for part in parts) != self._geometry.layers:
            raise BadBlock(f"KV block {header.block.hex()} was committed with layers missing.")
        if commit_crc(part.crc for part in parts) != header.payload_crc:
            raise BadChecksum("A KV commit record does not belong to its data frames.")
        del self._open[header.block]
        if self._expected is not None:
            self._expected.discard(header.block)
        return EncodedBlock(
            header.block, block.recipe, self._geometry, block.step, block.sink_tokens, parts
        )

    @staticmethod
    def _check_same(block: _Open, header: FrameHeader) -> None:
        if (block.recipe, block.step, block.sink_tokens) != (
            header.recipe, header.step, header.sink_tokens,
        ):  # fmt: skip
            raise BadBlock(
                f"The frames of KV block {header.block.hex()} disagree on recipe or codec."
            )
