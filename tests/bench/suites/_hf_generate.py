"""The peer of the decode suite, in a process of its own with its usual settings: Hugging Face
`generate`, batch 1, one prompt after another. Prints one JSON object.

    python -m tests.bench.suites._hf_generate MODEL_DIR fp32|bf16 PROMPTS PROMPT_TOKENS NEW_TOKENS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from segue_contract.model.manifest import read_manifest
from tests.bench.suites._device import bench_device
from tests.bench.suites._prompts import random_prompts
from tests.support.tiny_llama import HfReference


def main() -> None:
    directory, dtype = Path(sys.argv[1]), sys.argv[2]
    count, prompt_tokens, new_tokens = (int(value) for value in sys.argv[3:6])
    manifest = read_manifest(directory)
    model = HfReference(directory, manifest).model
    device = bench_device()
    model = model.to(device, torch.bfloat16 if dtype == "bf16" else torch.float32)
    prompts = random_prompts(count + 1, prompt_tokens, manifest.geometry.vocab)

    def generate(prompt: tuple[int, ...], tokens: int) -> None:
        ids = torch.tensor([prompt], device=device)
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
        )
        assert out.shape[1] == len(prompt) + tokens

    with torch.inference_mode():
        generate(prompts[0], 4)  # warm-up
        began = time.perf_counter()
        for prompt in prompts[1:]:
            generate(prompt, new_tokens)
        seconds = time.perf_counter() - began
    print(json.dumps({"tokens_per_s": count * new_tokens / seconds}))


if __name__ == "__main__":
    main()
