"""The codec ladder of the codec suite: what each step saves, costs and loses, and where it pays.

Agreement is no measurement of this run: the built model's manifest has it, from `segue model build`
or `segue model quality`, and the table says over how many windows.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections.abc import Callable, Sequence
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

from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, KvGeometry
from segue_contract.kv.quantize import decode_block, encode_block
from segue_contract.kv.steps import DEFAULT_STEP, STEPS, codec_named
from segue_contract.model.gate import CODECS, bytes_per_token
from segue_contract.model.manifest import (
    DEFAULT_MODEL,
    Quality,
    is_built,
    model_home,
    read_manifest,
)
from tests.bench.harness import Report, median_of

T = TypeVar("T")
SMOL = KvGeometry(layers=30, kv_heads=3, head_dim=64)
RECIPE = "5e" * 16
EVERY_LINK_MBIT_S = 1e6  # stands for "however fast": a row is a finite number
PROMPT_BLOCKS = 8  # of which the first carries the sinks

Seconds = Callable[[Callable[[T], object], list[T]], float]


@dataclass(frozen=True)
class Known:
    """What a manifest says of a codec of the graph that its edge runs."""

    quality: Quality | None = None
    remark: str = ""


@dataclass(frozen=True)
class Rung:
    """One step of the ladder as the table shows it. Seconds are those of one block."""

    name: str
    bytes_per_token: float
    encode_s: float
    decode_s: float
    known: Known = Known()

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


def known_codecs() -> dict[str, Known]:
    """By the codec's name; nothing where the default model is not built."""
    directory = model_home() / DEFAULT_MODEL
    if not is_built(directory):
        return {}
    manifest = read_manifest(directory)
    used = manifest.edge_recipe
    found = {}
    for entry in manifest.recipes.values():
        if entry.quality is not None and entry.recipe.weight_quant == used.weight_quant:
            remark = "allowed" if entry.allowed else "loses more than the budget"
            remark = "in use" if entry.recipe == used else remark
            found[entry.recipe.codec] = Known(entry.quality, remark)
    return found


def ladder(report: Report, blocks: list[KvBlock], repeats: int) -> None:
    """Each step against the one before it, then sinks and an entropy stage on top of each."""
    known = known_codecs()

    def seconds(fn: Callable[[T], object], inputs: list[T]) -> float:
        turns = cycle(inputs)
        return median_of(lambda: fn(next(turns)), repeats, warmup=2)

    halves = [cast(block) for block in blocks]
    exact = Rung(
        "fp16", SMOL.fp16_bytes_per_token, seconds(cast, blocks), seconds(_uncast, halves),
        Known(remark="no codec"),
    )  # fmt: skip
    rungs, stages = [exact], []
    for name in STEPS:
        payloads = [encode_block(block, name) for block in blocks]
        rung = Rung(
            name,
            len(payloads[0]) / BLOCK_TOKENS,
            seconds(partial(encode_block, step=name), blocks),
            seconds(partial(decode_block, geometry=SMOL, step=name), payloads),
            known.get(name, Known()),
        )
        stages.append((_with_entropy(rung, payloads, seconds), rung))
        rungs.append(rung)
    pairs = [*zip(rungs[1:], rungs, strict=False)]
    before = dict(zip((rung.name for rung in rungs[1:]), rungs, strict=False))
    for codec in (name for name in CODECS if name not in STEPS):
        base = next(rung for rung in rungs if rung.name == codec_named(codec).step.name)
        rung = _with_sinks(codec, base, blocks, seconds, known.get(codec, Known()))
        pairs.append((rung, before[base.name]))
    pairs += stages
    for step, other in pairs:
        _rows(report, step, other)
    _show([(exact, None), *pairs], known.get(DEFAULT_STEP, Known()).quality)


def _rows(report: Report, step: Rung, before: Rung) -> None:
    limit = pays_below_mbit_s(step, before)
    note = f"against {before.name}, on a link slower than this"
    if math.isinf(limit):
        limit, note = EVERY_LINK_MBIT_S, f"no slower than {before.name}: pays on every link"
    report.row(f"{step.name}_pays_below", limit, "Mbit/s", note=note)
    if step.name in CODECS:
        if step.known.quality is not None:
            note = f"from the manifest, {step.known.quality.windows} windows"
            report.row(f"{step.name}_agreement", step.known.quality.agreement, "share", note=note)
    else:
        share = step.bytes_per_token / before.bytes_per_token
        report.row(f"{step.name}_bytes_vs_{before.name}", share, "ratio")


def _with_sinks(
    codec: str,
    base: Rung,
    blocks: list[KvBlock],
    seconds: Seconds[KvBlock],
    known: Known,
) -> Rung:
    """A step whose prompts keep their first tokens in float16: one block of `PROMPT_BLOCKS`."""
    chosen = codec_named(codec)
    step, sinks = chosen.step.name, chosen.sink_tokens
    payloads = {encode_block(block, step, sink_tokens=sinks): block for block in blocks}
    encode_s = seconds(partial(encode_block, step=step, sink_tokens=sinks), blocks)
    decode = partial(decode_block, geometry=SMOL, step=step, sink_tokens=sinks)
    turns = cycle(payloads)
    decode_s = seconds(lambda _: decode(next(turns)), blocks)
    share = 1 / PROMPT_BLOCKS
    return Rung(
        codec,
        bytes_per_token(codec, SMOL),
        share * encode_s + (1 - share) * base.encode_s,
        share * decode_s + (1 - share) * base.decode_s,
        known,
    )


def _with_entropy(rung: Rung, payloads: list[bytes], seconds: Seconds[bytes]) -> Rung:
    """The step with a general compressor behind it: zstd where it is installed, else zlib."""
    if find_spec("zstandard") is not None:
        zstd = import_module("zstandard")
        compress, decompress = zstd.ZstdCompressor(level=1).compress, zstd.ZstdDecompressor()
        name, undo = "zstd1", decompress.decompress
    else:
        name, compress, undo = "zlib1", partial(zlib.compress, level=1), zlib.decompress
    small = [compress(payload) for payload in payloads]
    size = sum(map(len, small)) / len(small) / BLOCK_TOKENS
    return Rung(
        f"{rung.name}_{name}",
        size,
        rung.encode_s + seconds(compress, payloads),
        rung.decode_s + seconds(undo, small),
        Known(
            rung.known.quality,
            f"saves {1 - size / rung.bytes_per_token:.0%}: does not pay, not used",
        ),
    )


def _show(pairs: Sequence[tuple[Rung, Rung | None]], quality: Quality | None) -> None:
    table = Table(
        "step",
        title="The ladder" if quality is None else f"The ladder ({quality.windows} windows)",
        title_style="dim",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for column in ("bytes/token", "encode MB/s", "decode MB/s", "agreement"):
        table.add_column(column, justify="right")
    table.add_column("pays below")
    table.add_column("")
    for step, before in pairs:
        encode, decode = step.speed
        table.add_row(
            step.name,
            f"{step.bytes_per_token:,.0f}",
            f"{encode:,.0f}",
            f"{decode:,.0f}",
            "" if step.known.quality is None else f"{step.known.quality.agreement:.4f}",
            "" if before is None else _pays(step, before),
            step.known.remark,
        )
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def _pays(step: Rung, before: Rung) -> str:
    limit = pays_below_mbit_s(step, before)
    if limit == 0:
        return f"on no link (it is larger than {before.name})"
    return f"{'every link' if math.isinf(limit) else f'{limit:,.0f} Mbit/s'} (than {before.name})"


def _uncast(data: bytes) -> NDArray[np.float32]:
    return np.frombuffer(data, np.float16).astype(np.float32)


def cast(block: KvBlock) -> bytes:
    """A plain cast to float16, what one would ship without a codec."""
    return block.k.astype(np.float16).tobytes() + block.v.astype(np.float16).tobytes()
