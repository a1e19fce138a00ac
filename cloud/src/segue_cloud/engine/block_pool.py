"""Who owns which KV page: a pure bookkeeper, it never touches the numbers in the pages.

A page holds the KV of 16 tokens in all layers. A page is in exactly one of three places: free,
owned by one sequence, or part of a cached block. A cached block is four pages (64 tokens) under a
content-addressed id; sequences share it by reference count, and an unreferenced one stays until
its pages are needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from segue_cloud.engine.domains import OPEN, names
from segue_contract.limits import KV_BLOCK_TOKENS, KV_PAGE_TOKENS

PAGE_TOKENS = KV_PAGE_TOKENS
PAGES_PER_BLOCK = KV_BLOCK_TOKENS // KV_PAGE_TOKENS
# A block that was used often survives at most this many rounds of eviction without a new use.
_MAX_CREDIT = 3
# Blocks that were never found again are kept to one part in so many of the idle ones.
_ONCE_PART = 10


class Tier(Protocol):
    """Where evicted blocks may live on, coded smaller, until they are asked for again."""

    def keep(self, name: bytes, pages: Sequence[int], credit: int) -> None:
        """Copy a block before its pages are given away; `credit`: uses it has left."""
        ...

    def offers(self, name: bytes) -> bool:
        """Whether the block is kept, and bringing it back is worth it."""
        ...

    def bring(self, name: bytes, pages: Sequence[int]) -> None:
        """Write a block that is kept into four pages."""
        ...


@dataclass(slots=True)
class _Cached:
    pages: tuple[int, ...]
    refs: int
    kept_as: bytes | None = None
    credit: int = 0
    uses: int = 0
    aliases: tuple[bytes, ...] = ()


class BlockPool:
    """Pages, reference counts and the prefix cache.

    Eviction is by frequency (after S3-FIFO, SOSP 2023): blocks that nobody found again go first,
    the least recently released of them, as long as they are a tenth of the idle ones; so no number
    of one-off prompts pushes out what is asked for again and again. Of the others, one is passed
    over once per use. A block that comes again soon after it went counts as found again.
    Sequences release their blocks last to first, so leaves go before their parents.
    """

    def __init__(self, pages: int, tier: Tier | None = None, target: float = 1.0) -> None:
        """`target`: the share of pages above which idle blocks go, see `allocate`."""
        if pages < PAGES_PER_BLOCK:
            raise ValueError(f"a pool has at least {PAGES_PER_BLOCK} pages, not {pages}")
        self.pages_total = pages
        self.tier = tier
        self.target = target
        self._free = list(range(pages - 1, -1, -1))
        self._owned: set[int] = set()
        self._cached: dict[bytes, _Cached] = {}
        # Idle blocks that were never found again, and those that were.
        self._once: OrderedDict[bytes, None] = OrderedDict()
        self._often: OrderedDict[bytes, None] = OrderedDict()
        self._gone: OrderedDict[bytes, None] = OrderedDict()  # names that left `_once` lately
        self._aliases: dict[bytes, bytes] = {}
        self.evicted_blocks = 0

    # -- what is there ------------------------------------------------------------------------

    @property
    def pages_free(self) -> int:
        """Pages that an allocation could get now: free ones and those of idle cached blocks."""
        return len(self._free) + PAGES_PER_BLOCK * self.blocks_idle

    @property
    def used_share(self) -> float:
        """Share of the pages that hold something, be it only a cached block."""
        return 1.0 - len(self._free) / self.pages_total

    @property
    def target_pages(self) -> int:
        return int(self.target * self.pages_total)

    @property
    def blocks_idle(self) -> int:
        """Cached blocks that nobody references."""
        return len(self._once) + len(self._often)

    @property
    def blocks_cached(self) -> int:
        return len(self._cached)

    def resolve(self, block: bytes) -> bytes | None:
        """The id under which `block`, or the block it is an alias of, is cached."""
        if block in self._cached:
            return block
        return self._aliases.get(block)

    def count_prefix(self, ids: Sequence[bytes], domains: Sequence[bytes] = (OPEN,)) -> int:
        """Length of the longest prefix of `ids` that is cached (or kept in the tier) there."""
        for index, block in enumerate(ids):
            if not any(self.resolve(n) or self.tier_offers(n) for _, n in names(domains, block)):
                return index
        return len(ids)

    def pages_of(self, block: bytes) -> tuple[int, ...]:
        """Pages of a cached block, for reading them now."""
        return self._cached[block].pages

    def tier_offers(self, name: bytes) -> bool:
        return self.tier is not None and self.tier.offers(name)

    # -- pages of one sequence ----------------------------------------------------------------

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages for one owner, evicting idle blocks as needed; None if there is no room.

        Nothing changes when it returns None. Afterwards no more than the target is used, or no
        block is idle: what is above it is in use by turns.
        """
        if count > self.pages_free:
            return None
        spare = self.pages_total - self.target_pages
        while len(self._free) < count or (self.blocks_idle and len(self._free) < count + spare):
            self._evict_one()
        taken = [self._free.pop() for _ in range(count)]
        self._owned.update(taken)
        return taken

    def free(self, pages: Iterable[int]) -> None:
        """Give owned pages back."""
        for page in pages:
            self._owned.remove(page)
            self._free.append(page)

    # -- cached blocks ------------------------------------------------------------------------

    def is_idle(self, block: bytes) -> bool:
        """Cached, and referenced by nobody."""
        return block in self._once or block in self._often

    def acquire(self, block: bytes) -> tuple[int, ...]:
        """Reference a block that is cached and return its pages."""
        entry = self._cached[block]
        if entry.refs == 0:
            del self._queue(entry)[block]
        entry.refs += 1
        entry.credit = min(entry.credit + 1, _MAX_CREDIT)
        entry.uses += 1
        return entry.pages

    def release(self, block: bytes) -> None:
        """Drop one reference; at none the block is idle and may be evicted."""
        entry = self._cached[block]
        assert entry.refs > 0, "a block was released more often than acquired"
        entry.refs -= 1
        if entry.refs == 0:
            self._queue(entry)[block] = None

    def enter(
        self, block: bytes, pages: Sequence[int], *, refs: int, kept_as: bytes | None = None
    ) -> bool:
        """Turn four owned pages into a cached block with `refs` references.

        `kept_as`: the name of its coded copy in the tier; None where there shall be none. A copy
        is not exact, so that it must not go by the name of what we computed.

        Returns False, and changes nothing, where the id is cached already.
        """
        assert len(pages) == PAGES_PER_BLOCK, "a block has four pages"
        if block in self._cached:
            return False
        for page in pages:
            self._owned.remove(page)
        entry = self._cached[block] = _Cached(tuple(pages), refs, kept_as)
        if self._gone.pop(kept_as or block, self) is None:
            entry.uses = 1
        if refs == 0:
            self._queue(entry)[block] = None
        return True

    def alias(self, block: bytes, name: bytes) -> None:
        """Let `name` also find a cached block: the same tokens' KV under another recipe."""
        if name not in self._cached and name not in self._aliases:
            self._aliases[name] = block
            self._cached[block].aliases += (name,)

    def bring(self, name: bytes, pages: Sequence[int]) -> None:
        """Fill four owned pages from the tier and make them a cached block, referenced once."""
        assert self.tier is not None, "only what the tier offers is brought back"
        self.tier.bring(name, pages)
        entered = self.enter(name, pages, refs=1, kept_as=name)
        assert entered, "a block that is cached is not brought back"

    def relieve(self, at_most: int) -> int:
        """Evict idle blocks while more than the target is used; returns how many.

        For between allocations: blocks that turns have released may lie above the target.
        """
        spare = self.pages_total - self.target_pages
        evicted = 0
        while evicted < at_most and self.blocks_idle and len(self._free) < spare:
            self._evict_one()
            evicted += 1
        return evicted

    def _queue(self, entry: _Cached) -> OrderedDict[bytes, None]:
        return self._often if entry.uses else self._once

    def _evict_one(self) -> None:
        while True:
            some_once = _ONCE_PART * len(self._once) >= self.blocks_idle
            queue = self._once if some_once else self._often
            block, _ = queue.popitem(last=False)
            entry = self._cached[block]
            if entry.credit == 0:
                break
            entry.credit -= 1
            queue[block] = None
        if self.tier is not None and entry.kept_as is not None:
            self.tier.keep(entry.kept_as, entry.pages, min(entry.uses, _MAX_CREDIT))
        if not entry.uses:
            self._gone[entry.kept_as or block] = None
            if len(self._gone) > self.pages_total // PAGES_PER_BLOCK:
                self._gone.popitem(last=False)
        self._drop(block)
        self.evicted_blocks += 1

    def _drop(self, block: bytes) -> None:
        """Forget a block that was just taken out of its queue."""
        entry = self._cached.pop(block)
        for name in entry.aliases:
            del self._aliases[name]
        self._free.extend(reversed(entry.pages))

    def check_integrity(self) -> None:
        """Assert that every page is in exactly one place and the counts agree."""
        cached = [page for entry in self._cached.values() for page in entry.pages]
        everything = [*self._free, *self._owned, *cached]
        assert len(everything) == self.pages_total, "a page was lost or doubled"
        assert set(everything) == set(range(self.pages_total)), "a page is in two places"
        idle = {block for block, entry in self._cached.items() if entry.refs == 0}
        assert idle == {*self._once, *self._often}, "idle blocks and reference counts disagree"
        assert not any(self._cached[block].uses for block in self._once)
        assert all(self._cached[block].uses for block in self._often)
        for name, block in self._aliases.items():
            assert name in self._cached[block].aliases, "an alias of a block that is gone"
        assert sum(len(e.aliases) for e in self._cached.values()) == len(self._aliases)
        assert all(entry.refs >= 0 for entry in self._cached.values())
        assert all(len(entry.pages) == PAGES_PER_BLOCK for entry in self._cached.values())
