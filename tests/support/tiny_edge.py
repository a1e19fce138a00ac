"""A model whose every answer is known: for tests of the node, not of arithmetic.

The next token follows from all tokens before it, and the KV holds the token ids themselves, so a
test can tell from a reply or a block which tokens it was computed from.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segue_contract.chat import ChatTemplate, ChatTokenizer
from segue_contract.chat.detokenizer import byte_alphabet
from segue_contract.kv.layout import BLOCK_TOKENS, KvRecipe
from segue_contract.model.manifest import Manifest, ModelGeometry, RecipeEntry
from segue_edge.prefill.providers import Device

END, USER, ASSISTANT = 256, 257, 258
VOCAB = 259
CONTEXT = 2048
STEP_S = 0.002  # a decode step takes its time, so that a cloud can be ready before the end
_SPECIAL = {"<|end|>": END, "<|user|>": USER, "<|assistant|>": ASSISTANT}
_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

RECIPE = KvRecipe(weights_digest="00" * 16, weight_quant="none", rope="none")
GEOMETRY = ModelGeometry(
    layers=2,
    hidden=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    ffn=8,
    vocab=VOCAB,
    context=CONTEXT,
    rope_base=1.0,
    norm_eps=1e-5,
)
MANIFEST = Manifest(
    name="tiny",
    source="tests",
    weights_digest="00" * 16,
    geometry=GEOMETRY,
    end_tokens=(END,),
    edge_quant="none",
    recipes={"edge": RecipeEntry(recipe=RECIPE)},
    files={},
)


def next_token(tokens: Sequence[int], end_after: int = 1_000_000, salt: int = 0) -> int:
    """A lower-case letter, or the end token once the reply has `end_after` tokens."""
    start = len(tokens) - 1 - list(reversed(tokens)).index(ASSISTANT)
    made = len(tokens) - 1 - start
    if made >= end_after:
        return END
    return ord("a") + (sum(tokens) * 31 + len(tokens) * 7 + salt) % 26


def reply_text(prompt: Sequence[int], length: int, salt: int = 0) -> str:
    """The first `length` letters of the reply to `prompt`."""
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(next_token(tokens, salt=salt))
    return bytes(tokens[len(prompt) :]).decode()


def tiny_tokenizer() -> ChatTokenizer:
    """One token per byte, and the three special ones."""
    vocabulary = byte_alphabet()
    added = [
        {
            "id": index,
            "content": text,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for text, index in _SPECIAL.items()
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {**vocabulary, **_SPECIAL}, "merges": []},
    }
    return ChatTokenizer(json.dumps(tokenizer), ChatTemplate(_TEMPLATE), MANIFEST.end_tokens)


@dataclass
class TinyKv:
    tokens: list[int] = field(default_factory=list)

    def append_block(self, k: NDArray[Any], v: NDArray[Any]) -> None:
        assert k.shape == (GEOMETRY.layers, 1, BLOCK_TOKENS, GEOMETRY.head_dim)
        self.tokens += [int(value) for value in k[0, 0, :, 0]]


@dataclass(frozen=True)
class TinyResult:
    logits: NDArray[np.float32]


class TinyModel:
    """`pause`: called in the compute thread before every chunk and step; a test may block it."""

    manifest = MANIFEST
    recipe = RECIPE
    recipe_name = "edge"
    device = Device("cpu", ("CPUExecutionProvider",))

    def __init__(self, end_after: int = 1_000_000) -> None:
        self.end_after = end_after
        self.pause: Callable[[str], None] = lambda what: None
        self.prefilled_tokens = 0
        self.steps = 0
        self.threads: set[str] = set()

    def new_kv(self, capacity: int) -> TinyKv:
        return TinyKv()

    def extend(self, tokens: Sequence[int], past: Any, on_block: Any) -> TinyResult:
        self.pause("prefill")
        self.threads.add(threading.current_thread().name)
        known = len(past.tokens)
        assert list(tokens[:known]) == past.tokens, "restored KV of other tokens"
        self.prefilled_tokens += len(tokens) - known
        past.tokens = list(tokens)
        if on_block is not None:
            for index in range(known // BLOCK_TOKENS, len(tokens) // BLOCK_TOKENS):
                on_block(index, *block_of(tokens[index * BLOCK_TOKENS :][:BLOCK_TOKENS]))
        return TinyResult(self._logits(past.tokens))

    def decode_step(self, token: int, kv: Any) -> NDArray[np.float32]:
        self.pause("decode")
        time.sleep(STEP_S)
        self.threads.add(threading.current_thread().name)
        self.steps += 1
        kv.tokens.append(token)
        return self._logits(kv.tokens)

    def _logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        logits = np.zeros(VOCAB, np.float32)
        if ASSISTANT in tokens:  # the warm-up's prompt has none
            logits[next_token(tokens, self.end_after)] = 9.0
        return logits


def block_of(tokens: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    shape = (GEOMETRY.layers, 1, BLOCK_TOKENS, GEOMETRY.head_dim)
    k = np.broadcast_to(np.asarray(tokens, np.float32)[None, None, :, None], shape).copy()
    return k, -k
