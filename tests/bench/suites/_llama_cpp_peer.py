"""A peer of the decode suite: llama.cpp, in a process and an environment of its own.

    .peers/llama-cpp/bin/python tests/bench/suites/_llama_cpp_peer.py FILE MAX_TURNS

FILE is a GGUF file. Requests and answers are those of `_vllm_peer.py`, with the first turn's tokens
in `tokens`. The first line, before any request, is {"ready": seconds to load, "version": ...}.
Turns share one batch per step: llama.cpp's own API for that, as its server uses it.

Imports nothing of Segue: it runs where Segue is not installed.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from typing import Any, TextIO

import llama_cpp as api
import numpy as np

CONTEXT = 1024  # tokens per turn
BATCH = 2048


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    began = time.perf_counter()
    engine = Engine(sys.argv[1], int(sys.argv[2]))
    ready = {"ready": time.perf_counter() - began, "version": api.__version__}
    say(answers, ready)
    for line in sys.stdin:
        request = json.loads(line)
        say(answers, engine.run(request["prompts"], request["new_tokens"]))


def say(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


class Engine:
    """A loaded model with room for `max_turns` turns."""

    def __init__(self, file: str, max_turns: int) -> None:
        cores = len(os.sched_getaffinity(0))
        api.llama_backend_init()
        model = api.llama_model_load_from_file(file.encode(), api.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp does not load {file}")
        params = api.llama_context_default_params()
        params.n_ctx = CONTEXT * max_turns
        params.n_batch = BATCH
        params.n_seq_max = max_turns
        params.n_threads = params.n_threads_batch = cores
        self._context = api.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(BATCH, 0, 1)

    def run(self, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """All prompts at once, greedy, exactly `new_tokens` each."""
        api.llama_memory_clear(api.llama_get_memory(self._context), False)
        began = time.perf_counter()
        last = self._prefill(prompts)
        all_started = time.perf_counter() - began
        tokens = [last[0]]
        for step in range(new_tokens - 1):
            rows = [(last[i], len(ids) + step, i, True) for i, ids in enumerate(prompts)]
            chosen = self._decode(rows)
            last = dict(enumerate(chosen))
            tokens.append(last[0])
        return {
            "seconds": time.perf_counter() - began,
            "all_started_s": all_started,
            "decoded": (new_tokens - 1) * len(prompts),
            "tokens": tokens,
        }

    def _prefill(self, prompts: list[list[int]]) -> dict[int, int]:
        rows = [
            (token, position, turn, position == len(ids) - 1)
            for turn, ids in enumerate(prompts)
            for position, token in enumerate(ids)
        ]
        first: dict[int, int] = {}
        for at in range(0, len(rows), BATCH):
            part = rows[at : at + BATCH]
            ends = [turn for _, _, turn, wanted in part if wanted]
            first.update(zip(ends, self._decode(part), strict=True))
        return first

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """One step over (token, position, turn, wanted); the best next token of each wanted row."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, turn, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = turn
            batch.logits[i] = wanted
        if api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama.cpp refused a batch")
        count = sum(1 for row in rows if row[3])
        if count == 0:
            return []
        logits = api.llama_get_logits(self._context)
        pointer = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        values = np.ctypeslib.as_array(pointer, (count, self._vocab))
        return [int(token) for token in values.argmax(axis=1)]


if __name__ == "__main__":
    main()
