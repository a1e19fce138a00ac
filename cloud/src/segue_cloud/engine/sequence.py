"""One turn while the engine works on it: tokens, pages, and how far its KV goes. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from segue_cloud.engine.block_pool import PAGE_TOKENS, PAGES_PER_BLOCK
from segue_cloud.engine.domains import named
from segue_cloud.engine.port import EngineTurn
from segue_contract.kv.layout import BLOCK_TOKENS, ROOT_PARENT, block_id

# Stands in a page table for a page that was given back: a window has passed it, nobody reads it.
HOLE = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens [0, computed) have their KV in `pages`; the rest waits to be computed.

    `chain` names the full 64-token blocks of [0, computed) in order, `held` those among them whose
    pages are cached blocks that this sequence references (None: the pages are its own).
    `shipped_names`: what the edge calls the blocks of `tokens`, as far as they were asked for.
    Blocks before `trimmed`, sinks excepted, were given back: their pages are `HOLE`.
    `shared_pages`: pages that others held when it began, so that it took none for them.
    `domain`: place among the turn's domains of the least trusted block in it.
    `table_version` changes whenever `pages` does, so that readers can keep copies.
    """

    turn: EngineTurn
    arrival: int
    tokens: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    chain: list[bytes] = field(default_factory=list)
    held: list[bytes | None] = field(default_factory=list)
    shipped_names: list[bytes] = field(default_factory=list)
    table_version: int = 0
    trimmed: int = 0
    shared_pages: int = 0
    cached_tokens: int = 0
    preempted: int = 0
    told_cached: bool = False
    domain: int = 0

    @staticmethod
    def of(turn: EngineTurn, arrival: int) -> Sequence:
        return Sequence(turn=turn, arrival=arrival, tokens=[*turn.prompt, *turn.made])

    @property
    def prompt_tokens(self) -> int:
        return len(self.turn.prompt)

    @property
    def reply_index(self) -> int:
        """Index in the reply of the next token to sample."""
        return len(self.tokens) - len(self.turn.prompt)

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """Only the newest token lacks its KV."""
        return self.uncomputed == 1

    @property
    def parent(self) -> bytes:
        return self.chain[-1] if self.chain else self.root

    @property
    def root(self) -> bytes:
        """What the first block comes after: all that follows is named after it."""
        return named(self.turn.domains[0], ROOT_PARENT)

    @property
    def tokens_left(self) -> int:
        """Reply tokens that may still be sampled."""
        return max(0, self.turn.max_tokens - self.reply_index)

    @property
    def pages_live(self) -> int:
        """Pages it holds or shares now."""
        return len(self.pages) - self.pages.count(HOLE)

    def block_tokens(self, index: int) -> list[int]:
        return self.tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]

    def shipped_name(self, recipe: str, index: int) -> bytes:
        """What the edge calls block `index` under `recipe`; known from the tokens alone."""
        names = self.shipped_names
        while len(names) <= index:
            parent = names[-1] if names else ROOT_PARENT
            names.append(block_id(recipe, parent, self.block_tokens(len(names))))
        return names[index]

    def block_pages(self, index: int) -> list[int]:
        return self.pages[index * PAGES_PER_BLOCK : (index + 1) * PAGES_PER_BLOCK]

    def check_integrity(self) -> None:
        assert 0 <= self.computed <= len(self.tokens)
        assert len(self.pages) * PAGE_TOKENS >= self.computed
        assert len(self.chain) == len(self.held)
        assert len(self.chain) * BLOCK_TOKENS <= self.computed
        live = [page for page in self.pages if page != HOLE]
        assert len(set(live)) == len(live)
        for index, held in enumerate(self.held):
            holes = self.block_pages(index).count(HOLE)
            assert holes in (0, PAGES_PER_BLOCK), "a block is given back as a whole"
            assert not holes or (held is None and index < self.trimmed)
        assert HOLE not in self.pages[len(self.held) * PAGES_PER_BLOCK :]


def pages_for(tokens: int) -> int:
    """Pages that hold the KV of `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)
