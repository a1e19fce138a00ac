"""Weights that do not fit their manifest are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from segue_cloud.engine.weights import load_weights, make_linear, plain_linear
from segue_contract.errors import ModelMismatch, ModelMissing
from tests.support.tiny_llama import TINY, WEIGHTS, build_tiny_llama

NAME = "model.layers.1.mlp.up_proj.weight"


def load(directory: Path) -> None:
    load_weights(directory, TINY, torch.float32, "cpu")


def test_a_whole_model_loads(tmp_path: Path) -> None:
    build_tiny_llama(tmp_path)
    weights = load_weights(tmp_path, TINY, torch.bfloat16, "cpu")
    assert len(weights.layers) == TINY.layers
    assert weights.embed.dtype == torch.bfloat16
    assert weights.final_norm.dtype == torch.float32


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelMissing, match="no cloud weights"):
        load(tmp_path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    build_tiny_llama(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[NAME]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ModelMismatch, match=NAME):
        load(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    build_tiny_llama(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[NAME] = tensors[NAME][:-1].contiguous()
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ModelMismatch, match=NAME) as refused:
        load(tmp_path)
    assert "[127, 64]" in refused.value.message
    assert "[128, 64]" in refused.value.message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_with_bad_numbers_is_named(tmp_path: Path, bad: float) -> None:
    build_tiny_llama(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[NAME][3, 5] = bad
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ModelMismatch, match=NAME) as refused:
        load(tmp_path)
    assert refused.value.fields["tensor"] == NAME


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_a_file_that_was_cut_off(tmp_path: Path, size: int) -> None:
    build_tiny_llama(tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelMismatch, match="cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("rows", [1, 5, 32, 200])
def test_the_packed_product_equals_the_plain_one(rows: int) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(96, 64, generator=generator).bfloat16()
    x = torch.randn(rows, 64, generator=generator).bfloat16()
    packed, plain = make_linear(weight)(x), plain_linear(weight)(x)
    assert packed.shape == plain.shape
    torch.testing.assert_close(packed.float(), plain.float(), rtol=1e-2, atol=5e-2)
