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
prompt; what remains of the token budget is shared by prompts, oldest first. Turns are admitted in
order of arrival, while the pool has room for all that running turns know, under its target, and for
what their replies will probably add. Where they add more, the youngest turn gives its pages back
and computes them again later; the cache usually still holds most of them. The oldest turn never
waits for another one.

That is how it is within one tenant. Where several have turns, `fair` says how many of each may be
in a step, the oldest of each; further ones wait, or rest with their pages until those are wanted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from segue_cloud.engine.block_pool import PAGES_PER_BLOCK, BlockPool
from segue_cloud.engine.fair import FairShare
from segue_cloud.engine.placement import ALL, Placement, Reach, Recipes
from segue_cloud.engine.port import EngineOutput, EngineTurn
from segue_cloud.engine.sequence import Sequence
from segue_cloud.engine.tenants import MIN_SHARE, Tenants
from segue_contract.kv.layout import BLOCK_TOKENS

# Stands for a token that a running step is about to sample.
PENDING = -1
# Share of its allowed tokens that a reply is taken to use: the first guess, the weight of the
# newest reply, and what a preemption adds, since it shows that the guess was too low.
_REPLY_SHARE, _NEW, _RAISE = 0.5, 0.1, 0.25


@dataclass(frozen=True)
class SchedulerLimits:
    """`step_tokens` bounds a step, `mixed_tokens` the prompt tokens of one that also decodes.

    The second is smaller because every decoding turn waits for the step to end. `fair_turns`,
    `fair_growth`: see `FairShare`; four are a person's conversations at once, and twice the
    growth, of rows and of prompts, is well below the tenth that a flood may cost others.
    """

    max_batch: int = 128
    step_tokens: int = 512
    mixed_tokens: int = 256
    context: int = 8192
    fair_turns: int = 4
    fair_growth: float = 0.03


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
        reach: how far back a token sees; pages beyond it are given back.
    """

    def __init__(
        self, pool: BlockPool, recipes: Recipes, limits: SchedulerLimits, reach: Reach = ALL
    ) -> None:
        self.pool = pool
        self._place = Placement(pool, recipes, reach)
        self.limits = limits
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._turns: dict[str, Sequence] = {}
        self.fair = FairShare(limits.fair_turns, limits.fair_growth)
        self._tenants = Tenants(self.fair)
        self._arrivals = 0
        self._reply_share = _REPLY_SHARE
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

    def peak_pages(self, tokens: int) -> int:
        """Most pages that a turn of `tokens` tokens, its reply included, holds at once."""
        return self._place.peak_pages(tokens, self.limits.step_tokens)

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
        self._tenants.came(turn)
        return None

    def cancel(self, turn: str) -> bool:
        """Forget a turn and free what it holds; False where it is not known (any more)."""
        sequence = self._turns.pop(turn, None)
        if sequence is None:
            return False
        if sequence in self._running:
            self._running.remove(sequence)
            self._tenants.stopped(sequence.turn)
        else:
            self._waiting.remove(sequence)
        self._tenants.left(sequence.turn)
        self._place.release(sequence)
        return True

    def cached_block(self, turn: EngineTurn) -> bytes | None:
        """Name of the last full block of the turn's prompt, its last token left out, where the
        cache has all blocks up to it."""
        sequence = Sequence.of(turn, 0)
        matched = self._place.match(sequence)
        whole = (len(sequence.tokens) - 1) // BLOCK_TOKENS
        return matched[-1] if whole and len(matched) == whole else None

    # -- one step -----------------------------------------------------------------------------

    def schedule(self) -> Step:
        """Plan the next step and reserve its pages; an empty step means there is nothing to do."""
        limits = self.limits
        tenants = self._tenants
        tenants.plan(limits.max_batch)
        active = tenants.active(self._running)
        decodes = any(s.decoding and not self._full(s) for s in active)
        budget = limits.mixed_tokens if decodes else limits.step_tokens
        if self._waiting:
            self._admit(active, budget)
            tenants.lend(self._running)
            active = tenants.active(self._running)
        counts = tenants.share(active, budget, decodes)
        works: list[Work] = []
        prompts: list[Work] = []
        # Oldest first: whoever is preempted comes later in this list, so that no work is undone.
        for sequence in active:
            count = counts.get(sequence, 0)
            if sequence.decoding:
                count = 0 if self._full(sequence) else 1
            if count and self._grow(sequence, sequence.computed + count):
                done = sequence.computed + count == len(sequence.tokens)
                work = Work(sequence, sequence.computed, count, done)
                (works if sequence.decoding else prompts).append(work)
        return Step((*works, *prompts))

    def postprocess(self, step: Step, sampled: Seq[int]) -> list[tuple[str, EngineOutput | None]]:
        """Take in the results of a step: one sampled token per work that samples, in order.

        A negative token stands for logits that held NaN: that turn (output None) is
        forgotten, and what it computed is not shared.
        """
        self.begin(step)
        return self.end(step, sampled)

    def begin(self, step: Step) -> None:
        """Count a step as done, its tokens as `PENDING`; `end` must follow before the next one."""
        for work in step.works:
            work.sequence.computed += work.count
            self._tenants.computed(work.sequence.turn, work.count)
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
            self._place.enter_full_blocks(sequence)
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
            self._learn(sequence)
            self.cancel(turn.turn)
            return EngineOutput(index, (), "stop", cached)
        sequence.tokens[-1] = token
        finished = ""
        if self._full(sequence):
            finished = "length"
            self._learn(sequence)
            self.cancel(turn.turn)
        return EngineOutput(index, (token,), finished, cached)

    def _learn(self, sequence: Sequence) -> None:
        used = min(1.0, sequence.reply_index / sequence.turn.max_tokens)
        self._reply_share += _NEW * (used - self._reply_share)

    def _full(self, sequence: Sequence) -> bool:
        return sequence.tokens_left == 0 or len(sequence.tokens) >= self.limits.context

    # -- pages --------------------------------------------------------------------------------

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for `tokens` tokens, at the cost of the youngest; False: that was itself."""
        if sequence not in self._running:
            return False  # preempted for an older one a moment ago
        while not self._place.grow(sequence, tokens):
            victim = self._tenants.resting(self._running) or self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Pages go back; it waits again, before the other waiting turns of its tenant."""
        self._running.remove(sequence)
        self._tenants.stopped(sequence.turn)
        self._place.release(sequence)
        sequence.preempted += 1
        self.preemptions += 1
        if not self._tenants.several:
            self._reply_share = min(1.0, self._reply_share + _RAISE)
        self._waiting.appendleft(sequence)

    def _admit(self, active: list[Sequence], budget: int) -> None:
        """Move turns from waiting to running, in order, while each gets its smallest share."""
        wanted = sum(min(s.uncomputed, MIN_SHARE) for s in active if not s.decoding)
        pages, known = self._pages_taken()
        while wanted < budget and (sequence := self._tenants.next(self._waiting)) is not None:
            fits = len(self._running) < self.limits.max_batch
            if fits:
                matched = self._place.match(sequence)
                shared = PAGES_PER_BLOCK * sum(not self.pool.is_idle(one) for one in matched)
                own = self._pages_of(sequence, shared)
                fits = not self._running or self._fits([*pages, own], known + own[0])
            if not fits:
                resting = self._tenants.resting(self._running)
                if resting is None:
                    return
                self._preempt(resting)
                pages, known = self._pages_taken()
                continue
            pages.append(own)
            known += own[0]
            sequence.shared_pages = shared
            self._start(sequence, matched)
            wanted += min(sequence.uncomputed, MIN_SHARE)

    def _fits(self, pages: list[tuple[int, int]], known: int) -> bool:
        """Turns that have `pages` can run together, in all of `known` pages now."""
        # Pages that nobody brought along as his own: a prefix whose first owner has left.
        common = max(0, known - sum(own for own, _ in pages))
        return (
            common + peak_demand(pages) <= self.pool.pages_total and known <= self.pool.target_pages
        )

    def _pages_taken(self) -> tuple[list[tuple[int, int]], int]:
        """Of running turns: `_pages_of` each, and all that they know."""
        pages = [self._pages_of(s, s.shared_pages) for s in self._running]
        return pages, self._place.pages_pinned + sum(map(self._to_come, self._running))

    def _known_pages(self, sequence: Sequence) -> int:
        return self.peak_pages(len(sequence.tokens))

    def _to_come(self, sequence: Sequence) -> int:
        """Pages that a running turn has yet to take for the tokens it has."""
        return max(0, self._known_pages(sequence) - sequence.pages_live)

    def _pages_of(self, sequence: Sequence, shared: int) -> tuple[int, int]:
        """Pages for what is known, without shared ones, and for what a reply will probably add."""
        tokens = len(sequence.tokens)
        known = self.peak_pages(tokens)
        more = int(sequence.tokens_left * self._reply_share) + 1
        return max(0, known - shared), self.peak_pages(tokens + more) - known

    def _start(self, sequence: Sequence, matched: list[bytes]) -> None:
        self._place.start(sequence, matched)
        if not sequence.preempted:
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_tokens)
            self.prefix_hit_tokens += sequence.cached_tokens
        if self._waiting[0] is sequence:
            self._waiting.popleft()
        else:
            self._waiting.remove(sequence)
        self._tenants.began(sequence.turn)
        self._running.append(sequence)
        self._running.sort(key=lambda s: s.arrival)

    def check_integrity(self) -> None:
        """Assert that pages, references and queues agree with each other."""
        self.pool.check_integrity()
        assert len(self._turns) == len(self._running) + len(self._waiting)
        held = sum(s.pages_live for s in self._running)
        assert held >= self._place.pages_pinned, "somebody else holds pages"
        arrivals = [s.arrival for s in self._running]
        assert arrivals == sorted(arrivals), "running turns are kept in order of arrival"
        self._tenants.check_integrity(list(self._turns.values()), self._running)
        for sequence in self._turns.values():
            sequence.check_integrity()
        assert all(not s.pages for s in self._waiting), "a waiting turn holds no pages"


def peak_demand(pages: Iterable[tuple[int, int]]) -> int:
    """Most pages in use from now until all turns have ended, each given as (known, to be added).

    Turns grow alike, and one that has added all gives everything back. So the demand is highest
    just before some turn ends: what it and all that end later have by then (after the "Past-Future
    Scheduler for LLM Serving", ASPLOS 2025).
    """
    most = before = 0
    for number, (known, added) in enumerate(sorted(pages, key=lambda p: -p[1]), 1):
        before += known
        most = max(most, before + number * added)
    return most
