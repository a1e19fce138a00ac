"""How fast and how small the KV codec is, beside what one would write without it.

One core, one thread (numpy's elementwise passes use no others). Speeds are in MB of float16 KV per
second whatever the input's dtype, so that they compare with a link: 125 MB/s is 1 Gbps of float16.
Blocks rotate, so that no input stays in the second-level cache.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from segue_contract.kv.assembler import Assembler
from segue_contract.kv.frame import encode_frames
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, KvGeometry
from segue_contract.kv.quantize import decode_block, encode_block
from segue_contract.kv.steps import STEPS
from segue_contract.limits import KV_PART_BYTES
from segue_contract.model.manifest import DEFAULT_MODEL, is_built, model_home, read_manifest
from tests.bench.harness import Report, median_of

T = TypeVar("T")
SMOL = KvGeometry(layers=30, kv_heads=3, head_dim=64)
RECIPE = "5e" * 16
TARGET_MB_PER_S = 1000.0
EVERY_LINK_MBIT_S = 1e6  # stands for "however fast": a row is a finite number


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
        mb_per_s(_cast, blocks, repeats),
        "MB/s",
        note="numpy's cast to float16, no compression",
    )
    halves = [_cast(block) for block in blocks]
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


@dataclass(frozen=True)
class Rung:
    """One step of the ladder as the table shows it. Seconds are those of one block."""

    name: str
    bytes_per_token: float
    encode_s: float
    decode_s: float
    agreement: float | None = None

    @property
    def speed(self) -> tuple[float, float]:
        """Float16 megabytes of KV per second: encode, decode."""
        size = SMOL.fp16_bytes_per_block / 1e6
        return size / self.encode_s, size / self.decode_s


def pays_below_mbit_s(step: Rung, before: Rung) -> float:
    """Link speed below which `step` ships a block sooner than `before` does.

    A block takes encode + bytes / link + decode. So the step pays where its extra time is less
    than the time that its saved bytes would take:

        link < (bytes before - bytes) / (encode + decode - (encode + decode before))

    A step that is no slower pays on every link: infinity. Nothing is taken off for encoding while
    the link is busy with the block before, which the product does: real links may be faster still.
    """
    saved = (before.bytes_per_token - step.bytes_per_token) * BLOCK_TOKENS
    extra = step.encode_s + step.decode_s - before.encode_s - before.decode_s
    if saved <= 0:
        return 0.0
    return 8 * saved / extra / 1e6 if extra > 0 else math.inf


def real_blocks(count: int) -> list[KvBlock]:
    """KV of the built default model; empty where there is none."""
    directory = model_home() / DEFAULT_MODEL
    if not is_built(directory):
        return []
    from tokenizers import Tokenizer

    from segue_edge.prefill.gate import package_text
    from segue_edge.prefill.runtime import EdgeModel

    model = EdgeModel.load(directory, providers="cpu")
    if model.geometry != SMOL:
        return []
    text = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(package_text()).ids
    kv = model.prefill(text[: count * BLOCK_TOKENS]).kv
    return [KvBlock(bytes([index]) * 16, RECIPE, *kv.block(index)) for index in range(count)]


def agreements() -> dict[str, float]:
    """What the built default model's manifest says of each step of its edge recipe."""
    directory = model_home() / DEFAULT_MODEL
    if not is_built(directory):
        return {}
    found = {}
    recipes = read_manifest(directory).recipes
    for name, entry in (("", recipes["edge"]), *recipes.items()):
        if entry.quality is not None and (not name or name == f"edge-{entry.recipe.codec}"):
            found[entry.recipe.codec] = entry.quality.agreement
    return found


def ladder(report: Report, blocks: list[KvBlock], repeats: int) -> None:
    """Each step against the one before it, and an entropy stage on top of each."""
    known = agreements()
    size = SMOL.fp16_bytes_per_token

    def seconds(fn: Callable[[T], object], inputs: list[T]) -> float:
        turns = cycle(inputs)
        return median_of(lambda: fn(next(turns)), repeats, warmup=2)

    halves = [_cast(block) for block in blocks]
    rungs = [Rung("fp16", size, seconds(_cast, blocks), seconds(_uncast, halves), 1.0)]
    stages: list[tuple[Rung, Rung]] = []
    for name in STEPS:
        payloads = [encode_block(block, name) for block in blocks]
        rung = Rung(
            name,
            len(payloads[0]) / BLOCK_TOKENS,
            seconds(partial(encode_block, step=name), blocks),
            seconds(partial(decode_block, geometry=SMOL, step=name), payloads),
            known.get(name),
        )
        stages.append((_with_entropy(rung, payloads, seconds), rung))
        rungs.append(rung)
    pairs = [*zip(rungs[1:], rungs, strict=False), *stages]
    for step, before in pairs:
        limit = pays_below_mbit_s(step, before)
        note = f"against {before.name}, on a link slower than this"
        if math.isinf(limit):
            limit, note = EVERY_LINK_MBIT_S, f"no slower than {before.name}: pays on every link"
        report.row(f"{step.name}_pays_below", limit, "Mbit/s", note=note)
        if step.agreement is not None and step.name in STEPS:
            report.row(f"{step.name}_agreement", step.agreement, "share", note="from the manifest")
    for step, before in stages:
        share = step.bytes_per_token / before.bytes_per_token
        report.row(f"{step.name}_bytes_vs_{before.name}", share, "ratio")
    _show([(rungs[0], None), *pairs])


def _with_entropy(
    rung: Rung,
    payloads: list[bytes],
    seconds: Callable[[Callable[[bytes], object], list[bytes]], float],
) -> Rung:
    """The step with a general compressor behind it: zstd where it is installed, else zlib."""
    if find_spec("zstandard") is not None:
        zstd = import_module("zstandard")
        compress, decompress = zstd.ZstdCompressor(level=1).compress, zstd.ZstdDecompressor()
        name, undo = "zstd1", decompress.decompress
    else:
        name, compress, undo = "zlib1", partial(zlib.compress, level=1), zlib.decompress
    small = [compress(payload) for payload in payloads]
    return Rung(
        f"{rung.name}_{name}",
        sum(map(len, small)) / len(small) / BLOCK_TOKENS,
        rung.encode_s + seconds(compress, payloads),
        rung.decode_s + seconds(undo, small),
        rung.agreement,
    )


def _show(pairs: Sequence[tuple[Rung, Rung | None]]) -> None:
    table = Table(
        "step",
        title="The ladder",
        title_style="dim",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for column in ("bytes/token", "encode MB/s", "decode MB/s", "agreement", "pays below"):
        table.add_column(column, justify="right")
    for step, before in pairs:
        encode, decode = step.speed
        limit = pays_below_mbit_s(step, before) if before is not None else 0.0
        pays = "every link" if math.isinf(limit) else f"{limit:,.0f} Mbit/s"
        table.add_row(
            step.name,
            f"{step.bytes_per_token:,.0f}",
            f"{encode:,.0f}",
            f"{decode:,.0f}",
            "" if step.agreement is None else f"{step.agreement:.4f}",
            "" if before is None else f"{pays} (against {before.name})",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _uncast(data: bytes) -> NDArray[np.float32]:
    return np.frombuffer(data, np.float16).astype(np.float32)


def _cast(block: KvBlock) -> bytes:
    return block.k.astype(np.float16).tobytes() + block.v.astype(np.float16).tobytes()


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
