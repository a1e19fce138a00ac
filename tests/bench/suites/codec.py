"""How fast and how small the KV codec is, beside what one would write without it.

One core, one thread (numpy's elementwise passes use no others). Speeds are in MB of float16 KV per
second whatever the input's dtype, so that they compare with a link: 125 MB/s is 1 Gbps of float16.
Blocks rotate, so that no input stays in the second-level cache.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from segue_contract.kv.assembler import Assembler
from segue_contract.kv.frame import encode_frames
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock
from segue_contract.kv.quantize import decode_block, encode_block
from segue_contract.kv.steps import STEPS
from segue_contract.limits import KV_PART_BYTES
from tests.bench.harness import Report, median_of
from tests.bench.suites._codec_ladder import RECIPE, SMOL, cast, ladder, real_blocks

T = TypeVar("T")
TARGET_MB_PER_S = 1000.0


def synthetic_blocks(count: int, dtype: str) -> list[KvBlock]:
    """Random KV with a few large channels in K and a few large tokens, as models have them."""
    random = np.random.default_rng(7)
    shape = (SMOL.layers, SMOL.kv_heads, BLOCK_TOKENS, SMOL.head_dim)
    blocks = []
    for number in range(count):
        channels = np.exp(0.7 * random.standard_normal((SMOL.layers, SMOL.kv_heads, 1, 64)))
        tokens = np.exp(0.4 * random.standard_normal((SMOL.layers, SMOL.kv_heads, BLOCK_TOKENS, 1)))
        k = random.standard_normal(shape) * channels
        v = 0.3 * random.standard_normal(shape) * tokens
        blocks.append(KvBlock(bytes([number]) * 16, RECIPE, k.astype(dtype), v.astype(dtype)))
    return blocks


def mb_per_s(fn: Callable[[T], object], inputs: Iterable[T], repeats: int) -> float:
    """Float16 megabytes of KV per second, where `fn` handles one block; `inputs` take turns."""
    turns = cycle(inputs)
    return SMOL.fp16_bytes_per_block / 1e6 / median_of(lambda: fn(next(turns)), repeats, warmup=3)


def unframe(sent: tuple[bytes, KvBlock], dtype: str) -> None:
    """Take one block's stream in parts as gRPC delivers them."""
    stream, block = sent
    machine = Assembler(SMOL, frozenset([RECIPE]), [block.id], dtype=dtype)
    for start in range(0, len(stream), KV_PART_BYTES):
        machine.feed(memoryview(stream)[start : start + KV_PART_BYTES])
    machine.close()


def relative_error(got: NDArray[np.generic], sent: NDArray[np.generic]) -> float:
    wide = sent.astype(np.float64)
    return float(np.linalg.norm(got.astype(np.float64) - wide) / np.linalg.norm(wide))


def whole_path(report: Report, blocks: dict[str, list[KvBlock]], repeats: int) -> None:
    """Arrays to wire bytes and back, with frames and checksums."""
    streams = [encode_frames(block) for block in blocks["float32"]]
    wire = sum(map(len, streams)) / (len(streams) * SMOL.fp16_bytes_per_block)
    report.row("wire_vs_fp16", wire, "ratio", 0.55, "lower", "bytes on the wire, frames included")
    for dtype, suffix in (("float32", ""), ("float16", "_fp16")):
        pairs = list(zip(streams, blocks[dtype], strict=True))
        report.row(
            f"encode{suffix}_mb_per_s",
            mb_per_s(encode_frames, blocks[dtype], repeats),
            "MB/s",
            TARGET_MB_PER_S,
            note=f"{dtype} arrays to frames with CRC, one core",
        )
        report.row(
            f"decode{suffix}_mb_per_s",
            mb_per_s(partial(unframe, dtype=dtype), pairs, repeats),
            "MB/s",
            TARGET_MB_PER_S,
            note=f"frames in 256 KiB parts to {dtype} arrays",
        )


def steps(report: Report, blocks: list[KvBlock], repeats: int) -> None:
    """Every step of the ladder: bytes, speeds without frames, error."""
    for name in STEPS:
        payloads = [encode_block(block, name) for block in blocks]
        back = decode_block(payloads[0], SMOL, name)
        report.row(
            f"{name}_bytes_per_token",
            len(payloads[0]) / BLOCK_TOKENS,
            "bytes",
            note=f"fp16 takes {SMOL.fp16_bytes_per_token:,}",
        )
        report.row(
            f"{name}_encode_mb_per_s",
            mb_per_s(partial(encode_block, step=name), blocks, repeats),
            "MB/s",
            note="payload alone, float32",
        )
        report.row(
            f"{name}_decode_mb_per_s",
            mb_per_s(partial(decode_block, geometry=SMOL, step=name), payloads, repeats),
            "MB/s",
            note="payload alone, float32",
        )
        for part, got, sent in (("k", back.k, blocks[0].k), ("v", back.v, blocks[0].v)):
            report.row(
                f"{name}_{part}_relative_error",
                relative_error(got, sent),
                "ratio",
                note=f"norm of {part.upper()}'s error, synthetic KV",
            )


def peers(report: Report, blocks: list[KvBlock], repeats: int) -> None:
    """What one would write first: a cast, a general compressor, int8 by the book."""
    report.row(
        "peer_fp16_cast_mb_per_s",
        mb_per_s(cast, blocks, repeats),
        "MB/s",
        note="numpy's cast to float16, no compression",
    )
    halves = [cast(block) for block in blocks]
    squeeze: dict[str, Callable[[bytes], bytes]] = {"zlib1": partial(zlib.compress, level=1)}
    if find_spec("zstandard") is not None:  # only compared where it is installed
        squeeze["zstd1"] = import_module("zstandard").ZstdCompressor(level=1).compress
    for name, compress in squeeze.items():
        report.row(
            f"peer_{name}_vs_fp16",
            len(compress(halves[0])) / SMOL.fp16_bytes_per_block,
            "ratio",
            note="lossless on float16",
        )
        report.row(
            f"peer_{name}_mb_per_s",
            mb_per_s(compress, halves, max(1, repeats // 20)),
            "MB/s",
        )
    report.row(
        "peer_naive_int8_encode_mb_per_s",
        mb_per_s(naive_encode, blocks, repeats),
        "MB/s",
        note="the same scales in plain numpy, no checks",
    )
    stored = [naive_encode(block) for block in blocks]
    report.row(
        "peer_naive_int8_decode_mb_per_s",
        mb_per_s(naive_decode, stored, repeats),
        "MB/s",
        note="to float32",
    )


def naive_encode(block: KvBlock) -> list[tuple[bytes, bytes]]:
    parts = []
    for array, axis in ((block.k, 2), (block.v, 3)):
        scale = np.abs(array).max(axis=axis, keepdims=True) / 127
        numbers = np.round(array / scale).astype(np.int8)
        parts.append((scale.astype(np.float32).tobytes(), numbers.tobytes()))
    return parts


def naive_decode(parts: list[tuple[bytes, bytes]]) -> list[NDArray[np.float32]]:
    shape = (SMOL.layers, SMOL.kv_heads, BLOCK_TOKENS, SMOL.head_dim)
    arrays = []
    for (scales, numbers), axis in zip(parts, (2, 3), strict=True):
        small = tuple(1 if place == axis else size for place, size in enumerate(shape))
        scale = np.frombuffer(scales, np.float32).reshape(small)
        arrays.append(np.frombuffer(numbers, np.int8).reshape(shape).astype(np.float32) * scale)
    return arrays


def run(report: Report, quick: bool) -> None:
    count, repeats = (2, 3) if quick else (8, 200)
    blocks = {dtype: synthetic_blocks(count, dtype) for dtype in ("float32", "float16")}
    whole_path(report, blocks, repeats)
    steps(report, blocks["float32"], repeats)
    peers(report, blocks["float32"], repeats)
    ladder(report, real_blocks(count) or blocks["float32"], max(3, repeats // 4))
