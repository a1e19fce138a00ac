"""The edge's model on the built default model: chunks, blocks, prefixes, cancel, decode."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from segue_contract.chat import ChatTokenizer
from segue_contract.errors import InvalidArgument, ModelMismatch, ModelMissing, PromptTooLong
from segue_contract.kv.layout import KvGeometry
from segue_edge.prefill.kv import PastKv
from segue_edge.prefill.providers import CPU, CUDA, choose_device, prefill_graph
from segue_edge.prefill.quality import held_out_text
from segue_edge.prefill.runner import GraphRunner
from segue_edge.prefill.runtime import EdgeModel

# Sums of products in another order differ in the last bits; 30 layers of 8-bit rounding turn some
# of them into one step of an activation. Keys reach 30, values 10.
CHUNK_ATOL = 0.75


@pytest.fixture(scope="module")
def model(model_dir: Path) -> EdgeModel:
    return EdgeModel.load(model_dir, threads=2, providers="cpu")


@pytest.fixture(scope="module")
def tokens(model: EdgeModel, model_dir: Path) -> list[int]:
    return ChatTokenizer.load(model_dir, model.manifest).encode(held_out_text())[:400]


def test_kv_does_not_depend_on_the_chunks(model: EdgeModel, tokens: list[int]) -> None:
    whole = model.prefill(tokens, chunk=512)
    for chunk in (64, 128, 256):
        parts = model.prefill(tokens, chunk=chunk)
        assert parts.logits.argmax() == whole.logits.argmax()
        for found, expected in ((parts.kv.k, whole.kv.k), (parts.kv.v, whole.kv.v)):
            difference = np.abs(found[:, :, :400] - expected[:, :, :400])
            assert difference.max() < CHUNK_ATOL
            assert difference.mean() < 0.02


def test_blocks_come_in_order_and_are_the_buffers(model: EdgeModel, tokens: list[int]) -> None:
    seen: list[tuple[int, np.ndarray, np.ndarray]] = []
    result = model.prefill(tokens, None, lambda *block: seen.append(block), chunk=128)
    assert [index for index, _, _ in seen] == list(range(400 // 64))
    shape = (model.geometry.layers, model.geometry.kv_heads, 64, model.geometry.head_dim)
    for index, k, v in seen:
        assert k.shape == v.shape == shape
        assert k.dtype == np.float32
        part = slice(64 * index, 64 * index + 64)
        np.testing.assert_array_equal(k, result.kv.k[:, :, part])
        np.testing.assert_array_equal(v, result.kv.v[:, :, part])
        k[:] = 0  # the callee's own: the buffer keeps its values
    assert np.abs(result.kv.k[:, :, :384]).max() > 1


def test_a_prefix_from_blocks_gives_what_computing_gives(
    model: EdgeModel, tokens: list[int]
) -> None:
    blocks: list[tuple[np.ndarray, np.ndarray]] = []
    fresh = model.prefill(tokens, None, lambda _, k, v: blocks.append((k, v)), chunk=64)
    past = PastKv.from_blocks(model.geometry, blocks[:4], capacity=len(tokens))
    indices: list[int] = []
    again = model.prefill(tokens, past, lambda i, k, v: indices.append(i), chunk=64)
    assert indices == [4, 5], "blocks of the past are not repeated"
    # The same chunks over the same KV: nothing differs at all.
    np.testing.assert_array_equal(again.kv.v[:, :, :400], fresh.kv.v[:, :, :400])
    np.testing.assert_array_equal(again.logits, fresh.logits)


def test_a_block_begun_by_decode_is_handed_out_once_it_is_whole(
    model: EdgeModel, tokens: list[int]
) -> None:
    kv = model.prefill(tokens[:100]).kv
    seen: list[int] = []
    model.prefill(tokens[:200], kv, lambda i, k, v: seen.append(i))
    assert seen == [1, 2]


def test_decode_goes_on_from_prefill_and_the_buffer_grows(
    model: EdgeModel, tokens: list[int]
) -> None:
    start = tokens[:250]
    kv = model.prefill(start).kv
    for token in tokens[250:330]:  # beyond the first capacity
        logits = model.decode_step(token, kv)
    assert kv.length == 330
    prefilled = model.prefill(tokens[:330])
    assert logits.argmax() == prefilled.logits.argmax()
    correlation = np.corrcoef(logits, prefilled.logits)[0, 1]
    assert correlation > 0.99, "two quantisations of one model"


def test_both_graphs_use_one_kv_buffer_without_a_copy(model: EdgeModel, tokens: list[int]) -> None:
    kv = model.prefill(tokens[:100], room=50).kv
    first = kv.k.__array_interface__["data"][0]
    places = [value.data_ptr() for value in kv.binding(model._prefill._session).get_outputs()[:-1]]
    assert places[:2] == [first, first + kv.k[0].nbytes]
    before = kv.k[:, :, :100].copy()
    kv.k[:, :, 100] = np.nan  # where the next token's key must come to lie
    model.decode_step(tokens[100], kv)
    decode = kv.binding(model._decode._session)
    assert sorted(value.data_ptr() for value in decode.get_outputs()[:-1]) == sorted(places)
    assert kv.k.__array_interface__["data"][0] == first
    np.testing.assert_array_equal(kv.k[:, :, :100], before)
    assert np.isfinite(kv.k[:, :, 100]).all()
    assert kv.binding(model._decode._session) is decode
    kv.reserve(kv.capacity + 1)
    assert kv.binding(model._decode._session) is not decode, "it holds the old buffer"


def test_a_graph_on_another_device_computes_the_same_by_copying(
    model: EdgeModel, tokens: list[int]
) -> None:
    session = model._prefill._session
    by_copy = GraphRunner(session, model.manifest.geometry, in_place=False)
    in_place = GraphRunner(session, model.manifest.geometry, in_place=True)
    ids = np.asarray(tokens[:150], np.int64)
    results = []
    for runner in (by_copy, in_place):
        kv = model.new_kv(150)
        for part in (ids[:64], ids[64:128], ids[128:]):
            logits = runner.run(part, kv)
        results.append((logits, kv.v[:, :, :150].copy()))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-4, atol=1e-3)


def test_bounds_are_errors_with_the_numbers(model: EdgeModel) -> None:
    with pytest.raises(PromptTooLong, match="8193") as caught:
        model.prefill([5] * (model.context + 1))
    assert caught.value.fields["context"] == model.context
    full = model.new_kv(64)
    full.length = model.context
    with pytest.raises(PromptTooLong):
        model.decode_step(5, full)


def test_recipes_and_devices(model: EdgeModel) -> None:
    assert model.device.name == "cpu"
    assert model.recipe.digest in model.manifest.allowed_recipes()
    with pytest.raises(InvalidArgument, match="no device"):
        choose_device("tpu")


def test_cuda_prefills_with_the_weight_only_graph_and_never_with_dynamic_int8() -> None:
    assert choose_device("auto", (CUDA, CPU)).providers == (CUDA, CPU)
    assert choose_device("cpu", (CUDA, CPU)).providers == (CPU,)
    assert choose_device("auto", (CPU,)).name == "cpu"
    with pytest.raises(InvalidArgument, match="CUDA"):
        choose_device("cuda", (CPU,))
    assert prefill_graph((CUDA, CPU)) == "decode"
    assert prefill_graph((CPU,)) == "prefill", "CUDA was asked for and did not start"


def test_directories_that_do_not_load(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(ModelMissing):
        EdgeModel.load(tmp_path)
    (tmp_path / "edge").mkdir()
    (tmp_path / "manifest.json").write_bytes((model_dir / "manifest.json").read_bytes())
    (tmp_path / "edge" / "decode.onnx").write_bytes(b"no graph")
    with pytest.raises(ModelMismatch, match=r"decode\.onnx"):
        EdgeModel.load(tmp_path, providers="cpu")


def test_kv_buffer_grows_truncates_and_hands_out_copies() -> None:
    geometry = KvGeometry(layers=2, kv_heads=1, head_dim=4)
    kv = PastKv(geometry, 10)
    ones = np.ones((2, 1, 64, 4), np.float32)
    for value in range(9):
        kv.append_block(ones * value, ones * -value)
    assert kv.length == 576 <= kv.capacity
    k, v = kv.block(7)
    assert (k == 7).all()
    assert (v == -7).all()
    kv.truncate(130)
    with pytest.raises(AssertionError):
        kv.block(2)
