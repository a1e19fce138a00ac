"""Whether the engine on a card gives the tokens of transformers.

A small Llama with random weights; the reference is transformers in float32 on the CPU, greedy. The
engine computes each prompt alone, all at once, and with the first blocks' KV shipped to it from the
reference, with captured steps and without.

*Equal.* In float32 a reply is equal where each token is. In bfloat16 two right computations may
part where the two best logits lie closer together than bfloat16 can tell, so the question is how
far apart they lay: at a reply's first other token, the reference's logit of its own token less
that of the engine's (`gap`, in float32). It must not exceed what transformers itself loses in
bfloat16 on the same device: twice the largest difference of its logits, bfloat16 from float32, over
the same texts. How many of its replies part too is printed beside ours.
"""

from __future__ import annotations

import asyncio
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from segue_cloud.engine.cuda.runner import DeviceRunner
from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.model.manifest import ModelGeometry
from tests.bench.harness import Report
from tests.support.tiny_engine import Tiny, engine_with, make_tiny, replies_of

SEED = 41
# Heads of 64 in groups of 4: what the fused kernels of a card are made for.
SMALL = ModelGeometry(
    layers=4,
    hidden=256,
    heads=8,
    kv_heads=2,
    head_dim=64,
    ffn=512,
    vocab=2048,
    context=1024,
    rope_base=10000.0,
    norm_eps=1e-5,
)
SIZES, NEW = (1, 16, 63, 64, 65, 130, 300, 33, 410, 200), 48
QUICK_SIZES, QUICK_NEW = (1, 64, 130), 8
_EVER = frozenset[int]()  # replies run to their length


@dataclass(frozen=True)
class Parted:
    """A reply that is not the reference's: at `index`, where the reference preferred its own token
    by `gap` (float32 logits, after the same tokens)."""

    how: str
    prompt: int
    index: int
    gap: float


def run(report: Report, quick: bool) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        sizes, new = (QUICK_SIZES, QUICK_NEW) if quick else (SIZES, NEW)
        tiny = make_tiny(Path(folder), sizes, new, SEED, SMALL)
        tiny = replace(tiny, replies=[_greedy(tiny, prompt) for prompt in tiny.prompts])
        noise = _noise(report, tiny, device)
        parted: list[Parted] = []
        for dtype in ("fp32", "bf16"):
            for graphs in (True, False):
                parted += asyncio.run(_compare(report, tiny, device, dtype, graphs))
        worst = max((one.gap for one in parted if one.how.startswith("bf16")), default=0.0)
        report.row(
            "exact_bf16_worst_gap",
            worst,
            "",
            2 * noise,
            "lower",
            "logits, where a reply first differs; target: twice what transformers loses",
        )
        report.details["parted"] = [vars(one) for one in parted]


def _greedy(tiny: Tiny, prompt: Sequence[int]) -> list[int]:
    return tiny.reference.greedy(prompt, tiny.new, _EVER)


async def _compare(
    report: Report, tiny: Tiny, device: str, dtype: str, graphs: bool
) -> list[Parted]:
    """Replies alone, all at once and over shipped KV; a row for each."""
    options = EngineOptions(dtype=dtype, device=device, max_batch=16, graphs=graphs)
    name = f"{dtype}_{'captured' if graphs else 'eager'}"
    turns = [
        EngineTurn(turn=f"t{i}", prompt=prompt, max_tokens=tiny.new)
        for i, prompt in enumerate(tiny.prompts)
    ]
    found: dict[str, list[list[int]]] = {}
    async with engine_with(DeviceRunner, tiny, options) as (engine, runner):
        found["alone"] = [(await replies_of(engine, [turn]))[0] for turn in turns]
        if graphs:
            assert runner.replayed_steps > runner.eager_steps > 0, (
                "steps were captured and not used"
            )
    async with engine_with(DeviceRunner, tiny, options) as (engine, _):
        found["batched"] = await replies_of(engine, turns)
    async with engine_with(DeviceRunner, tiny, options) as (engine, _):
        over, blocks = [], 0
        for turn in turns:
            shipped = tiny.reference.blocks(turn.prompt, tiny.manifest.edge_recipe)
            assert await engine.offer_blocks(shipped) == len(shipped)
            over.append(replace(turn, prompt_blocks=tuple(block.id for block in shipped)))
            blocks += (len(turn.prompt) - 1) // BLOCK_TOKENS
        found["shipped"] = await replies_of(engine, over)
        hits = engine.stats().prefix_hit_tokens
        assert hits >= blocks * BLOCK_TOKENS, f"{hits} of {blocks} blocks' tokens were used"
    parted = []
    for how, replies in found.items():
        ours = _parted(tiny, f"{name}_{how}", replies)
        share = 1 - len(ours) / len(replies)
        goal = 1.0 if dtype == "fp32" else None
        report.row(f"exact_{name}_{how}", share, "", goal, note="of replies, token for token")
        parted += ours
    return parted


def _parted(tiny: Tiny, how: str, replies: Sequence[list[int]]) -> list[Parted]:
    return [
        _part(tiny, how, number, reply)
        for number, (reply, expected) in enumerate(zip(replies, tiny.replies, strict=True))
        if reply != expected
    ]


@torch.inference_mode()
def _part(tiny: Tiny, how: str, number: int, reply: Sequence[int]) -> Parted:
    expected = tiny.replies[number]
    assert len(reply) == len(expected), f"{how}: {len(reply)} tokens of {len(expected)}"
    pairs = zip(reply, expected, strict=True)
    index = next(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)
    text = [*tiny.prompts[number], *expected[:index]]
    logits = tiny.reference.model(torch.tensor([text]), use_cache=False).logits[0, -1]
    return Parted(how, number, index, float(logits[expected[index]] - logits[reply[index]]))


@torch.inference_mode()
def _noise(report: Report, tiny: Tiny, device: str) -> float:
    """The largest loss of a logit in transformers' bfloat16, and how many of its replies part."""
    exact: Any = tiny.reference.model
    rough: Any = copy.deepcopy(exact).to(device, torch.bfloat16)
    # As a model loaded in bfloat16 has it: the angles stay in float32.
    rough.model.rotary_emb = copy.deepcopy(exact.model.rotary_emb).to(device)
    largest, same = 0.0, 0
    for prompt, reply in zip(tiny.prompts, tiny.replies, strict=True):
        text = torch.tensor([[*prompt, *reply]])
        right = exact(text, use_cache=False).logits[0]
        found = rough(text.to(device), use_cache=False).logits[0].float().cpu()
        largest = max(largest, float((found - right).abs().max()))
        best = found[len(prompt) - 1 : -1].argmax(dim=1).tolist()
        same += best == list(reply)
    report.row("hf_bf16_logit_loss", largest, "", note="transformers, bfloat16 from float32")
    report.row("hf_bf16_equal", same / len(tiny.prompts), "", note="of its replies")
    return largest
