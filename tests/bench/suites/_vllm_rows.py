"""Rows of the decode suite beside vLLM: the same turns, the same weights, the same number format.

Our engine and the peer take turns, round after round, in one run on one machine: noise of the
machine meets both. A ratio is that of the medians, over whole turns as `tokens_per_s_N` counts
them: N * new tokens over the time from the first submit to the last token, prefill included.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from segue_cloud.engine.options import choose_dtype, dtype_name
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.worker import TorchEngine
from segue_contract.model.manifest import read_manifest
from tests.bench.harness import Report
from tests.bench.suites._peer_process import (
    Peer,
    PeerMissing,
    hugging_face_folder,
    running_peer,
)
from tests.bench.suites._prompts import random_prompts

PROMPT_TOKENS = 128
PREFILL_TOKENS = 512
ROUNDS = {1: 5, 8: 3, 32: 3, 128: 2}
TARGETS = {1: 1.5, 8: 1.0, 32: 1.0, 128: 1.0}
_SEED = 40_000  # prompts that no other row of the suite has put into a cache

Prompts = Sequence[tuple[int, ...]]


async def vllm_rows(
    report: Report, engine: TorchEngine, directory: Path, new_tokens: int, quick: bool
) -> None:
    """Measure `engine` beside vLLM; where vLLM is not there, say so and go on."""
    dtype = dtype_name(choose_dtype("auto", "cpu"))
    largest = 8 if quick else max(ROUNDS)
    try:
        with (
            hugging_face_folder(directory) as folder,
            running_peer("vllm", "_vllm_peer.py", [str(folder), dtype, str(largest)]) as peer,
        ):
            version = f"vLLM {peer.ready['vllm']}, {dtype}"
            report.row("vllm_load_s", peer.ready["ready"], "s", note=f"{version}, eager")
            pair = _Pair(engine, peer, read_manifest(directory).geometry.vocab)
            await pair.warm_up()
            await _prefill_rows(report, pair, quick)
            for turns in (1, 8) if quick else tuple(ROUNDS):
                await _decode_rows(report, pair, turns, new_tokens, quick)
    except PeerMissing as reason:
        report.missing("vs_vllm_*, cloud_prefill_vs_vllm_512", str(reason))


async def _prefill_rows(report: Report, pair: _Pair, quick: bool) -> None:
    ours, theirs = await pair.rounds(1, PREFILL_TOKENS, 1, 1 if quick else 5)
    report.row("vllm_prefill_tokens_per_s_512", PREFILL_TOKENS / theirs, "tokens/s")
    target = None if quick else 1.0
    note = "one prompt, time to first token"
    report.row("cloud_prefill_vs_vllm_512", theirs / ours, "x", target=target, note=note)


async def _decode_rows(
    report: Report, pair: _Pair, turns: int, new_tokens: int, quick: bool
) -> None:
    rounds = 1 if quick else ROUNDS[turns]
    ours, theirs = await pair.rounds(turns, PROMPT_TOKENS, new_tokens, rounds)
    tokens = turns * new_tokens
    report.row(f"vllm_tokens_per_s_{turns}", tokens / theirs, "tokens/s")
    note = f"ours {tokens / ours:.0f} tokens/s, in turns with vLLM"
    target = None if quick else TARGETS[turns]
    report.row(f"vs_vllm_{turns}", theirs / ours, "x", target=target, note=note)


class _Pair:
    """Our engine and the peer, given the same turns one after the other."""

    def __init__(self, engine: TorchEngine, peer: Peer, vocab: int) -> None:
        self._engine = engine
        self._peer = peer
        self._vocab = vocab
        self._seed = _SEED

    async def warm_up(self) -> None:
        await self.rounds(2, PROMPT_TOKENS, 4, 1)

    async def rounds(
        self, turns: int, prompt_tokens: int, new_tokens: int, count: int
    ) -> tuple[float, float]:
        """Median seconds of `turns` turns at once, ours and the peer's, over `count` rounds."""
        ours, theirs = [], []
        for _ in range(count):
            self._seed += 1
            prompts = random_prompts(turns, prompt_tokens, self._vocab, seed=self._seed)
            ours.append(await self._ours(prompts, new_tokens))
            request = {"prompts": prompts, "new_tokens": new_tokens}
            answer = await asyncio.to_thread(self._peer.ask, request)
            theirs.append(float(answer["seconds"]))
        return statistics.median(ours), statistics.median(theirs)

    async def _ours(self, prompts: Prompts, new_tokens: int) -> float:
        async def one(index: int, prompt: tuple[int, ...]) -> None:
            name = f"peer{self._seed}-{index}"
            turn = EngineTurn(turn=name, prompt=prompt, max_tokens=new_tokens)
            seen = 0
            async for output in self._engine.submit(turn):
                seen += len(output.tokens)
            assert seen == new_tokens, "a turn ended early"

        began = time.perf_counter()
        await asyncio.gather(*(one(i, prompt) for i, prompt in enumerate(prompts)))
        return time.perf_counter() - began
