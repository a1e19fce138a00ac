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

# Tokens. Measured on two cores, 512-token prompt, tokens/s: 1,890 in chunks of 64, 2,160 of 128,
# 2,250 of 256, 2,080 of 384, 1,830 at once; the order is the same at 2,048.
DEFAULT_CHUNK = 256

OnBlock = Callable[[int, Floats, Floats], None]


@dataclass(frozen=True)
class PrefillResult:
    """`kv`: of all tokens, ready to decode; `make_logits`: the head, over the last token."""

    kv: PastKv
    make_logits: Callable[[], Floats] = field(repr=False)
    cancelled: bool = False

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
            qdq = open_qdq(directory, manifest, threads, DEFAULT_CHUNK)
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
        chunk: int = DEFAULT_CHUNK,
        taper: bool = False,
        cancelled: Callable[[], bool] | None = None,
        room: int = 0,
    ) -> PrefillResult:
        """KV of all `tokens`, and the logits after the last.

        Args:
            tokens: the whole prompt. The first `past.length` of them are those that `past` holds;
                at least one must be left.
            past: is continued in place; None: from the start.
            on_block: called with (block index, k, v) for each whole block as soon as its chunk is
                done; k and v `[layers, kv_heads, 64, head_dim]` float32 are the callee's. Blocks
                of `past` are not repeated.
            chunk: tokens of one run of the graph at most. Smaller ones hand blocks over earlier;
                larger ones use the cores better until attention's square catches up.
                KV does not depend on how a prompt is cut.
            taper: halve the chunks towards the end, so that little is left to encode and upload
                when the last one is done. For callers that give the whole prompt at once.
            cancelled: asked between chunks; once true, the result is what was done so far.
            room: tokens that will be decoded after it, so that the buffer need not grow then.

        Raises:
            PromptTooLong: more than the context.
        """
        total = len(tokens)
        kv = past if past is not None else self.new_kv(total + room)
        assert kv.length < total, "at least one token must be left to compute"
        assert chunk > 0
        if total > self.context:
            raise PromptTooLong(
                f"The prompt has {total} tokens; the model's context holds {self.context}.",
                hint="Shorten the prompt or start a new session.",
                tokens=total,
                context=self.context,
            )
        kv.reserve(min(total + room, self.context))
        ids = np.asarray(tokens, np.int64)
        output = np.zeros(0, np.float32)

        def logits() -> Floats:
            return self._prefill.logits(output) if output.size else output

        while kv.length < total:
            if cancelled is not None and cancelled():
                return PrefillResult(kv, logits, cancelled=True)
            first_new = kv.length // BLOCK_TOKENS
            end = chunk_end(kv.length, total, chunk, taper)
            output = self._prefill.run(ids[kv.length : end], kv)
            if on_block is not None:
                for index in range(first_new, kv.length // BLOCK_TOKENS):
                    on_block(index, *kv.block(index))
        return PrefillResult(kv, logits)

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

    def warm_up(self) -> None:
        """Run the graphs once, so that the first prompt does not pay for lazy set-up."""
        tokens = [self.manifest.end_tokens[0]] * BLOCK_TOKENS
        result = self.prefill(tokens)
        assert result.logits.size
        self.decode_step(tokens[0], result.kv)

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


def chunk_end(start: int, total: int, chunk: int, taper: bool = False) -> int:
    """Where the chunk that begins at `start` ends: on a block boundary, or at `total`.

    Tapering takes half of what is left, so 512 tokens run as 256, 128, 64, 64.
    """
    size = min(chunk, (total - start) // 2) if taper else chunk
    end = start + size
    end = max(end - end % BLOCK_TOKENS, start - start % BLOCK_TOKENS + BLOCK_TOKENS)
    # A rest shorter than half a block costs less inside this run than as one of its own.
    return total if total - end < BLOCK_TOKENS // 2 else end
