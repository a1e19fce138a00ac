"""The life of one turn in the instance that owns it (ARCHITECTURE.md, The life of a turn).

    edge makes tokens ──► edge_tokens ─┐
                                       ├─► writer ─► log ─► feed ─► readers, MQTT
    engine makes tokens ─► decode ─────┘

The owner alone appends. If the edge goes away, it computes what is missing and finishes. Readers
are told an end that the log has, or none: a feed that closes without one means that the turn goes
on elsewhere, and is found in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from segue_cloud.engine.port import Engine, EngineOutput, EngineTurn
from segue_cloud.tenants.trust import EVERYBODY
from segue_cloud.turns.decoding import decode
from segue_cloud.turns.frames import Chunk
from segue_cloud.turns.patience import done_within
from segue_cloud.turns.ports import TurnLog
from segue_cloud.turns.progress import Maker, ReplyProgress
from segue_cloud.turns.report import EdgeNote, TurnTimes, final_report, read_note
from segue_cloud.turns.spec import OwnedTurn
from segue_cloud.turns.writer import TurnWriter
from segue_contract.chat import ChatTokenizer
from segue_contract.errors import (
    DeadlineExceeded,
    EngineGone,
    Internal,
    Overloaded,
    PromptTooLong,
    SegueError,
    StaleEpoch,
)
from segue_contract.limits import (
    ENGINE_RETRY_S,
    RELEASE_TIMEOUT_S,
    TURN_ENGINES,
    TURN_LOOKS,
    TURN_TIMEOUT_S,
    TurnLimits,
)
from segue_contract.plan import Shape, encode_plan
from segue_contract.sync.ops import Frame, TurnEnded, Usage
from segue_contract.transport.together import end
from segue_contract.transport.turn_feed import TurnFeed
from segue_contract.turn.events import MadeBy, Reason, Started
from segue_contract.turn.from_log import op_ended, op_frame

log = structlog.get_logger("segue.turn")


@dataclass(frozen=True)
class OwnerDeps:
    """What every owner of a process shares. `max_context`: tokens of prompt and reply together."""

    log: TurnLog
    engine: Engine
    tokenizer: ChatTokenizer
    end_tokens: frozenset[int]
    max_context: int
    vocab: int
    now_ms: Callable[[], int]
    monotonic: Callable[[], float]
    limits: TurnLimits = TurnLimits()
    weight: Callable[[str], float] = lambda tenant: 1.0  # of a tenant, in the engine's batch
    domains: Callable[[str, str], tuple[bytes, ...]] = lambda tenant, edge: EVERYBODY

    def as_of(self, turn: EngineTurn, tenant: str, edge: str) -> EngineTurn:
        """`turn` in the name of its tenant: in its part of the batch, with the KV that it may use.

        Args:
            edge: its name by its certificate, through which the turn comes; empty: none.
        """
        domains = self.domains(tenant, edge)
        return replace(turn, tenant=tenant, weight=self.weight(tenant), domains=domains)


class TurnOwner:
    """`run` is the whole life; everything else may be called while it runs.

    Attributes:
        feed: durable frames and the end, for any number of readers.
        stopping: set when the edge must make no more tokens.
    """

    def __init__(self, spec: OwnedTurn, deps: OwnerDeps) -> None:
        self.spec = spec
        self.feed = TurnFeed()
        self.stopping = asyncio.Event()
        self.ended = asyncio.Event()
        self._deps = deps
        # A plan of shape text waits for no edge, and listens to none.
        listens = spec.has_edge and spec.shape is not Shape.TEXT
        self._progress = ReplyProgress(
            spec.made, max_tokens=spec.max_tokens, vocab=deps.vocab, edge=listens
        )
        self._stopped: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._edge_done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._note: EdgeNote | None = None
        self._cached_tokens = 0
        self._started_s = deps.monotonic()
        self._first_token_s: float | None = None
        self._second_token_s: float | None = None
        made = Chunk(0, spec.made, spec.made_pieces, "") if spec.made else None
        self._writer = TurnWriter(
            spec.key,
            deps.log,
            generation=spec.started.generation,
            opening=spec.opening,
            made=made,
            on_durable=self._publish_durable,
            on_stop=self.stop,
            now_ms=deps.now_ms,
            limits=deps.limits,
            stalled=lambda: self.stalled,
        )
        self._settle_edge()

    # -- what the edge and the caller may do ---------------------------------------------------

    @property
    def next_index(self) -> int:
        return self._progress.next_index

    @property
    def waits_for_edge(self) -> bool:
        """The edge makes the next token, or says that it makes no more."""
        return self._progress.maker is Maker.EDGE

    @property
    def stalled(self) -> bool:
        """The next token is the engine's, and that hangs."""
        return self._progress.maker is Maker.CLOUD and self._deps.engine.stats().stalled

    def edge_tokens(self, index: int, tokens: tuple[int, ...], pieces: tuple[str, ...]) -> None:
        """Tokens that the edge made; see `ReplyProgress.edge_tokens`."""
        at = self.next_index
        self._write(at, *self._progress.edge_tokens(index, tokens, pieces), MadeBy.EDGE)

    def hand_over(self, next_index: int) -> None:
        """The edge stops; the cloud decodes from `next_index` on. Raises InvalidArgument."""
        self._progress.hand_over(next_index)
        self._settle_edge()

    def edge_ended(self, reason: str, next_index: int) -> None:
        """The edge made the whole reply. Raises InvalidArgument."""
        self._progress.edge_ended(reason, next_index)
        self._settle_edge()

    def edge_lost(self) -> None:
        """The edge's stream broke: this side goes on alone."""
        self._progress.edge_lost()
        self._settle_edge()

    def note_plan(self, plan: bytes) -> None:
        """The edge's plan report so far. Raises InvalidArgument where it cannot be read."""
        self._note = read_note(plan, self._deps.monotonic())

    def stop(self) -> None:
        """End the turn soon, with reason `Reason.CANCELLED`. Idempotent."""
        self.stopping.set()
        if not self._stopped.done():
            self._stopped.set_result(None)
        self._progress.stop()
        self._settle_edge()

    def _settle_edge(self) -> None:
        if not self.waits_for_edge and not self._edge_done.done():
            self._edge_done.set_result(None)

    # -- its life ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Produce the reply, append it, close the turn. Returns when `feed` is closed."""
        key = self.spec.key
        facts = {"session": key.session.session, "turn": key.turn}
        try:
            self._begin()
            reason, error = await self._produce_and_write()
            await self._end(reason, error)
        except StaleEpoch as error:
            log.info("turn_taken_over", **facts, current=error.fields)
        except SegueError as error:
            # Its edge, or whoever finds its lease run out, goes on after the last durable token.
            log.warning("turn_left_open", **facts, error=str(error))
            if isinstance(error, EngineGone):
                await self.release()
        except asyncio.CancelledError:
            await self.release()
            raise
        finally:
            self.ended.set()
            self.feed.close()

    async def release(self) -> None:
        """Give the turn's lease back, so that another instance goes on at once."""
        with contextlib.suppress(SegueError, TimeoutError):  # then it runs out
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                await self._deps.log.release_turn(self.spec.key.session, self._writer.hold)

    def _begin(self) -> None:
        spec = self.spec
        self.feed.publish(Started(spec.key.turn, spec.key.epoch, spec.started.offset))
        if spec.made:
            made = Frame(
                id="",
                turn=spec.key.turn,
                epoch=spec.key.epoch,
                index=0,
                tokens=spec.made,
                pieces=spec.made_pieces,
            )
            self.feed.publish(op_frame(made, spec.started.offset))
        if spec.adopted:
            detokenizer = self._deps.tokenizer.detokenizer()
            for token in spec.made:
                detokenizer.push(token)
            pieces = tuple(detokenizer.push(token) for token in spec.adopted)
            self._add_own(spec.adopted, pieces, MadeBy.EDGE)

    async def _produce_and_write(self) -> tuple[str, SegueError | None]:
        """The turn's reason, and the error behind `Reason.ERROR`. Everything is durable then.

        Raises:
            EngineGone: another instance can go on.
        """
        writing = asyncio.create_task(self._writer.run(), name=f"write {self.spec.key.turn}")
        producing = asyncio.create_task(self._produce(), name=f"produce {self.spec.key.turn}")
        try:
            await asyncio.wait({writing, producing}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():  # it ends first only by failing
                await end(producing)
                writing.result()
                raise Internal("The log writer of a running turn returned early.")
            reason, error = self._reason_of(producing)
            self._writer.close()
            await writing
            # A turn under which engine after engine died may be the cause.
            if isinstance(error, EngineGone) and self.spec.key.epoch < TURN_ENGINES:
                raise error
            return reason, error
        finally:
            for task in (writing, producing):
                task.cancel()
            await asyncio.gather(writing, producing, return_exceptions=True)

    def _reason_of(self, producing: asyncio.Task[str]) -> tuple[str, SegueError | None]:
        try:
            return producing.result(), None
        except SegueError as error:
            return Reason.ERROR, error
        except Exception as error:
            log.error("turn_failed", turn=self.spec.key.turn, exc_info=error)
            return Reason.ERROR, Internal(
                f"The turn failed with an unexpected {type(error).__name__}.",
                hint="See the cloud's log; try again.",
            )

    async def _produce(self) -> str:
        self._check_fits()
        making = asyncio.create_task(self._make(), name=f"make {self.spec.key.turn}")
        try:
            if await done_within({making}, TURN_TIMEOUT_S, looks=TURN_LOOKS):
                return making.result()
        finally:
            await end(making)
        raise DeadlineExceeded(
            f"The turn took longer than {TURN_TIMEOUT_S:.0f} s.", hint="Ask for fewer tokens."
        )

    async def _make(self) -> str:
        await self._edge_done
        while self._progress.maker is Maker.CLOUD:
            try:
                self._progress.end(await self._decode())
            except Overloaded:  # its place was given, and is being cleared: no fault of the turn
                await done_within({self._stopped}, ENGINE_RETRY_S, looks=1)
        return self._progress.reason

    def _check_fits(self) -> None:
        tokens, limit = len(self.spec.prompt), self._deps.max_context
        if tokens >= limit:
            raise PromptTooLong(
                f"The conversation has {tokens} tokens; the model's context is {limit}.",
                hint="Shorten the message, or begin a new session.",
                tokens=tokens,
                limit=limit,
            )

    async def _decode(self) -> str:
        spec, deps = self.spec, self._deps
        max_tokens = min(spec.max_tokens, deps.max_context - len(spec.prompt))
        if self.next_index >= max_tokens:
            return Reason.LENGTH
        if self.stopping.is_set():
            return Reason.CANCELLED
        turn = EngineTurn(
            turn=spec.key.turn,
            prompt=spec.prompt,
            made=tuple(self._progress.tokens),
            prompt_blocks=spec.blocks,
            sampling=spec.sampling,
            max_tokens=max_tokens,
            end_tokens=deps.end_tokens,
        )
        return await decode(
            deps.engine,
            deps.tokenizer,
            deps.as_of(turn, spec.key.session.tenant, spec.via),
            stop=spec.stop,
            stopping=self.stopping,
            add=lambda tokens, pieces: self._add_own(tokens, pieces, MadeBy.CLOUD),
            on_output=self._note_cache,
        )

    def _note_cache(self, output: EngineOutput) -> None:
        self._cached_tokens = max(self._cached_tokens, output.cached_tokens)

    def _add_own(self, tokens: tuple[int, ...], pieces: tuple[str, ...], made_by: str) -> None:
        at = self.next_index
        self._progress.cloud_tokens(tokens)
        self._write(at, tokens, pieces, made_by)

    def _write(
        self, at: int, tokens: tuple[int, ...], pieces: tuple[str, ...], made_by: str
    ) -> None:
        """Hand tokens that begin at index `at` to the writer."""
        if not tokens:
            return
        now = self._deps.monotonic()
        if self._first_token_s is None:
            self._first_token_s = now
        if self._second_token_s is None and at + len(tokens) > 1:
            self._second_token_s = now
        self._writer.add(at, tokens, pieces, made_by)

    # -- what readers see ----------------------------------------------------------------------

    def _publish_durable(self, frame: Frame, offset: int) -> None:
        self.feed.publish(op_frame(frame, offset))

    async def _end(self, reason: str, error: SegueError | None) -> None:
        op = self._ended_op(reason, error)
        offset = await self._writer.end(op)
        self.feed.publish(op_ended(op, self.next_index, offset))
        spec = self.spec
        log.info(
            "turn",
            session=spec.key.session.session,
            turn=spec.key.turn,
            epoch=op.epoch,
            shape=spec.shape.value,
            reason=reason,
            tokens=self.next_index,
            prompt_tokens=len(spec.prompt),
            cached_tokens=self._cached_tokens,
            seconds=round(self._deps.monotonic() - self._started_s, 4),
        )

    def _ended_op(self, reason: str, error: SegueError | None) -> TurnEnded:
        key = self.spec.key
        return TurnEnded(
            id=f"{key.turn}.ended",
            device=key.device,
            at_ms=self._deps.now_ms(),
            turn=key.turn,
            epoch=self._writer.hold.epoch,
            reason=reason,
            usage=Usage(
                prompt_tokens=len(self.spec.prompt),
                completion_tokens=self.next_index,
                edge_cached_tokens=self.spec.edge_cached_tokens,
                cloud_cached_tokens=self._cached_tokens,
            ),
            plan=self._report(),
            error_code=error.code if error else "",
            error_message=str(error) if error else "",
        )

    def _report(self) -> bytes:
        now = self._deps.monotonic()
        times = TurnTimes(self._started_s, self._first_token_s, self._second_token_s, now)
        report = final_report(
            self._note,
            times,
            prompt_tokens=len(self.spec.prompt),
            cached_tokens=self._cached_tokens,
            why="the edge went away" if self.spec.has_edge else "no edge took part",
        )
        return encode_plan(report)
