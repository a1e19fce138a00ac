"""Frames: how the payloads of a block travel, and the record that makes the block whole.

    stream  = frame*
    frame   = header payload        kind DATA: layers [first, stop) of one block
            | header                kind COMMIT: all layers were sent

The header is 64 bytes, little-endian:

    offset  size  field
     0      4     magic "SGKV"
     4      1     version (1)
     5      1     kind: 1 data, 2 commit
     6      1     codec step (segue_contract.kv.steps)
     7      1     sink tokens kept in float16
     8      2     layers of the whole block
    10      2     KV heads
    12      2     head dimension
    14      2     first layer of this frame
    16      2     layer after the last
    18      2     zero
    20     16     block id
    36     16     recipe digest
    52      4     payload bytes; in a commit record those of all data frames together
    56      4     CRC-32 of the payload; in a commit record that of the data frames' CRCs in the
                  order of their layers, 4 bytes each
    60      4     CRC-32 of the 60 bytes before
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from segue_contract.errors import (
    BadBlock,
    BadChecksum,
    BadLength,
    BadMagic,
    BadRecipe,
    BadVersion,
)
from segue_contract.kv.kernels import Array
from segue_contract.kv.layout import KvBlock, KvGeometry
from segue_contract.kv.quantize import encode_layers, geometry_of
from segue_contract.kv.steps import (
    DEFAULT_STEP,
    MAX_SINK_TOKENS,
    Step,
    check_geometry,
    payload_bytes,
    step_named,
    step_of_code,
)
from segue_contract.limits import KV_FRAME_BYTES, MAX_KV_FRAME_BYTES

MAGIC = b"SGKV"
VERSION = 1
_FIELDS = struct.Struct("<4sBBBBHHHHHH16s16sII")
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CRC.size
_RECIPE_BYTES = 16


class Kind(IntEnum):
    DATA = 1
    COMMIT = 2


@dataclass(frozen=True)
class FrameHeader:
    """A frame's header, checked. `recipe` is the digest's 32 hex digits."""

    kind: Kind
    step: Step
    sink_tokens: int
    geometry: KvGeometry
    first_layer: int
    stop_layer: int
    block: bytes
    recipe: str
    payload_bytes: int
    payload_crc: int

    def write(self, out: memoryview) -> None:
        """Put the header's bytes at the start of `out`."""
        size = self.geometry
        _FIELDS.pack_into(
            out, 0, MAGIC, VERSION, self.kind, self.step.code, self.sink_tokens,
            size.layers, size.kv_heads, size.head_dim, self.first_layer, self.stop_layer, 0,
            self.block, _recipe_bytes(self.recipe), self.payload_bytes, self.payload_crc,
        )  # fmt: skip
        _CRC.pack_into(out, _FIELDS.size, zlib.crc32(out[: _FIELDS.size]))


def read_header(data: bytes | bytearray | memoryview) -> FrameHeader:
    """The header in the first `HEADER_BYTES` of `data`.

    Raises:
        BadMagic, BadVersion, BadChecksum: these are no bytes of ours, or not any more.
        BadLength: the payload has another size than the fields ask for, or is over the limit.
        BadBlock: fields that contradict each other or the limits.
    """
    view = memoryview(data)[:HEADER_BYTES]
    (
        magic, version, kind, code, sink, layers, kv_heads, head_dim, first, stop, zero,
        block, recipe, size, crc,
    ) = _FIELDS.unpack_from(view)  # fmt: skip
    if magic != MAGIC:
        raise BadMagic(
            f"A KV frame begins with {magic!r}, not {MAGIC!r}.",
            hint="The sender is no Segue edge, or the stream lost bytes.",
        )
    if version != VERSION:
        raise BadVersion(
            f"A KV frame has version {version}; this program reads {VERSION}.",
            hint="Run the same version of Segue on both sides.",
            version=version,
        )
    if zlib.crc32(view[: _FIELDS.size]) != _CRC.unpack_from(view, _FIELDS.size)[0]:
        raise BadChecksum("A KV frame's header was changed on its way.", hint="Send it again.")
    if kind not in (Kind.DATA, Kind.COMMIT) or zero or sink > MAX_SINK_TOKENS:
        raise BadBlock(f"A KV frame has kind {kind}, {sink} sink tokens and reserved bits {zero}.")
    geometry = KvGeometry(layers=layers, kv_heads=kv_heads, head_dim=head_dim)
    check_geometry(geometry)
    whole = kind == Kind.DATA or (first, stop) == (0, layers)
    if not (0 <= first < stop <= layers and whole):
        raise BadBlock(f"A KV frame holds layers [{first}, {stop}) of {layers}.")
    step = step_of_code(code)
    header = FrameHeader(
        Kind(kind), step, sink, geometry, first, stop, block, recipe.hex(), size, crc
    )
    _check_size(header)
    return header


def _check_size(header: FrameHeader) -> None:
    """Raises BadLength where the payload's size does not follow from the other fields."""
    layers = header.stop_layer - header.first_layer
    right = payload_bytes(header.step, header.geometry, layers, header.sink_tokens)
    if header.kind is Kind.DATA and right > MAX_KV_FRAME_BYTES:
        raise BadLength(
            f"A KV frame announces {right} bytes; {MAX_KV_FRAME_BYTES} are allowed.",
            hint="Send fewer layers in a frame.",
        )
    if header.payload_bytes != right:
        raise BadLength(f"A KV frame announces {header.payload_bytes} bytes; {right} belong.")


def commit_crc(crcs: Iterable[int]) -> int:
    """CRC-32 over the CRCs of a block's data frames, in the order of their layers."""
    return zlib.crc32(b"".join(map(_CRC.pack, crcs)))


class FrameWriter:
    """Frames of one block, some layers at a time, then the commit record.

    Args:
        id: the block's 16 bytes.
        recipe: digest of its recipe, 32 hex digits.
        geometry: sizes of the whole block.
        step: a name of `segue_contract.kv.steps.STEPS`.
        sink_tokens: this many first tokens stay float16.

    Raises:
        BadBlock, BadRecipe, BadVersion: one of these is not what it must be.
    """

    def __init__(
        self,
        id: bytes,
        recipe: str,
        geometry: KvGeometry,
        step: str = DEFAULT_STEP,
        *,
        sink_tokens: int = 0,
    ) -> None:
        if len(id) != 16:
            raise BadBlock(f"A block id has 16 bytes, not {len(id)}.")
        if not 0 <= sink_tokens <= MAX_SINK_TOKENS:
            raise BadBlock(f"{sink_tokens} sink tokens; at most {MAX_SINK_TOKENS} are allowed.")
        check_geometry(geometry)
        _recipe_bytes(recipe)
        self._id = id
        self._recipe = recipe
        self._geometry = geometry
        self._step = step_named(step)
        self._sink = sink_tokens
        self._crcs: dict[int, int] = {}
        self._sent = 0  # layers

    def frame_bytes(self, layers: int) -> int:
        """Size of a data frame of `layers` layers, with its header."""
        return HEADER_BYTES + payload_bytes(self._step, self._geometry, layers, self._sink)

    def layers_within(self, limit: int) -> int:
        """How many layers a frame of at most `limit` bytes holds; at least one."""
        return max(1, min(self._geometry.layers, limit // self.frame_bytes(1)))

    def write_layers(self, first: int, k: Array, v: Array, out: memoryview) -> None:
        """Fill `out`, of exactly `frame_bytes(len(k))`, with layers [first, first + len(k))."""
        stop = first + len(k)
        assert stop <= self._geometry.layers
        assert first not in self._crcs
        payload = out[HEADER_BYTES:]
        target = np.frombuffer(payload, np.uint8)
        encode_layers(k, v, self._step, target, sink_tokens=self._sink)
        crc = zlib.crc32(payload)
        self._header(Kind.DATA, first, stop, crc).write(out)
        self._crcs[first] = crc
        self._sent += len(k)

    def write_commit(self, out: memoryview) -> None:
        """Fill `out`, of `HEADER_BYTES`, with the commit record."""
        assert self._sent == self._geometry.layers, "a commit before all layers"
        crc = commit_crc(crc for _, crc in sorted(self._crcs.items()))
        self._header(Kind.COMMIT, 0, self._geometry.layers, crc).write(out)

    def _header(self, kind: Kind, first: int, stop: int, crc: int) -> FrameHeader:
        size = payload_bytes(self._step, self._geometry, stop - first, self._sink)
        return FrameHeader(
            kind, self._step, self._sink, self._geometry, first, stop, self._id, self._recipe,
            size, crc,
        )  # fmt: skip


def encode_frames(
    block: KvBlock,
    step: str = DEFAULT_STEP,
    *,
    sink_tokens: int = 0,
    frame_bytes: int = KV_FRAME_BYTES,
) -> bytes:
    """All of a block's bytes on the wire: data frames of about `frame_bytes`, then the commit.

    Raises:
        BadBlock: K or V of a wrong shape or dtype, NaN, infinity, a bad id.
        BadRecipe: `block.recipe` is no recipe digest.
        BadVersion: no such step.
    """
    geometry = geometry_of(block.k, block.v)
    writer = FrameWriter(block.id, block.recipe, geometry, step, sink_tokens=sink_tokens)
    run = writer.layers_within(min(frame_bytes, MAX_KV_FRAME_BYTES))
    cuts = [*range(0, geometry.layers, run), geometry.layers]
    sizes = [writer.frame_bytes(b - a) for a, b in itertools.pairwise(cuts)]
    out = np.empty(sum(sizes) + HEADER_BYTES, np.uint8)  # not zeroed first, unlike a bytearray
    position = 0
    with out.data as view:
        for first, stop, size in zip(cuts, cuts[1:], sizes, strict=False):
            frame = view[position : position + size]
            writer.write_layers(first, block.k[first:stop], block.v[first:stop], frame)
            position += size
        writer.write_commit(view[position:])
        return bytes(view)


def _recipe_bytes(recipe: str) -> bytes:
    """The digest's 16 bytes. Raises BadRecipe where it is no digest."""
    try:
        data = bytes.fromhex(recipe)
    except ValueError:
        data = b""
    if len(data) != _RECIPE_BYTES:
        raise BadRecipe(f"{recipe!r} is no recipe digest.", hint="Use KvRecipe.digest.")
    return data
