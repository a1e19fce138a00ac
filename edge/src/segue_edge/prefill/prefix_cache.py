"""KV blocks by id, under a budget of bytes: what a prompt has in common with earlier ones."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from segue_contract.ids import DEFAULT_TENANT, digest
from segue_contract.kv.layout import ROOT_PARENT

Array = NDArray[Any]


@dataclass
class _Entry:
    parent: bytes
    k: Array
    v: Array
    children: int = 0

    @property
    def nbytes(self) -> int:
        return int(self.k.nbytes + self.v.nbytes)


class PrefixCache:
    """Least recently used first, and never a block before those that continue it.

    A block is of use only with all blocks before it. So using a block counts as a later use of its
    parents: the oldest entry is always a leaf, and eviction needs no search. Thread-safe; arrays
    handed in and out are shared and must not be written to.
    """

    def __init__(self, byte_budget: int) -> None:
        assert byte_budget >= 0
        self.byte_budget = byte_budget
        self.nbytes = 0
        self.hits = 0  # blocks that a lookup found
        self.misses = 0  # and that it did not
        self.evictions = 0
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def lookup(self, ids: Sequence[bytes]) -> int:
        """How many of `ids`, a prompt's blocks in order, are here from the first on."""
        with self._lock:
            found = 0
            while found < len(ids) and ids[found] in self._entries:
                found += 1
            for block in reversed(ids[:found]):
                self._entries.move_to_end(block)
            self.hits += found
            self.misses += len(ids) - found
            return found

    def get(self, id: bytes) -> tuple[Array, Array] | None:
        """`(k, v)` of a block, `[layers, kv_heads, 64, head_dim]` each; None if it is not here."""
        with self._lock:
            entry = self._entries.get(id)
            if entry is None:
                return None
            self._touch(id)
            return entry.k, entry.v

    def put(self, id: bytes, k: Array, v: Array, parent: bytes = ROOT_PARENT) -> bool:
        """Keep a block after its `parent` (the root for a prompt's first). False: not kept.

        It is refused where its parent is gone, for no prompt could reach it, and where the budget
        does not hold it together with the blocks before it.
        """
        with self._lock:
            if id in self._entries:
                self._touch(id)
                return True
            if parent != ROOT_PARENT:
                if parent not in self._entries:
                    return False
                self._entries[parent].children += 1
            entry = _Entry(parent, k, v)
            self._entries[id] = entry
            self.nbytes += entry.nbytes
            self._touch(id)
            while self.nbytes > self.byte_budget:
                self._evict_oldest()
            return id in self._entries

    def of(self, tenant: str) -> TenantCache:
        """The tenant's part of it: no other one finds what it keeps there."""
        return TenantCache(self, tenant)

    def clear(self) -> None:
        """Forget everything; the counters stay."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0

    def check_integrity(self) -> None:
        """Raise AssertionError where the structure contradicts itself."""
        with self._lock:
            assert self.nbytes == sum(e.nbytes for e in self._entries.values())
            assert self.nbytes <= self.byte_budget
            place = {block: index for index, block in enumerate(self._entries)}
            children = dict.fromkeys(self._entries, 0)
            for block, entry in self._entries.items():
                if entry.parent != ROOT_PARENT:
                    assert entry.parent in place, "a block outlived its parent"
                    assert place[entry.parent] > place[block], "a parent is older than its child"
                    children[entry.parent] += 1
            assert all(children[b] == e.children for b, e in self._entries.items())

    def _touch(self, block: bytes) -> None:
        """The block and then its parents, up to the first: the first is the most recent."""
        while block != ROOT_PARENT:
            self._entries.move_to_end(block)
            block = self._entries[block].parent

    def _evict_oldest(self) -> None:
        _, entry = self._entries.popitem(last=False)
        assert entry.children == 0, "the oldest entry is a leaf"
        if entry.parent != ROOT_PARENT:
            self._entries[entry.parent].children -= 1
        self.nbytes -= entry.nbytes
        self.evictions += 1


class TenantCache:
    """What one tenant sees of a cache that all share: its name is part of each block's."""

    def __init__(self, cache: PrefixCache, tenant: str) -> None:
        self._cache = cache
        # Where nobody is told apart there is the usual tenant alone.
        self._tenant = b"" if tenant == DEFAULT_TENANT else tenant.encode()

    def lookup(self, ids: Sequence[bytes]) -> int:
        """See `PrefixCache.lookup`."""
        return self._cache.lookup([self._name(id) for id in ids])

    def get(self, id: bytes) -> tuple[Array, Array] | None:
        """See `PrefixCache.get`."""
        return self._cache.get(self._name(id))

    def put(self, id: bytes, k: Array, v: Array, parent: bytes = ROOT_PARENT) -> bool:
        """See `PrefixCache.put`."""
        after = parent if parent == ROOT_PARENT else self._name(parent)
        return self._cache.put(self._name(id), k, v, after)

    def _name(self, id: bytes) -> bytes:
        return digest(b"segue-tenant-1", self._tenant, id) if self._tenant else id
