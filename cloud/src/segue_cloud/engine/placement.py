"""Which pages the KV of a turn lies in: found in the cache, allocated, shared, given back. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from segue_cloud.engine.block_pool import PAGES_PER_BLOCK, BlockPool
from segue_cloud.engine.domains import named, names
from segue_cloud.engine.sequence import HOLE, Sequence, pages_for
from segue_contract.kv.layout import BLOCK_TOKENS, block_id


@dataclass(frozen=True)
class Recipes:
    """Digests. `own` names the blocks that the engine computes, `edge` those that edges ship; what
    we computed is found under the second name too, so that an edge need not ship what we have."""

    own: str
    edge: str


@dataclass(frozen=True)
class Reach:
    """How far back a token sees: the last `window` tokens, itself among them, and the first
    `sinks`. 0: all."""

    window: int = 0
    sinks: int = 0


ALL = Reach()


class Placement:
    """The pages of all turns, over one pool.

    A turn takes pages step by step, as its tokens are computed. Blocks that its window has passed
    are given back, sinks excepted; their places in its page table are `HOLE`, which nobody reads.
    """

    def __init__(self, pool: BlockPool, recipes: Recipes, reach: Reach = ALL) -> None:
        self.pool = pool
        self._recipes = recipes
        self._reach = reach

    # -- how much -----------------------------------------------------------------------------

    def peak_pages(self, tokens: int, chunk: int) -> int:
        """Most pages that a turn of `tokens` tokens holds at once, computed in chunks."""
        whole = pages_for(tokens)
        if not self._reach.window:
            return whole
        sinks = -(-self._reach.sinks // BLOCK_TOKENS) * PAGES_PER_BLOCK
        # Blocks are given back whole, so up to one before the window is still there.
        return min(whole, sinks + pages_for(self._reach.window + chunk + BLOCK_TOKENS) + 1)

    @property
    def pages_pinned(self) -> int:
        """Pages that running turns hold or share."""
        return self.pool.pages_total - self.pool.pages_free

    # -- the beginning ------------------------------------------------------------------------

    def match(self, sequence: Sequence) -> list[bytes]:
        """Cached blocks that a waiting sequence may start from, one token left to compute.

        A chain may change hands at any block: ours where we computed it, the edge's where it was
        shipped. Ours wins, because it has no codec loss. Also notes the domain of the chain.
        """
        matched: list[bytes] = []
        sequence.domain = 0
        for index in range((len(sequence.tokens) - 1) // BLOCK_TOKENS):
            parent = matched[-1] if matched else sequence.root
            ours = block_id(self._recipes.own, parent, sequence.block_tokens(index))
            found = self.pool.resolve(ours) or self._shipped(sequence, index)
            if found is None:
                break
            matched.append(found)
        return matched

    def _shipped(self, sequence: Sequence, index: int) -> bytes | None:
        for domain, name in self._names(sequence, index):
            found = self.pool.resolve(name)
            if found is not None:
                sequence.domain = max(sequence.domain, domain)
                return found
        return None

    def _names(self, sequence: Sequence, index: int) -> Iterator[tuple[int, bytes]]:
        """What a block may be called that the sequence may use: as the edge names it, or as one
        that ships under another allowed recipe does."""
        given = sequence.turn.prompt_blocks[index : index + 1]
        shipped = sequence.shipped_name(self._recipes.edge, index)
        return names(sequence.turn.domains, shipped, *given)

    def start(self, sequence: Sequence, matched: list[bytes]) -> None:
        """Begin with the matched blocks, and with what the tier has after them."""
        for block in matched:
            sequence.pages.extend(self.pool.acquire(block))
        sequence.chain.extend(matched)
        sequence.held.extend(matched)
        sequence.computed = BLOCK_TOKENS * len(matched)
        self.trim(sequence)
        self._bring(sequence)
        sequence.table_version += 1

    def _bring(self, sequence: Sequence) -> None:
        for index in range(len(sequence.chain), (len(sequence.tokens) - 1) // BLOCK_TOKENS):
            offers = (one for one in self._names(sequence, index) if self.pool.tier_offers(one[1]))
            domain, name = next(offers, (0, b""))
            if not name or self.pool.resolve(name) is not None:
                return
            pages = self.pool.allocate(PAGES_PER_BLOCK)
            if pages is None:
                return
            self.pool.bring(name, pages)
            sequence.domain = max(sequence.domain, domain)
            sequence.pages.extend(pages)
            sequence.chain.append(name)
            sequence.held.append(name)
            sequence.computed += BLOCK_TOKENS
            self.trim(sequence)

    # -- on the way ---------------------------------------------------------------------------

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for the first `tokens` tokens; False, and no change, where there are none left."""
        missing = pages_for(tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        pages = self.pool.allocate(missing)
        if pages is None:
            return False
        sequence.pages.extend(pages)
        sequence.table_version += 1
        return True

    def enter_full_blocks(self, sequence: Sequence) -> None:
        """Give every block that was just completed to the prefix cache, still referenced."""
        while (len(sequence.chain) + 1) * BLOCK_TOKENS <= sequence.computed:
            index = len(sequence.chain)
            name = block_id(self._recipes.own, sequence.parent, sequence.block_tokens(index))
            domain = sequence.turn.domains[sequence.domain]
            shipped = named(domain, sequence.shipped_name(self._recipes.edge, index))
            pages = sequence.block_pages(index)
            entered = self.pool.enter(name, pages, refs=1, kept_as=shipped)
            if entered:
                self.pool.alias(name, shipped)
            sequence.chain.append(name)
            # Somebody else may have computed the same block: keep our own pages then.
            sequence.held.append(name if entered else None)
        self.trim(sequence)

    def trim(self, sequence: Sequence) -> None:
        """Give back the blocks that no token from `computed` on will see."""
        if not self._reach.window:
            return
        first_seen = sequence.computed - self._reach.window + 1
        first = -(-self._reach.sinks // BLOCK_TOKENS)
        for index in range(max(first, sequence.trimmed), len(sequence.held)):
            if (index + 1) * BLOCK_TOKENS > first_seen:
                return
            self._give_back(sequence, index)
            sequence.trimmed = index + 1
            sequence.table_version += 1

    def _give_back(self, sequence: Sequence, index: int) -> None:
        held = sequence.held[index]
        if held is not None:
            self.pool.release(held)  # it stays in the cache for others until its pages are needed
        else:
            self.pool.free(sequence.block_pages(index))
        sequence.held[index] = None
        at = index * PAGES_PER_BLOCK
        sequence.pages[at : at + PAGES_PER_BLOCK] = [HOLE] * PAGES_PER_BLOCK

    # -- the end ------------------------------------------------------------------------------

    def release(self, sequence: Sequence) -> None:
        """Give all pages back: cached blocks stay in the cache, the rest is free at once."""
        for held in reversed(sequence.held):
            if held is not None:
                self.pool.release(held)
        own = [
            page
            for index, page in enumerate(sequence.pages)
            if page != HOLE
            and (
                index // PAGES_PER_BLOCK >= len(sequence.held)
                or sequence.held[index // PAGES_PER_BLOCK] is None
            )
        ]
        self.pool.free(own)
        sequence.pages.clear()
        sequence.chain.clear()
        sequence.held.clear()
        sequence.computed = 0
        sequence.trimmed = 0
        sequence.table_version += 1
