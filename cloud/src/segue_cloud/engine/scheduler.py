"""Which tokens the next step computes: continuous batching with chunked prefill. Pure.

`schedule` and `postprocess` are two pure calls around one effect, the step itself:

    step = scheduler.schedule()
    sampled = run(step)                       # one token per work with `samples`
    outputs = scheduler.postprocess(step, sampled)

`begin` and `end` are the two halves of `postprocess`. Between them the step may run elsewhere while
`schedule` already plans the next one, as if every sampled token were known and ended no turn:

    scheduler.begin(step)                     # the arrays of `step` are built before
    ahead = scheduler.schedule()              # while `step` runs
    outputs = scheduler.end(step, sampled)
    step = scheduler.still_valid(ahead)       # without the turns that have ended meanwhile

Pages may change hands in between: steps run one after another, so whatever the earlier one writes
is written before the later one's owner writes.

Policy: turns that decode go first, one token each, so that nobody's stream stalls for a new
prompt; what remains of the token budget is shared by prompts, oldest first. A turn is admitted
when all its known tokens fit. When pages run out, the youngest turn gives its pages back and
computes them again later; the cache usually still holds most of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from segue_cloud.engine.block_pool import PAGES_PER_BLOCK, BlockPool
from segue_cloud.engine.port import EngineOutput, EngineTurn
from segue_cloud.engine.sequence import Sequence, pages_for
from segue_contract.kv.layout import BLOCK_TOKENS, ROOT_PARENT, block_id

# Stands for a token that a running step is about to sample.
PENDING = -1
# A prompt's smallest share of a step: below it the fixed cost of a step outweighs the fairness.
_MIN_SHARE = 64


@dataclass(frozen=True)
class SchedulerLimits:
    """`step_tokens` bounds a step, `mixed_tokens` the prompt tokens of one that also decodes.

    The second is smaller because every decoding turn waits for the step to end.
    """

    max_batch: int = 128
    step_tokens: int = 512
    mixed_tokens: int = 256
    context: int = 8192


@dataclass(frozen=True, slots=True)
class Work:
    """Compute tokens [start, start + count) of a sequence; sample its next one if `samples`."""

    sequence: Sequence
    start: int
    count: int
    samples: bool


@dataclass(frozen=True)
class Step:
    works: tuple[Work, ...]

    @property
    def tokens(self) -> int:
        return sum(work.count for work in self.works)

    @property
    def sampling(self) -> list[Work]:
        return [work for work in self.works if work.samples]


class Scheduler:
    """Turns waiting and running, over one block pool.

    Args:
        recipe: digest of the engine's own KV recipe; names the blocks it computes.
        edge_recipe: digest of the recipe under which edges ship; a block that we computed is
            found under that name too, so that an edge need not ship what we have.
    """

    def __init__(
        self, pool: BlockPool, recipe: str, edge_recipe: str, limits: SchedulerLimits
    ) -> None:
        self.pool = pool
        self.limits = limits
        self._recipe = recipe
        self._edge_recipe = edge_recipe
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._turns: dict[str, Sequence] = {}
        self._arrivals = 0
        self.prefix_hit_tokens = 0
        self.preemptions = 0

    # -- turns come and go --------------------------------------------------------------------

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        return not self._turns

    @property
    def prefill_backlog(self) -> int:
        """Tokens that wait for their KV, beyond one per decoding turn."""
        backlog = sum(s.uncomputed for s in self._waiting)
        return backlog + sum(s.uncomputed for s in self._running if not s.decoding)

    @property
    def decode_backlog(self) -> list[int]:
        """Reply tokens that each running turn may still make."""
        return [s.tokens_left for s in self._running]

    def add(self, turn: EngineTurn) -> EngineOutput | None:
        """Queue a turn. Where nothing is left to make, the output that ends it, at once."""
        assert turn.turn not in self._turns, "a turn is added once"
        if turn.made and turn.made[-1] in turn.end_tokens:
            return EngineOutput(index=len(turn.made), tokens=(), finished="stop")
        if len(turn.made) >= turn.max_tokens:
            return EngineOutput(index=len(turn.made), tokens=(), finished="length")
        self._arrivals += 1
        sequence = Sequence.of(turn, self._arrivals)
        self._turns[turn.turn] = sequence
        self._waiting.append(sequence)
        return None

    def cancel(self, turn: str) -> bool:
        """Forget a turn and free what it holds; False where it is not known (any more)."""
        sequence = self._turns.pop(turn, None)
        if sequence is None:
            return False
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._release(sequence)
        return True

    # -- one step -----------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Plan the next step and reserve its pages; an empty step means there is nothing to do."""
        works = self._schedule_decodes()
        budget = self.limits.mixed_tokens if works else self.limits.step_tokens
        self._admit(budget)
        works.extend(self._schedule_prefills(budget))
        return Step(tuple(works))

    def postprocess(self, step: Step, sampled: Seq[int]) -> list[tuple[str, EngineOutput | None]]:
        """Take in the results of a step: one sampled token per work that samples, in order.

        A negative token stands for logits that were no numbers: that turn (output None) is
        forgotten, and what it computed is not shared.
        """
        self.begin(step)
        return self.end(step, sampled)

    def begin(self, step: Step) -> None:
        """Count a step as done, its tokens as `PENDING`; `end` must follow before the next one."""
        for work in step.works:
            work.sequence.computed += work.count
            if work.samples:
                work.sequence.tokens.append(PENDING)

    def end(self, step: Step, sampled: Seq[int]) -> list[tuple[str, EngineOutput | None]]:
        """The results of a step that began, as in `postprocess`; turns that left are skipped."""
        outputs: list[tuple[str, EngineOutput | None]] = []
        tokens = iter(sampled)
        for work in step.works:
            sequence = work.sequence
            name = sequence.turn.turn
            token = next(tokens) if work.samples else 0
            if self._turns.get(name) is not sequence:
                continue  # cancelled while the step ran
            if token < 0:
                self.cancel(name)
                outputs.append((name, None))
                continue
            self._enter_full_blocks(sequence)
            if work.samples:
                outputs.append((name, self._take_token(sequence, token)))
        return outputs

    def still_valid(self, ahead: Step) -> Step:
        """A step that was planned before the last one's end, without turns that ended with it."""
        works = ahead.works
        return Step(tuple(w for w in works if self._turns.get(w.sequence.turn.turn) is w.sequence))

    def fail(self, step: Step) -> list[str]:
        """Forget the turns of a step that could not be computed; returns their names."""
        turns = [work.sequence.turn.turn for work in step.works]
        for turn in turns:
            self.cancel(turn)
        return turns

    def _take_token(self, sequence: Sequence, token: int) -> EngineOutput:
        turn = sequence.turn
        assert sequence.tokens[-1] == PENDING, "a token is taken where one is awaited"
        index = sequence.reply_index - 1
        cached = 0 if sequence.told_cached else sequence.cached_tokens
        sequence.told_cached = True
        if token in turn.end_tokens:
            self.cancel(turn.turn)
            return EngineOutput(index, (), "stop", cached)
        sequence.tokens[-1] = token
        finished = ""
        if self._full(sequence):
            finished = "length"
            self.cancel(turn.turn)
        return EngineOutput(index, (token,), finished, cached)

    def _full(self, sequence: Sequence) -> bool:
        return sequence.tokens_left == 0 or len(sequence.tokens) >= self.limits.context

    def _enter_full_blocks(self, sequence: Sequence) -> None:
        """Give every block that was just completed to the prefix cache, still referenced."""
        while (len(sequence.chain) + 1) * BLOCK_TOKENS <= sequence.computed:
            index = len(sequence.chain)
            name = block_id(self._recipe, sequence.parent, sequence.block_tokens(index))
            shipped = sequence.shipped_name(self._edge_recipe, index)
            pages = sequence.block_pages(index)
            entered = self.pool.enter(name, pages, refs=1, kept_as=shipped)
            if entered:
                self.pool.alias(name, shipped)
            sequence.chain.append(name)
            # Somebody else may have computed the same block: keep our own pages then.
            sequence.held.append(name if entered else None)

    # -- decode -------------------------------------------------------------------------------

    def _schedule_decodes(self) -> list[Work]:
        works: list[Work] = []
        for sequence in [s for s in self._running if s.decoding and not self._full(s)]:
            if sequence not in self._running:
                continue  # preempted for an older one a moment ago
            if self._grow(sequence, len(sequence.tokens)):
                works.append(Work(sequence, sequence.computed, 1, True))
        return works

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for `tokens` tokens, at the cost of the youngest; False: that was itself."""
        missing = pages_for(tokens) - len(sequence.pages)
        while missing > 0:
            pages = self.pool.allocate(missing)
            if pages is not None:
                sequence.pages.extend(pages)
                sequence.table_version += 1
                return True
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        sequence.preempted += 1
        self.preemptions += 1
        self._waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Give all pages back: cached blocks stay in the cache, the rest is free at once."""
        for index in range(len(sequence.held) - 1, -1, -1):
            held = sequence.held[index]
            if held is not None:
                self.pool.release(held)
        own = [
            page
            for index, page in enumerate(sequence.pages)
            if index // PAGES_PER_BLOCK >= len(sequence.held)
            or sequence.held[index // PAGES_PER_BLOCK] is None
        ]
        self.pool.free(own)
        sequence.pages.clear()
        sequence.chain.clear()
        sequence.held.clear()
        sequence.computed = 0
        sequence.table_version += 1

    # -- prefill ------------------------------------------------------------------------------

    def _admit(self, budget: int) -> None:
        """Move turns from waiting to running, in order, while each gets its smallest share."""
        wanted = sum(min(s.uncomputed, _MIN_SHARE) for s in self._running if not s.decoding)
        while self._waiting and len(self._running) < self.limits.max_batch and wanted < budget:
            sequence = self._waiting[0]
            matched = self._match(sequence)
            fresh = pages_for(len(sequence.tokens)) - PAGES_PER_BLOCK * len(matched)
            woken = PAGES_PER_BLOCK * sum(self.pool.is_idle(block) for block in matched)
            # One page in reserve for each running turn, or decoding would preempt at once.
            if fresh + woken + len(self._running) > self.pool.pages_free and self._running:
                return
            self._start(sequence, matched, fresh)
            wanted += min(sequence.uncomputed, _MIN_SHARE)

    def _start(self, sequence: Sequence, matched: list[bytes], fresh: int) -> None:
        for block in matched:
            sequence.pages.extend(self.pool.acquire(block))
        pages = self.pool.allocate(fresh)
        assert pages is not None, "a turn that cannot fit was not refused on arrival"
        sequence.pages.extend(pages)
        sequence.chain.extend(matched)
        sequence.held.extend(matched)
        sequence.computed = BLOCK_TOKENS * len(matched)
        self._bring(sequence)
        sequence.table_version += 1
        if not sequence.preempted:
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_tokens)
            self.prefix_hit_tokens += sequence.cached_tokens
        self._waiting.popleft()
        self._running.append(sequence)
        self._running.sort(key=lambda s: s.arrival)

    def _bring(self, sequence: Sequence) -> None:
        """Fill the blocks after the matched ones from the tier, as far as it goes."""
        given = sequence.turn.prompt_blocks
        for index in range(len(sequence.chain), (len(sequence.tokens) - 1) // BLOCK_TOKENS):
            names = [sequence.shipped_name(self._edge_recipe, index), *given[index : index + 1]]
            name = next((n for n in names if self.pool.tier_offers(n)), None)
            if name is None or self.pool.resolve(name) is not None:
                return
            self.pool.bring(name, sequence.block_pages(index))
            sequence.chain.append(name)
            sequence.held.append(name)
            sequence.computed += BLOCK_TOKENS

    def _match(self, sequence: Sequence) -> list[bytes]:
        """Cached blocks that a waiting sequence may start from, one token left to compute.

        A chain may change hands at any block: ours where we computed it, the edge's where it was
        shipped. Ours wins, because it has no codec loss.
        """
        matched: list[bytes] = []
        given = sequence.turn.prompt_blocks
        for index in range((len(sequence.tokens) - 1) // BLOCK_TOKENS):
            parent = matched[-1] if matched else ROOT_PARENT
            ours = block_id(self._recipe, parent, sequence.block_tokens(index))
            found = self.pool.resolve(ours) or self.pool.resolve(
                sequence.shipped_name(self._edge_recipe, index)
            )
            if found is None and index < len(given):
                found = self.pool.resolve(given[index])  # shipped under another allowed recipe
            if found is None:
                break
            matched.append(found)
        return matched

    def _schedule_prefills(self, budget: int) -> list[Work]:
        """Share `budget` tokens among the prompts: an equal part each, the rest to the oldest."""
        prompts = [s for s in self._running if not s.decoding]
        if not prompts:
            return []
        share = max(_MIN_SHARE, budget // len(prompts))
        counts: list[int] = []
        left = budget
        for sequence in prompts:
            count = min(sequence.uncomputed, share, left)
            counts.append(count)
            left -= count
        works = []
        for sequence, count in zip(prompts, counts, strict=True):
            more = min(sequence.uncomputed - count, left)
            left -= more
            count += more
            if count:
                done = sequence.computed + count == len(sequence.tokens)
                works.append(Work(sequence, sequence.computed, count, done))
        return works

    def check_integrity(self) -> None:
        """Assert that pages, references and queues agree with each other."""
        self.pool.check_integrity()
        assert len(self._turns) == len(self._running) + len(self._waiting)
        arrivals = [s.arrival for s in self._running]
        assert arrivals == sorted(arrivals), "running turns are kept in order of arrival"
        for sequence in self._turns.values():
            sequence.check_integrity()
        assert all(not s.pages for s in self._waiting), "a waiting turn holds no pages"
