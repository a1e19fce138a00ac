"""The block pool under any order of operations: no page is lost, doubled or shared by mistake."""

from __future__ import annotations

import random
from collections import OrderedDict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from segue_cloud.engine.block_pool import PAGES_PER_BLOCK, BlockPool

PAGES = 24


class PoolMachine(RuleBasedStateMachine):
    """Compares the pool with a plain model of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(PAGES, target=0.7)
        self.owned: list[list[int]] = []
        self.held: list[bytes] = []
        self.entered: dict[bytes, tuple[int, ...]] = {}
        self.counter = 0

    def _name(self) -> bytes:
        self.counter += 1
        return b"block-%d" % self.counter

    @property
    def _pinned(self) -> int:
        return PAGES_PER_BLOCK * len(set(self.held)) + sum(map(len, self.owned))

    @rule(count=st.integers(1, PAGES + 4))
    def allocate(self, count: int) -> None:
        room = PAGES - self._pinned
        pages = self.pool.allocate(count)
        # Idle cached blocks never stand in the way of an owner.
        assert (pages is not None) == (count <= room)
        if pages is not None:
            assert self.pool.used_share <= 0.7 or self.pool.blocks_idle == 0
        if pages is not None:
            assert len(set(pages)) == count
            taken = {page for group in self.owned for page in group}
            assert not taken & set(pages)
            for name in set(self.held):
                assert not set(self.entered[name]) & set(pages), "a page in use was given away"
            self.owned.append(pages)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.owned) - 1))
        self.pool.free(self.owned.pop(index))

    @precondition(lambda self: any(len(g) >= PAGES_PER_BLOCK for g in self.owned))
    @rule(data=st.data(), keep=st.booleans(), alias=st.booleans())
    def enter(self, data: st.DataObject, keep: bool, alias: bool) -> None:
        big = [i for i, g in enumerate(self.owned) if len(g) >= PAGES_PER_BLOCK]
        group = self.owned[data.draw(st.sampled_from(big))]
        pages, rest = group[:PAGES_PER_BLOCK], group[PAGES_PER_BLOCK:]
        name = self._name()
        assert self.pool.enter(name, pages, refs=int(keep))
        if alias:
            self.pool.alias(name, b"alias-" + name)
            assert self.pool.resolve(b"alias-" + name) == name
        self.entered[name] = tuple(pages)
        if keep:
            self.held.append(name)
        self.owned.remove(group)
        if rest:
            self.owned.append(rest)

    @precondition(lambda self: self.entered)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.entered)))
        if self.pool.resolve(name) is None:
            assert name not in self.held, "a block in use was evicted"
            return
        assert self.pool.acquire(name) == self.entered[name]
        self.held.append(name)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(index))

    @precondition(lambda self: self.held and any(len(g) >= 4 for g in self.owned))
    @rule()
    def enter_twice(self) -> None:
        group = next(g for g in self.owned if len(g) >= 4)
        assert not self.pool.enter(self.held[0], group[:4], refs=1)

    @invariant()
    def sound(self) -> None:
        self.pool.check_integrity()
        assert self.pool.pages_free == PAGES - self._pinned


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def _cache(pool: BlockPool, name: bytes) -> None:
    pages = pool.allocate(PAGES_PER_BLOCK)
    assert pages is not None
    pool.enter(name, pages, refs=0)


def test_the_least_recently_released_block_goes_first() -> None:
    pool = BlockPool(3 * PAGES_PER_BLOCK)
    for name in (b"a", b"b", b"c"):
        _cache(pool, name)
    assert pool.allocate(1) is not None
    assert [pool.resolve(n) for n in (b"a", b"b", b"c")] == [None, b"b", b"c"]


def test_a_block_that_was_used_again_outlives_newer_ones() -> None:
    pool = BlockPool(3 * PAGES_PER_BLOCK)
    for name in (b"common", b"b", b"c"):
        _cache(pool, name)
    for _ in range(2):
        pool.acquire(b"common")
        pool.release(b"common")
    assert pool.allocate(2 * PAGES_PER_BLOCK) is not None
    assert pool.resolve(b"common") == b"common"
    assert pool.resolve(b"b") is None
    assert pool.resolve(b"c") is None


def test_a_prefix_counts_only_without_gaps() -> None:
    pool = BlockPool(3 * PAGES_PER_BLOCK)
    for name in (b"a", b"c"):
        _cache(pool, name)
    pool.alias(b"c", b"other-name-of-c")
    assert pool.count_prefix([b"a", b"b", b"c"]) == 1
    assert pool.count_prefix([b"a", b"other-name-of-c"]) == 2


def test_blocks_in_use_outlive_a_scan_that_would_flush_an_lru() -> None:
    """Eight blocks asked for now and then, among one-off blocks that would fill the pool."""
    seed, blocks = 12, 32
    print("seed", seed)
    rng = random.Random(seed)
    asked = [
        b"hot%d" % rng.randrange(8) if rng.random() < 0.1 else b"once%d" % number
        for number in range(4000)
    ]
    pool, lru = BlockPool(blocks * PAGES_PER_BLOCK), OrderedDict[bytes, None]()
    hits = lru_hits = 0
    for name in asked:
        if pool.resolve(name):
            hits += 1
            pool.acquire(name)
            pool.release(name)
        else:
            _cache(pool, name)
        lru_hits += name in lru
        lru[name] = None
        lru.move_to_end(name)
        if len(lru) > blocks:
            lru.popitem(last=False)
    hot = sum(name.startswith(b"hot") for name in asked)
    print("asked again", hot, "hits", hits, "of an lru", lru_hits)
    assert hits > 0.9 * hot
    assert lru_hits < 0.5 * hot
    pool.check_integrity()
