"""Weights of a Llama-family model, from safetensors to what a step multiplies with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from segue_cloud.engine.tensor_parallel.split import Shard, split
from segue_contract.errors import ModelMismatch, ModelMissing
from segue_contract.model.manifest import ModelGeometry

WEIGHTS_FILE = Path("cloud") / "model.safetensors"

Linear = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """One decoder layer; the linears map `[tokens, in]` to `[tokens, out]`.

    `qkv`: hidden -> (heads + 2 kv_heads) * head_dim; `gate_up`: hidden -> 2 ffn, gate first.
    """

    input_norm: torch.Tensor
    qkv: Linear
    out: Linear
    ffn_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """`embed`, `head`: `[vocab, hidden]` in the engine's dtype (of a shard, the head is its rows);
    norms are float32."""

    embed: torch.Tensor
    layers: tuple[Layer, ...]
    final_norm: torch.Tensor
    head: torch.Tensor


def load_weights(
    directory: Path,
    geometry: ModelGeometry,
    dtype: torch.dtype,
    device: str,
    shard: Shard | None = None,
) -> Weights:
    """Read `<directory>/cloud/model.safetensors` (Hugging Face Llama names) and fuse it.

    `geometry` is the whole model's. With a `shard`, the linears and the head are that rank's part;
    `out` and `down` then give partial products, to be summed over the ranks.

    Raises:
        ModelMissing: no such file.
        ModelMismatch: it cannot be read, or a tensor is missing, has another shape or holds NaN
            or infinity.
    """
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise ModelMissing(
            f"There are no cloud weights at {path}.", hint="Build them with `segue model build`."
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            part = shard or split(geometry, 1)[0]
            return _assemble(_Reader(file, path), geometry, part, dtype, device)
    except SafetensorError as error:
        raise ModelMismatch(
            f"{path} cannot be read: {error}.", hint="Build the model again."
        ) from error


class _Reader:
    def __init__(self, file: Any, path: Path) -> None:
        self._file = file
        self._path = path
        self.names = frozenset(file.keys())

    def get(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self.names:
            raise ModelMismatch(
                f"{self._path} has no tensor {name!r}.",
                hint="Build the model again; only the Llama family is served.",
                tensor=name,
            )
        tensor: torch.Tensor = self._file.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelMismatch(
                f"{name} has shape {list(tensor.shape)}; the manifest says {list(shape)}.",
                hint="Weights and manifest do not belong together. Build the model again.",
                tensor=name,
            )
        # One pass: a sum is finite only if every number is (float64 keeps it from overflowing).
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
            raise ModelMismatch(
                f"{name} holds numbers that are not finite.",
                hint="The file is damaged. Build the model again.",
                tensor=name,
            )
        return tensor


def _assemble(
    read: _Reader, geometry: ModelGeometry, part: Shard, dtype: torch.dtype, device: str
) -> Weights:
    g = geometry
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    kv_cut = part.kv_heads.times(g.head_dim).cut
    q_cut = part.kv_heads.times(g.head_dim * (g.heads // g.kv_heads)).cut
    ffn_cut = part.ffn.cut

    def linear(*parts: torch.Tensor) -> Linear:
        return make_linear(torch.cat([part.to(device=device, dtype=dtype) for part in parts]))

    def norm(name: str) -> torch.Tensor:
        return read.get(name, g.hidden).to(device=device, dtype=torch.float32)

    layers = []
    for index in range(g.layers):
        at = f"model.layers.{index}."
        if at + "self_attn.q_proj.bias" in read.names:
            raise ModelMismatch("This model's attention has biases; only plain Llama is served.")
        layers.append(
            Layer(
                input_norm=norm(at + "input_layernorm.weight"),
                qkv=linear(
                    read.get(at + "self_attn.q_proj.weight", q, g.hidden)[q_cut],
                    read.get(at + "self_attn.k_proj.weight", kv, g.hidden)[kv_cut],
                    read.get(at + "self_attn.v_proj.weight", kv, g.hidden)[kv_cut],
                ),
                out=linear(read.get(at + "self_attn.o_proj.weight", g.hidden, q)[:, q_cut]),
                ffn_norm=norm(at + "post_attention_layernorm.weight"),
                gate_up=linear(
                    read.get(at + "mlp.gate_proj.weight", g.ffn, g.hidden)[ffn_cut],
                    read.get(at + "mlp.up_proj.weight", g.ffn, g.hidden)[ffn_cut],
                ),
                down=linear(read.get(at + "mlp.down_proj.weight", g.hidden, g.ffn)[:, ffn_cut]),
            )
        )
    embed = read.get("model.embed_tokens.weight", g.vocab, g.hidden).to(device=device, dtype=dtype)
    head = embed if g.tied_embeddings else read.get("lm_head.weight", g.vocab, g.hidden)
    return Weights(
        embed=embed,
        layers=tuple(layers),
        final_norm=norm("model.norm.weight"),
        head=head[part.vocab.cut].to(device=device, dtype=dtype),
    )


def plain_linear(weight: torch.Tensor) -> Linear:
    """`x @ weight.T` with torch's own kernel."""
    return lambda x: torch.nn.functional.linear(x, weight)


def make_linear(weight: torch.Tensor) -> Linear:
    """`x @ weight.T`, with the weight laid out for the CPU's matrix units where torch can.

    oneDNN otherwise lays a bfloat16 weight out anew in every call, which costs a third of a
    decode step. The op is the one torch's own compiler emits for frozen weights; where a torch
    build lacks it, the plain one serves.
    """
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
        return plain_linear(weight)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        apply = torch.ops.mkldnn._linear_pointwise.default
        apply(weight.new_zeros(1, weight.shape[1]), packed, None, "none", [], "")
    except (AttributeError, RuntimeError, NotImplementedError):
        return plain_linear(weight)
    return lambda x: apply(x, packed, None, "none", [], "")
