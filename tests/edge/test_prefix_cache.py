"""The prefix cache against a plain model of it, step by step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from segue_contract.ids import DEFAULT_TENANT
from segue_contract.kv.layout import ROOT_PARENT
from segue_edge.prefill.prefix_cache import PrefixCache

BLOCK = np.zeros((1, 1, 64, 1), np.float32)  # 256 bytes; a block has two
SIZE = 2 * BLOCK.nbytes


def name(*path: int) -> bytes:
    """A block's id by its place in a tree of prompts."""
    return bytes(path).ljust(16, b"\xff")


def chain(*path: int) -> list[bytes]:
    return [name(*path[: i + 1]) for i in range(len(path))]


def put_chain(cache: PrefixCache, *path: int) -> list[bool]:
    ids = chain(*path)
    parents = [ROOT_PARENT, *ids]
    return [cache.put(b, BLOCK, BLOCK, p) for b, p in zip(ids, parents, strict=False)]


def test_lookup_finds_the_longest_prefix() -> None:
    cache = PrefixCache(10 * SIZE)
    put_chain(cache, 1, 2, 3)
    assert cache.lookup(chain(1, 2, 9)) == 2
    assert cache.lookup(chain(2)) == 0
    assert (cache.hits, cache.misses) == (2, 2)
    cache.check_integrity()


def test_get_returns_what_was_put() -> None:
    cache = PrefixCache(SIZE)
    k, v = BLOCK + 1, BLOCK + 2
    assert cache.put(name(1), k, v)
    found = cache.get(name(1))
    assert found is not None
    assert found[0] is k
    assert found[1] is v
    assert cache.get(name(2)) is None


def test_eviction_takes_the_oldest_leaf_and_never_a_parent_first() -> None:
    cache = PrefixCache(4 * SIZE)
    put_chain(cache, 1, 2, 3)
    put_chain(cache, 5)
    put_chain(cache, 6)  # one too many: the leaf 1-2-3 goes, not its parents
    assert cache.lookup(chain(1, 2, 3)) == 2
    assert cache.lookup(chain(5)) == 1
    cache.check_integrity()
    put_chain(cache, 7)
    assert cache.lookup(chain(1, 2)) == 2, "just looked up: others were older"
    assert cache.lookup(chain(6)) == 0


def test_a_chain_longer_than_the_budget_keeps_its_head() -> None:
    cache = PrefixCache(3 * SIZE)
    assert put_chain(cache, 1, 2, 3, 4, 5) == [True, True, True, False, False]
    assert cache.lookup(chain(1, 2, 3, 4, 5)) == 3
    cache.check_integrity()


def test_a_block_without_its_parent_is_refused() -> None:
    cache = PrefixCache(10 * SIZE)
    assert not cache.put(name(1, 2), BLOCK, BLOCK, name(1))
    assert len(cache) == 0
    assert not PrefixCache(SIZE - 1).put(name(1), BLOCK, BLOCK)


def test_putting_twice_counts_once() -> None:
    cache = PrefixCache(10 * SIZE)
    put_chain(cache, 1)
    assert cache.put(name(1), BLOCK, BLOCK)
    assert cache.nbytes == SIZE
    cache.clear()
    assert cache.nbytes == 0
    cache.check_integrity()


def test_check_integrity_sees_an_orphan() -> None:
    cache = PrefixCache(10 * SIZE)
    put_chain(cache, 1, 2)
    del cache._entries[name(1)]  # what a bug might do
    with pytest.raises(AssertionError):
        cache.check_integrity()


class Cache(RuleBasedStateMachine):
    """Random use: whatever happens, the structure holds and lookups agree with gets."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(7 * SIZE)

    @rule(path=st.lists(st.integers(0, 2), min_size=1, max_size=5))
    def put(self, path: list[int]) -> None:
        kept = put_chain(self.cache, *path)
        assert sorted(kept, reverse=True) == kept, "nothing is kept after a block that is not"

    @rule(path=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def look(self, path: list[int]) -> None:
        ids = chain(*path)
        found = self.cache.lookup(ids)
        assert all(self.cache.get(block) is not None for block in ids[:found])
        assert found == len(ids) or self.cache.get(ids[found]) is None

    @precondition(lambda self: len(self.cache) > 0)
    @rule()
    def clear_sometimes(self) -> None:
        if self.cache.evictions % 13 == 12:
            self.cache.clear()

    @invariant()
    def whole(self) -> None:
        self.cache.check_integrity()


TestCacheMachine = Cache.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_a_tenant_keeps_is_found_by_no_other() -> None:
    cache = PrefixCache(10 * SIZE)
    acme, other = cache.of("acme"), cache.of("other")
    ids = chain(1, 2)
    for block, parent in zip(ids, (ROOT_PARENT, *ids), strict=False):
        assert acme.put(block, BLOCK, BLOCK, parent)
    assert (acme.lookup(ids), other.lookup(ids), cache.of(DEFAULT_TENANT).lookup(ids)) == (2, 0, 0)
    assert other.get(ids[0]) is None
    found = acme.get(ids[0])
    assert found is not None
    assert found[0] is BLOCK
    cache.check_integrity()
