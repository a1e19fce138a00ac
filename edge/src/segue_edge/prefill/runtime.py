"""The edge's model: prefill in chunks with KV out block by block, and short decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnxruntime as ort

from segue_contract.errors import ModelMismatch, PromptTooLong
from segue_contract.kv.layout import BLOCK_TOKENS, KvGeometry, KvRecipe
from segue_contract.model.gate import FLOAT_QUANT
from segue_contract.model.manifest import Manifest, read_manifest
from segue_edge.prefill.chunks import LARGE_CHUNK, LONGEST_RUN, chunks
from segue_edge.prefill.kv import Floats, PastKv
from segue_edge.prefill.providers import (
    CPU,
    CUDA,
    Device,
    choose_device,
    forbid_dynamic_int8,
    prefill_graph,
)
from segue_edge.prefill.runner import HEAD_FILE, GraphRunner, open_head, open_session
from segue_edge.prefill.tensorrt import QDQ, open_qdq

OnBlock = Callable[[int, Floats, Floats], None]


@dataclass(frozen=True)
class PrefillResult:
    """`kv`: of all tokens, ready to decode; `make_logits`: the head, over the last token."""

    kv: PastKv
    make_logits: Callable[[], Floats] = field(repr=False)

    @cached_property
    def logits(self) -> Floats:
        """Float32 `[vocab]` after the last token. Computed when first asked for: nobody needs those
        of a prompt's earlier chunks. Same thread as the model's other calls."""
        return self.make_logits()


class EdgeModel:
    """Two graphs over one kind of KV buffer. Calls come from one thread at a time."""

    def __init__(
        self,
        manifest: Manifest,
        prefill: ort.InferenceSession,
        decode: ort.InferenceSession,
        device: Device,
        recipe_name: str,
        head: ort.InferenceSession | None = None,
    ) -> None:
        """`head`: for graphs that end in hidden states; ModelMismatch where it is missing."""
        self.manifest = manifest
        self.device = device
        self.recipe_name = recipe_name
        in_place = device.name == "cpu"
        self._prefill = GraphRunner(prefill, manifest.geometry, in_place, head)
        self._decode = (
            self._prefill
            if decode is prefill
            else GraphRunner(decode, manifest.geometry, in_place, head)
        )
        if self._prefill.lacks_head or self._decode.lacks_head:
            raise ModelMismatch(
                f"The model {manifest.name} lacks edge/{HEAD_FILE}, which its graphs need.",
                hint="Build the model again.",
            )

    @classmethod
    def load(cls, directory: Path, *, threads: int = 0, providers: str = "auto") -> EdgeModel:
        """Load a built model.

        Args:
            threads: of the CPU; 0: one per core that this process may use.
            providers: "auto", "cuda" or "cpu".

        Raises:
            ModelMissing, ModelMismatch: no built model there, or its graphs do not load.
            InvalidArgument: a device that is not there.
        """
        manifest = read_manifest(directory)
        device = choose_device(providers)
        head = open_head(directory / "edge", device, threads)
        decode = open_session(directory / "edge" / "decode.onnx", device, threads)
        quant = manifest.edge_recipe.weight_quant
        if "edge-weight-only" in manifest.recipes:
            weight_only = manifest.recipes["edge-weight-only"].recipe.weight_quant
        else:
            weight_only = ""
        if prefill_graph(decode.get_providers()) == "decode" and quant != FLOAT_QUANT:
            qdq = open_qdq(directory, manifest, threads, LONGEST_RUN)
            if qdq is not None:
                return cls(manifest, qdq, decode, device, QDQ, head)
            return cls(manifest, decode, decode, device, "edge-weight-only", head)
        if quant == weight_only:  # the W8A8 graph lost too much: one graph does both
            return cls(manifest, decode, decode, device, "edge", head)
        if CUDA not in decode.get_providers():
            device = Device("cpu", (CPU,))
        prefill = open_session(directory / "edge" / "prefill.onnx", device, threads)
        forbid_dynamic_int8(prefill.get_providers(), quant)
        return cls(manifest, prefill, decode, device, "edge", head)

    @property
    def recipe(self) -> KvRecipe:
        """Under which the KV of `prefill` may be shared."""
        return self.manifest.recipes[self.recipe_name].recipe

    @property
    def geometry(self) -> KvGeometry:
        return self.manifest.geometry.kv

    @property
    def context(self) -> int:
        return self.manifest.geometry.context

    def new_kv(self, capacity: int) -> PastKv:
        return PastKv(self.geometry, capacity)

    def prefill(
        self,
        tokens: Sequence[int],
        past: PastKv | None = None,
        on_block: OnBlock | None = None,
        *,
        chunk: int = LARGE_CHUNK,
        room: int = 0,
    ) -> PrefillResult:
        """KV of all `tokens`, and the logits after the last: `extend`, chunk by chunk.

        Args:
            past: is continued in place; None: from the start.
            chunk: tokens of one run of the graph, a multiple of 64.
            room: tokens that will be decoded after it, so that the buffer need not grow then.

        Raises:
            PromptTooLong: more than the context.
        """
        total = len(tokens)
        self._check_fits(total)
        kv = past if past is not None else self.new_kv(total)
        kv.reserve(min(total + room, self.context))
        for _, stop in chunks(kv.length, total, chunk):
            result = self.extend(tokens[:stop], kv, on_block)
        return result

    def extend(
        self, tokens: Sequence[int], past: PastKv, on_block: OnBlock | None = None
    ) -> PrefillResult:
        """One run of the graph: the KV of those `tokens` that `past` lacks, put behind it.

        Args:
            tokens: the prompt as far as it is to be computed. The first `past.length` of them are
                those that `past` holds; at least one must be left.
            on_block: called with (block index, k, v) for each block that became whole; k and v
                `[layers, kv_heads, 64, head_dim]` float32 are the callee's.

        Raises:
            PromptTooLong: more than the context.
        """
        total = len(tokens)
        assert past.length < total, "at least one token must be left to compute"
        self._check_fits(total)
        past.reserve(total)
        first_new = past.length // BLOCK_TOKENS
        output = self._prefill.run(np.asarray(tokens[past.length :], np.int64), past)
        if on_block is not None:
            for index in range(first_new, past.length // BLOCK_TOKENS):
                on_block(index, *past.block(index))
        return PrefillResult(past, lambda: self._prefill.logits(output))

    def _check_fits(self, total: int) -> None:
        if total > self.context:
            raise PromptTooLong(
                f"The prompt has {total} tokens; the model's context holds {self.context}.",
                hint="Shorten the prompt or start a new session.",
                tokens=total,
                context=self.context,
            )

    def decode_step(self, token: int, kv: PastKv) -> Floats:
        """Append `token` to `kv`; float32 `[vocab]` logits of the next one.

        Raises:
            PromptTooLong: the context is full.
        """
        if kv.length >= self.context:
            raise PromptTooLong(
                f"The context of {self.context} tokens is full.", hint="Start a new session."
            )
        kv.reserve(kv.length + 1)
        return self._decode.logits(self._decode.run(np.array([token], np.int64), kv))

    def check_runs(self) -> None:
        """Decode one token, for what no graph says of itself: the head's size, say.

        Raises:
            ModelMismatch: the graphs load and do not run.
        """
        try:
            self.decode_step(self.manifest.end_tokens[0], self.new_kv(1))
        except Exception as error:  # onnxruntime raises classes of its own, all from Exception
            raise ModelMismatch(
                f"The graphs of {self.manifest.name} cannot run: "
                f"{' '.join(str(error).split())[:300]}.",
                hint="They and the manifest do not fit: build the model again.",
            ) from error
