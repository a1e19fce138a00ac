"""Blocks between a device's pages and the host: the same numbers, whichever way they take."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from segue_cloud.engine.block_pool import PAGES_PER_BLOCK, BlockPool
from segue_cloud.engine.cuda.host_tier import PinnedTier
from segue_cloud.engine.cuda.memory import card_pages, token_bytes, weight_bytes
from segue_cloud.engine.cuda.pages import DevicePages
from segue_cloud.engine.cuda.transfers import DirectTransfers, Staging, Ticket
from segue_cloud.engine.devices import build_tier, choose_device
from segue_cloud.engine.host_tier import HostTier
from segue_cloud.engine.kv_pages import KvPages
from segue_cloud.engine.options import EngineOptions
from segue_contract.errors import InvalidArgument, ModelError
from segue_contract.kv.layout import KvBlock
from segue_contract.limits import STAGED_BLOCKS
from tests.support.tiny_llama import TINY

SEED = 12


class _Later:
    """A copy that ends when the test says so."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish
        self.event = threading.Event()

    def end(self) -> None:
        self._finish()
        self.event.set()

    def ready(self) -> bool:
        return self.event.is_set()

    def wait(self) -> None:
        assert self.event.wait(30), "nobody ended the copy"


class LateTransfers(DirectTransfers):
    """What is fetched is gathered at once and arrives later, as on a card's side stream."""

    def __init__(self) -> None:
        self.under_way: list[_Later] = []

    def fetch(self, read: Callable[[], torch.Tensor], into: torch.Tensor) -> Ticket:
        gathered = read()
        into.fill_(float("nan"))
        later = _Later(lambda: (into.copy_(gathered), None)[1])
        self.under_way.append(later)
        return later

    def end_all(self) -> None:
        for later in self.under_way:
            if not later.ready():
                later.end()


def filled(pages: int, dtype: torch.dtype, transfers: DirectTransfers | None = None) -> DevicePages:
    memory = DevicePages(TINY.kv, pages, dtype, "cpu", transfers or DirectTransfers())
    print("kv seed", SEED)
    generator = torch.Generator().manual_seed(SEED)
    for cache in (*memory.k, *memory.v):
        cache.copy_(torch.randn(cache.shape, generator=generator))
    return memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_go_in_and_out_as_with_plain_pages(dtype: torch.dtype) -> None:
    memory = filled(16, dtype)
    plain = KvPages(TINY.kv, 17, dtype, "cpu")
    for layer in range(TINY.layers):
        plain.k[layer].copy_(memory.k[layer])
        plain.v[layer].copy_(memory.v[layer])
    shape = (TINY.layers, TINY.kv_heads, 64, TINY.head_dim)
    rng = np.random.default_rng(SEED)
    for kind in (np.float32, np.float16):
        k, v = (rng.standard_normal(shape).astype(kind) for _ in range(2))
        k.flags.writeable = False  # as it comes out of a frame
        for number in range(3):  # buffers are used again
            pages = [5, 2, 9, number]
            memory.write_block(pages, KvBlock(b"b", "", k, v))
            plain.write_block(pages, KvBlock(b"b", "", k, v))
            for one, other in zip(memory.read_block(pages), plain.read_block(pages), strict=True):
                assert one.dtype == np.float32
                assert np.array_equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(memory.k, plain.k, strict=True))
    assert memory.scratch_page == 16


def test_what_was_read_stays_when_its_pages_and_buffers_are_used_again() -> None:
    memory = filled(16, torch.float32)
    first = [part.copy() for part in memory.read_block([0, 1, 2, 3])]
    kept = memory.read_block([0, 1, 2, 3])
    for start in range(STAGED_BLOCKS + 2):
        memory.read_block([start, start + 1, 4, 5])
    assert all(np.array_equal(a, b) for a, b in zip(first, kept, strict=True))


def test_a_buffer_is_held_by_one_copy_at_a_time() -> None:
    staging = Staging(DirectTransfers(), 2, (3,), torch.float32)
    first, second = staging.take(), staging.take()
    assert first is not None
    assert second is not None
    assert first is not second
    assert staging.take() is None
    later = _Later(lambda: None)
    staging.give_back(first, later)
    later.end()
    assert staging.take() is first
    staging.give_back(second)
    assert staging.take() is second


def cache(pool: BlockPool, name: bytes) -> tuple[int, ...]:
    pages = pool.allocate(PAGES_PER_BLOCK)
    assert pages is not None
    pool.enter(name, pages, refs=0, kept_as=name)
    return tuple(pages)


def test_the_pinned_tier_keeps_what_the_plain_one_keeps() -> None:
    memory = filled(64, torch.float32)
    plain = HostTier(memory, 1 << 20, lambda: 0.0)
    pinned = build_tier(memory, 1 << 20, lambda: 0.0)
    assert isinstance(pinned, PinnedTier)
    for tier in (plain, pinned):
        pool = BlockPool(64, tier)
        for number in range(6):
            cache(pool, b"%d" % number)
        pool.target = 0.0
        tier.at_leisure()
        assert pool.relieve(6) == 6
    pinned.settle()
    pinned.check_integrity()
    assert pinned.blocks_kept == plain.blocks_kept == 6
    assert pinned.bytes_kept == plain.bytes_kept
    for number in range(6):
        name = b"%d" % number
        plain.bring(name, [0, 1, 2, 3])
        pinned.bring(name, [4, 5, 6, 7])
        for a, b in zip(memory.read_block([0, 1, 2, 3]), memory.read_block([4, 5, 6, 7])):  # noqa: B905
            assert np.array_equal(a, b)
    pinned.close()


def test_a_block_leaves_while_its_pages_have_another_owner() -> None:
    transfers = LateTransfers()
    memory = filled(16, torch.float32, transfers)
    tier = PinnedTier(memory, 1 << 20, lambda: 0.0)
    wanted = [part[:, :, :64].clone() for part in (torch.stack(memory.k), torch.stack(memory.v))]
    tier.keep(b"a", [0, 1, 2, 3], 0)
    blank = np.zeros((TINY.layers, TINY.kv_heads, 64, TINY.head_dim), np.float32)
    memory.write_block([0, 1, 2, 3], KvBlock(b"z", "", blank, blank))
    assert tier.offers(b"a"), "what is on its way is offered"
    transfers.end_all()
    tier.bring(b"a", [4, 5, 6, 7])  # it waits for the copy; nothing was rounded yet
    for part, cached in zip(wanted, (memory.k, memory.v), strict=True):
        assert torch.equal(torch.stack(cached)[:, :, 64:128], part)
    tier.settle()
    assert tier.blocks_kept == 1
    tier.close()


def test_no_more_blocks_are_under_way_than_there_are_buffers() -> None:
    transfers = LateTransfers()
    memory = filled(64, torch.float32, transfers)
    tier = PinnedTier(memory, 1 << 20, lambda: 0.0)
    for number in range(STAGED_BLOCKS + 3):
        tier.keep(b"%d" % number, [4 * number + i for i in range(4)], 0)
    assert tier.skipped_blocks == 3
    assert not tier.offers(b"%d" % STAGED_BLOCKS)
    transfers.end_all()
    tier.settle()
    assert tier.blocks_kept == STAGED_BLOCKS
    tier.keep(b"again", [0, 1, 2, 3], 0)
    assert tier.offers(b"again"), "the buffers are free again"
    transfers.end_all()
    tier.close()
    tier.check_integrity()


def test_a_pool_takes_what_the_weights_leave_of_a_card() -> None:
    gib = 1 << 30
    page = token_bytes(TINY, 2) * 16
    pages = card_pages(EngineOptions(), TINY, 2, 24 * gib)
    assert 18 * gib < pages * page < 0.9 * 24 * gib
    assert card_pages(EngineOptions(pool_bytes=100 * page), TINY, 2, 24 * gib) == 100
    with pytest.raises(ModelError, match="too small"):
        card_pages(EngineOptions(pool_bytes=page), TINY, 2, 24 * gib)
    with pytest.raises(ModelError, match="do not fit") as caught:
        card_pages(EngineOptions(pool_bytes=2 * gib), TINY, 2, gib)
    assert "--pool-mb" in caught.value.hint


def test_the_weights_of_a_known_model() -> None:
    from tests.support.shapes import LLAMA_8B

    assert weight_bytes(LLAMA_8B, 2) == pytest.approx(16.06e9, rel=0.001)  # 8.03e9 parameters
    assert token_bytes(LLAMA_8B, 2) == 131_072


def test_a_device_that_is_not_there_is_refused() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InvalidArgument, match="cuda:99") as caught:
        choose_device("cuda:99")
    assert "--device cpu" in caught.value.hint
