"""Weights of a Llama-family model, from safetensors to what a step multiplies with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from segue_cloud.engine.tensor_parallel.split import Shard, split
from segue_contract.errors import ModelMismatch, ModelMissing
from segue_contract.model.manifest import Manifest, ModelGeometry

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

    @staticmethod
    def of(tensors: LayerTensors) -> Layer:
        return Layer(
            input_norm=tensors.input_norm,
            qkv=make_linear(tensors.qkv),
            out=make_linear(tensors.out),
            ffn_norm=tensors.ffn_norm,
            gate_up=make_linear(torch.cat([tensors.gate, tensors.up])),
            down=make_linear(tensors.down),
        )


@dataclass(frozen=True)
class Weights:
    """`embed`, `head`: `[vocab, hidden]` in the engine's dtype (of a shard, the head is its rows);
    norms are float32."""

    embed: torch.Tensor
    layers: tuple[Layer, ...]
    final_norm: torch.Tensor
    head: torch.Tensor


def check_size(directory: Path, manifest: Manifest) -> None:
    """The weights have the size that the manifest lists; their hash is for `segue model verify`.

    Raises:
        ModelMismatch: another size, so one of the two was changed. A missing file is no business
            of this check.
    """
    entry, path = manifest.files.get(str(WEIGHTS_FILE)), directory / WEIGHTS_FILE
    if entry is not None and path.is_file() and path.stat().st_size != entry.bytes:
        raise ModelMismatch(
            f"{path} has {path.stat().st_size} bytes; the manifest says {entry.bytes}.",
            hint="One of them was changed (`segue model verify`). Build the model again.",
        )


@dataclass(frozen=True)
class LayerTensors:
    """One layer as read: `qkv` `[(heads + 2 kv_heads) * head_dim, hidden]`, `gate`, `up`
    `[ffn, hidden]`, in the engine's dtype; norms are float32."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    out: torch.Tensor
    ffn_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class Tensors:
    """An open weights file, read tensor by tensor; every call reads anew.

    `geometry` is the whole model's; linears and head are the `part` of it that one rank computes.
    """

    def __init__(
        self,
        read: _Reader,
        geometry: ModelGeometry,
        part: Shard,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self._read = read
        self._geometry = geometry
        self._part = part
        self._dtype = dtype
        self._device = device

    def layers(self) -> Iterator[LayerTensors]:
        g = self._geometry
        q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
        kv_cut = self._part.kv_heads.times(g.head_dim).cut
        q_cut = self._part.kv_heads.times(g.head_dim * (g.heads // g.kv_heads)).cut
        ffn_cut = self._part.ffn.cut
        for index in range(g.layers):
            at = f"model.layers.{index}."
            if at + "self_attn.q_proj.bias" in self._read.names:
                raise ModelMismatch(
                    "This model's attention has biases; only plain Llama is served."
                )
            qkv = [
                self._get(at + f"self_attn.{name}_proj.weight", rows, g.hidden)[cut]
                for name, rows, cut in (("q", q, q_cut), ("k", kv, kv_cut), ("v", kv, kv_cut))
            ]
            yield LayerTensors(
                input_norm=self._norm(at + "input_layernorm.weight"),
                qkv=torch.cat(qkv),
                out=self._get(at + "self_attn.o_proj.weight", g.hidden, q)[:, q_cut],
                ffn_norm=self._norm(at + "post_attention_layernorm.weight"),
                gate=self._get(at + "mlp.gate_proj.weight", g.ffn, g.hidden)[ffn_cut],
                up=self._get(at + "mlp.up_proj.weight", g.ffn, g.hidden)[ffn_cut],
                down=self._get(at + "mlp.down_proj.weight", g.hidden, g.ffn)[:, ffn_cut],
            )

    def final_norm(self) -> torch.Tensor:
        return self._norm("model.norm.weight")

    def embed(self) -> torch.Tensor:
        return self._get("model.embed_tokens.weight", self._geometry.vocab, self._geometry.hidden)

    def head(self, embed: torch.Tensor) -> torch.Tensor:
        """A part of `embed` where the two are tied."""
        g = self._geometry
        tied = g.tied_embeddings
        head = embed if tied else self._get("lm_head.weight", g.vocab, g.hidden)
        return head[self._part.vocab.cut]

    def _get(self, name: str, *shape: int) -> torch.Tensor:
        return self._read.get(name, *shape).to(device=self._device, dtype=self._dtype)

    def _norm(self, name: str) -> torch.Tensor:
        tensor = self._read.get(name, self._geometry.hidden)
        return tensor.to(device=self._device, dtype=torch.float32)


@contextmanager
def open_tensors(
    directory: Path,
    geometry: ModelGeometry,
    dtype: torch.dtype,
    device: str,
    shard: Shard | None = None,
) -> Iterator[Tensors]:
    """`<directory>/cloud/model.safetensors` (Hugging Face Llama names), open for reading.

    Raises, also from the methods of what it gives:
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
            yield Tensors(_Reader(file, path), geometry, part, dtype, device)
    except SafetensorError as error:
        raise ModelMismatch(
            f"{path} cannot be read: {error}.", hint="Build the model again."
        ) from error


def load_weights(
    directory: Path,
    geometry: ModelGeometry,
    dtype: torch.dtype,
    device: str,
    shard: Shard | None = None,
) -> Weights:
    """All weights in memory, as linears; raises as `open_tensors` does.

    `geometry` is the whole model's. With a `shard`, the linears and the head are that rank's part;
    `out` and `down` then give partial products, to be summed over the ranks.
    """
    with open_tensors(directory, geometry, dtype, device, shard) as tensors:
        layers = [Layer.of(layer) for layer in tensors.layers()]
        embed = tensors.embed()
        return Weights(
            embed=embed,
            layers=tuple(layers),
            final_norm=tensors.final_norm(),
            head=tensors.head(embed),
        )


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
