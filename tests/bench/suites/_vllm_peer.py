"""A peer of the decode suite: vLLM on CPU, in a process and an environment of its own.

    .peers/vllm/bin/python tests/bench/suites/_vllm_peer.py FOLDER bf16|fp32 MAX_TURNS [--compile]

FOLDER is a Hugging Face folder. Reads one JSON request per line and answers each with one line:

    {"prompts": [[ids], ...], "new_tokens": 64}
    {"seconds": s, "all_started_s": s, "decoded": n}

`seconds` go from the first submit to the last token, `all_started_s` from there to the moment when
every turn has its first token, `decoded` is how many tokens came after that moment. The first line,
before any request, is {"ready": seconds to load, "version": ...}. Everything else that vLLM says
goes to stderr. Stops at the end of its input.

Imports nothing of Segue: it runs where Segue is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any, TextIO

CONTEXT = 2048
KV_GIB = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("dtype", choices=("bf16", "fp32"))
    parser.add_argument("max_turns", type=int)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    answers = take_stdout()
    began = time.perf_counter()
    engine, version = load(given.folder, given.dtype, given.max_turns, given.compile)
    say(answers, {"ready": time.perf_counter() - began, "version": version})
    for index, line in enumerate(sys.stdin):
        request = json.loads(line)
        say(answers, run(engine, index, request["prompts"], request["new_tokens"]))


def take_stdout() -> TextIO:
    """Our answers' own stream; whatever else is printed in this process goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def say(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def load(folder: str, dtype: str, max_turns: int, compiled: bool) -> tuple[Any, str]:
    """vLLM's engine in this process, on every core that this process may use.

    Eager loads in half a minute; compiled takes minutes.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_GIB))
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import vllm

    model = vllm.LLM(
        model=folder,
        skip_tokenizer_init=True,
        dtype={"bf16": "bfloat16", "fp32": "float32"}[dtype],
        max_model_len=CONTEXT,
        max_num_seqs=max_turns,
        enforce_eager=not compiled,
        disable_log_stats=True,
    )
    return model.llm_engine, str(vllm.__version__)


def run(engine: Any, index: int, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """All prompts at once, greedy, exactly `new_tokens` each."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0,
        max_tokens=new_tokens,
        min_tokens=0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    seen: dict[str, int] = {}
    decoded, all_started = 0, 0.0
    began = time.perf_counter()
    for number, ids in enumerate(prompts):
        engine.add_request(f"{index}-{number}", {"prompt_token_ids": ids}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            count = len(output.outputs[0].token_ids)
            seen[output.request_id] = seen.get(output.request_id, 0) + count
            decoded += count if all_started else 0
        if len(seen) == len(prompts) and not all_started:
            all_started = time.perf_counter() - began
    seconds = time.perf_counter() - began
    wrong = [count for count in seen.values() if count != new_tokens]
    if wrong or len(seen) != len(prompts):
        raise RuntimeError(f"{len(seen)} turns of {len(prompts)}; lengths that are wrong: {wrong}")
    return {"seconds": seconds, "all_started_s": all_started, "decoded": decoded}


if __name__ == "__main__":
    main()
