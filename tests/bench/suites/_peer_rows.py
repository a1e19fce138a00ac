"""Rows of the decode suite beside vLLM and llama.cpp: the same turns, weights and number format.

Our engine and the peer take turns, round after round, in one run on one machine: noise of the
machine meets both, and the best round of each counts. A ratio is over whole turns, as
`tokens_per_s_N` counts them: N * new tokens over the time from the first submit to the last token,
prefill included.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from segue_cloud.engine.options import choose_dtype, dtype_name
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.model.manifest import read_manifest
from tests.bench.harness import Report
from tests.bench.suites._gguf_file import write_gguf
from tests.bench.suites._peer_process import (
    Peer,
    PeerMissing,
    hugging_face_folder,
    peer_python,
    running_peer,
)
from tests.bench.suites._prompts import random_prompts

PROMPT_TOKENS = 128
PREFILL_TOKENS = 512
VLLM_ROUNDS = {1: 5, 8: 3, 32: 3, 128: 2}
VLLM_TARGETS = {1: 1.5, 8: 1.0, 32: 1.0, 128: 1.0}
LLAMA_CPP_ROUNDS = {1: 3, 8: 2, 32: 1}
# Prompts that no other row of the suite has put into a cache, and no other peer.
_SEEDS = {"vllm": 40_000, "llama_cpp": 50_000}

Prompts = Sequence[tuple[int, ...]]


async def peer_rows(
    report: Report, engine: TorchEngine, directory: Path, new_tokens: int, quick: bool
) -> None:
    """Measure `engine` beside each peer; one that is not there is said, and the rest goes on.

    The peer computes in the number format that our engine chooses on this CPU: bf16 where the CPU
    multiplies it natively.
    """
    dtype = dtype_name(choose_dtype("auto", "cpu"))
    for name, rows in (("vllm", _beside_vllm), ("llama-cpp", _beside_llama_cpp)):
        try:
            peer_python(name)
            await rows(report, engine, directory, dtype, new_tokens, quick)
        except PeerMissing as reason:
            report.missing(name, str(reason))


async def _beside_vllm(
    report: Report, engine: TorchEngine, directory: Path, dtype: str, new_tokens: int, quick: bool
) -> None:
    rounds = {1: 1, 8: 1} if quick else VLLM_ROUNDS
    compiled = bool(os.environ.get("SEGUE_BENCH_VLLM_COMPILE"))  # minutes more to load
    arguments = [dtype, str(max(rounds)), *(["--compile"] if compiled else [])]
    with (
        hugging_face_folder(directory) as folder,
        running_peer("vllm", "_vllm_peer.py", [str(folder), *arguments]) as peer,
    ):
        mode = "compiled" if compiled else "eager"
        note = f"vLLM {peer.ready['version']}, {dtype}, {mode}"
        report.row("vllm_load_s", peer.ready["ready"], "s", note=note)
        pair = _Pair(engine, peer, read_manifest(directory).geometry.vocab, _SEEDS["vllm"])
        await _rows(report, pair, "vllm", rounds, new_tokens, {} if quick else VLLM_TARGETS)


async def _beside_llama_cpp(
    report: Report, engine: TorchEngine, directory: Path, dtype: str, new_tokens: int, quick: bool
) -> None:
    rounds = {1: 1} if quick else LLAMA_CPP_ROUNDS
    with tempfile.TemporaryDirectory(prefix="segue-peer-") as temporary:
        file = Path(temporary) / "model.gguf"
        await asyncio.to_thread(write_gguf, directory, file, dtype)
        arguments = [str(file), str(max(rounds))]
        with running_peer("llama-cpp", "_llama_cpp_peer.py", arguments) as peer:
            note = f"llama-cpp-python {peer.ready['version']}, {dtype}"
            report.row("llama_cpp_load_s", peer.ready["ready"], "s", note=note)
            vocab = read_manifest(directory).geometry.vocab
            pair = _Pair(engine, peer, vocab, _SEEDS["llama_cpp"])
            await _rows(report, pair, "llama_cpp", rounds, new_tokens, {})


async def _rows(
    report: Report,
    pair: _Pair,
    peer: str,
    rounds: Mapping[int, int],
    new_tokens: int,
    targets: Mapping[int, float],
) -> None:
    """The rows of one peer. `rounds` and `targets` are by turns at once."""
    await pair.rounds(2 if len(rounds) > 1 else 1, PROMPT_TOKENS, 4, 1)  # warm-up
    ours, theirs = await pair.rounds(1, PREFILL_TOKENS, 1, rounds[1])
    report.row(f"{peer}_prefill_tokens_per_s_512", PREFILL_TOKENS / theirs, "tokens/s")
    note = f"ours {PREFILL_TOKENS / ours:.0f} tokens/s, first token of one prompt"
    name = f"cloud_prefill_vs_{peer}_512"
    report.row(name, theirs / ours, "x", target=1.0 if targets else None, note=note)
    for turns, count in rounds.items():
        ours, theirs = await pair.rounds(turns, PROMPT_TOKENS, new_tokens, count)
        tokens = turns * new_tokens
        report.row(f"{peer}_tokens_per_s_{turns}", tokens / theirs, "tokens/s")
        note = f"ours {tokens / ours:.0f} tokens/s, in turns with the peer"
        target = targets.get(turns)
        report.row(f"vs_{peer}_{turns}", theirs / ours, "x", target=target, note=note)


class _Pair:
    """Our engine and the peer, given the same turns one after the other."""

    def __init__(self, engine: TorchEngine, peer: Peer, vocab: int, seed: int) -> None:
        self._engine = engine
        self._peer = peer
        self._vocab = vocab
        self._seed = seed

    async def rounds(
        self, turns: int, prompt_tokens: int, new_tokens: int, count: int
    ) -> tuple[float, float]:
        """Best seconds of `turns` turns at once, ours and the peer's, of `count` rounds each."""
        ours, theirs = [], []
        for _ in range(count):
            self._seed += 1
            prompts = random_prompts(turns, prompt_tokens, self._vocab, seed=self._seed)
            ours.append(await self._ours(prompts, new_tokens))
            request = {"prompts": prompts, "new_tokens": new_tokens}
            answer = await asyncio.to_thread(self._peer.ask, request)
            theirs.append(float(answer["seconds"]))
        return min(ours), min(theirs)

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
