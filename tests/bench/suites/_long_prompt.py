"""One long prompt in a process of its own, for its peak memory.

    python -m tests.bench.suites._long_prompt MODEL TOKENS CHUNK

Prints JSON: `seconds`, and `peak` in bytes over the loaded model's.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from tokenizers import Tokenizer

from segue_edge.prefill.quality import held_out_text
from segue_edge.prefill.runtime import EdgeModel
from tests.bench.suites._load_peak import peak_bytes


def main() -> None:
    directory, count, chunk = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    model = EdgeModel.load(directory, providers="cpu")
    model.check_runs()
    tokens = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(held_out_text()).ids
    tokens = (tokens * (1 + count // len(tokens)))[:count]
    before = peak_bytes()
    began = time.perf_counter()
    model.prefill(tokens, chunk=chunk)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak": peak_bytes() - before}))


if __name__ == "__main__":
    main()
