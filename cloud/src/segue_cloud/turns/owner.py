"""The life of one turn in the instance that owns it (ARCHITECTURE.md, The life of a turn).

    edge makes tokens ──► edge_tokens ─┐
                                       ├─► writer ─► log ─► feed ─► readers, MQTT
    engine makes tokens ─► _decode ────┘

The owner alone appends. If the edge goes away, it computes what is missing and finishes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import structlog

from segue_cloud.engine.port import Engine, EngineOutput, EngineTurn
from segue_cloud.turns.feed import TurnFeed
from segue_cloud.turns.messages import ended_event, frame_event, started_event
from segue_cloud.turns.ports import TurnLog
from segue_cloud.turns.report import EdgeNote, TurnTimes, final_report, read_note
from segue_cloud.turns.spec import OwnedTurn
from segue_cloud.turns.writer import TurnWriter
from segue_contract.chat import ChatTokenizer
from segue_contract.errors import (
    DeadlineExceeded,
    EngineGone,
    Internal,
    InvalidArgument,
    PromptTooLong,
    SegueError,
    StaleEpoch,
    StoreUnavailable,
)
from segue_contract.limits import STORE_TIMEOUT_S, TURN_ENGINES, TURN_TIMEOUT_S
from segue_contract.plan import Shape, encode_plan
from segue_contract.sync.ops import Frame, TurnEnded, Usage
from segue_contract.turn.text import ReplyText

log = structlog.get_logger("segue.turn")


class EdgeOutcome(StrEnum):
    """Why the owner stopped waiting for the edge."""

    HAND_OVER = "hand_over"
    ENDED = "ended"
    LOST = "lost"
    STOPPED = "stopped"


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
        self._tokens: list[int] = list(spec.made)
        self._edge: asyncio.Future[tuple[EdgeOutcome, str]] = (
            asyncio.get_running_loop().create_future()
        )
        self._note: EdgeNote | None = None
        if not spec.has_edge or spec.shape is Shape.TEXT:  # nobody is waited for or listened to
            self._settle_edge(EdgeOutcome.LOST)
        self._cached_tokens = 0
        self._started_s = deps.monotonic()
        self._first_token_s: float | None = None
        self._second_token_s: float | None = None
        self._writer = TurnWriter(
            spec.key,
            deps.log,
            on_durable=self._publish_durable,
            on_stop=self.stop,
            now_ms=deps.now_ms,
        )

    # -- what the edge and the caller may do ---------------------------------------------------

    @property
    def next_index(self) -> int:
        return len(self._tokens)

    def edge_tokens(self, index: int, tokens: tuple[int, ...], pieces: tuple[str, ...]) -> None:
        """Tokens that the edge made. Those that are known already are dropped.

        Raises:
            InvalidArgument: they leave a gap, or come without their pieces.
        """
        if len(tokens) != len(pieces):
            raise InvalidArgument("The edge sent tokens without their text.")
        if index > self.next_index:
            raise InvalidArgument(
                f"The edge sent token {index}; {self.next_index} is the next one."
            )
        if any(token >= self._deps.vocab for token in tokens):
            raise InvalidArgument("The edge sent tokens that the model does not have.")
        if index + len(tokens) > self.spec.max_tokens:
            raise InvalidArgument("The edge sent more tokens than the turn may have.")
        if self._edge.done():
            return
        skip = self.next_index - index
        if skip < len(tokens):
            self._add(tokens[skip:], pieces[skip:], "edge")

    def hand_over(self, next_index: int) -> None:
        """The edge stops; the cloud decodes from `next_index` on.

        Raises:
            InvalidArgument: tokens before `next_index` never came.
        """
        if self._edge.done():
            return  # it was stopped meanwhile: its last tokens were not taken
        if next_index != self.next_index:
            raise InvalidArgument(
                f"The edge hands over at token {next_index}; {self.next_index} came."
            )
        self._settle_edge(EdgeOutcome.HAND_OVER)

    def edge_ended(self, reason: str, next_index: int) -> None:
        """The edge made the whole reply. Raises InvalidArgument as `hand_over` does."""
        if self._edge.done():
            return
        if next_index != self.next_index or reason not in ("stop", "length", "cancelled"):
            raise InvalidArgument(f"The edge ended a turn ({reason!r}) whose tokens never came.")
        self._settle_edge(EdgeOutcome.ENDED, reason)

    def edge_lost(self) -> None:
        """The edge's stream broke: this side goes on alone."""
        self._settle_edge(EdgeOutcome.LOST)

    def note_plan(self, plan: bytes) -> None:
        """The edge's plan report so far. Raises InvalidArgument where it cannot be read."""
        self._note = read_note(plan, self._deps.monotonic())

    def stop(self) -> None:
        """End the turn soon, with reason "cancelled". Idempotent."""
        self.stopping.set()
        self._settle_edge(EdgeOutcome.STOPPED)

    def _settle_edge(self, outcome: EdgeOutcome, reason: str = "") -> None:
        if not self._edge.done():
            self._edge.set_result((outcome, reason))

    # -- its life ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Produce the reply, append it, close the turn. Returns when `feed` is closed."""
        key = self.spec.key
        try:
            self._begin()
            reason, error = await self._produce_and_write()
            await self._end(reason, error)
        except StaleEpoch as error:
            log.info(
                "turn_taken_over", session=key.session.session, turn=key.turn, current=error.fields
            )
        except EngineGone as error:
            # Left open: its edge, or whoever finds its lease run out, goes on after the last token.
            log.warning(
                "turn_left_open", session=key.session.session, turn=key.turn, error=str(error)
            )
        except SegueError as error:
            log.warning(
                "turn_not_closed", session=key.session.session, turn=key.turn, error=str(error)
            )
            op = self._ended_op("error", error)
            self.feed.publish(ended_event(op, self.next_index, 0, durable=False))
        finally:
            self.ended.set()
            self.feed.close()

    def _begin(self) -> None:
        spec = self.spec
        self.feed.publish(started_event(spec.key.turn, spec.key.epoch, spec.started_offset))
        if spec.made:
            made = Frame(
                id="",
                turn=spec.key.turn,
                epoch=spec.key.epoch,
                index=0,
                tokens=spec.made,
                pieces=spec.made_pieces,
            )
            self.feed.publish(frame_event(made, spec.started_offset))
        if spec.adopted:
            detokenizer = self._deps.tokenizer.detokenizer()
            for token in spec.made:
                detokenizer.push(token)
            pieces = tuple(detokenizer.push(token) for token in spec.adopted)
            self._add(spec.adopted, pieces, "edge")

    async def _produce_and_write(self) -> tuple[str, SegueError | None]:
        """The turn's reason, and the error behind reason "error". Everything is durable then.

        Raises:
            EngineGone: another instance can go on.
        """
        writing = asyncio.create_task(self._writer.run(), name=f"write {self.spec.key.turn}")
        producing = asyncio.create_task(self._produce(), name=f"produce {self.spec.key.turn}")
        try:
            await asyncio.wait({writing, producing}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():  # it ends first only by failing
                producing.cancel()
                with contextlib.suppress(asyncio.CancelledError, SegueError):
                    await producing
                writing.result()
                raise Internal("The log writer of a running turn returned early.")
            reason, error = self._reason_of(producing)
            self._writer.close()
            await writing
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
            return "error", error
        except Exception as error:
            log.error("turn_failed", turn=self.spec.key.turn, exc_info=error)
            return "error", Internal(
                f"The turn failed with an unexpected {type(error).__name__}.",
                hint="See the cloud's log; try again.",
            )

    async def _produce(self) -> str:
        self._check_fits()
        try:
            async with asyncio.timeout(TURN_TIMEOUT_S):
                outcome, reason = await self._edge
                if outcome is EdgeOutcome.ENDED:
                    return reason
                if outcome is EdgeOutcome.STOPPED:
                    return "cancelled"
                return await self._decode()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"The turn took longer than {TURN_TIMEOUT_S:.0f} s.",
                hint="Ask for fewer tokens.",
            ) from error

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
        spec = self.spec
        max_tokens = min(spec.max_tokens, self._deps.max_context - len(spec.prompt))
        if self.next_index >= max_tokens:
            return "length"
        if self.stopping.is_set():
            return "cancelled"
        text = ReplyText(self._deps.tokenizer, spec.stop, self._tokens)
        turn = EngineTurn(
            turn=spec.key.turn,
            prompt=spec.prompt,
            made=tuple(self._tokens),
            prompt_blocks=spec.blocks,
            sampling=spec.sampling,
            max_tokens=max_tokens,
            end_tokens=self._deps.end_tokens,
        )
        outputs = self._deps.engine.submit(turn)
        stopped = asyncio.create_task(self.stopping.wait())
        step: asyncio.Future[EngineOutput | None] | None = None
        try:
            while True:
                step = asyncio.ensure_future(anext(outputs, None))
                await asyncio.wait({step, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not step.done():
                    return "cancelled"
                output = step.result()
                if output is None:
                    raise Internal("The engine ended a turn without a reason.")
                self._cached_tokens = max(self._cached_tokens, output.cached_tokens)
                scan = text.push(output.tokens)
                self._add(scan.tokens, scan.pieces, "cloud")
                if scan.stopped:
                    return "stop"
                if output.finished:
                    rest = text.flush()
                    self._add(rest.tokens, rest.pieces, "cloud")
                    return output.finished
        finally:
            stopped.cancel()
            if step is not None:  # a generator can only be closed while nobody waits in it
                step.cancel()
                await asyncio.gather(step, return_exceptions=True)
            await _close(outputs)

    def _add(self, tokens: tuple[int, ...], pieces: tuple[str, ...], made_by: str) -> None:
        if not tokens:
            return
        now = self._deps.monotonic()
        if self._first_token_s is None:
            self._first_token_s = now
        if self._second_token_s is None and self.next_index + len(tokens) > 1:
            self._second_token_s = now
        self._writer.add(self.next_index, tokens, pieces, made_by)
        self._tokens.extend(tokens)

    # -- what readers see ----------------------------------------------------------------------

    def _publish_durable(self, frame: Frame, offset: int) -> None:
        self.feed.publish(frame_event(frame, offset))

    async def _end(self, reason: str, error: SegueError | None) -> None:
        op = self._ended_op(reason, error)
        deadline = self._deps.monotonic() + 2 * STORE_TIMEOUT_S
        while True:
            try:
                offset = await self._writer.end(op)
                break
            except StoreUnavailable:
                if self._deps.monotonic() > deadline:
                    raise
        self.feed.publish(ended_event(op, self.next_index, offset))
        spec = self.spec
        log.info(
            "turn",
            session=spec.key.session.session,
            turn=spec.key.turn,
            epoch=spec.key.epoch,
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
            epoch=key.epoch,
            reason=reason,
            usage=self._usage(),
            plan=self._report(),
            error_code=error.code if error else "",
            error_message=str(error) if error else "",
        )

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.spec.prompt),
            completion_tokens=self.next_index,
            edge_cached_tokens=self.spec.edge_cached_tokens,
            cloud_cached_tokens=self._cached_tokens,
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


async def _close(iterator: object) -> None:
    close = getattr(iterator, "aclose", None)
    if close is not None:
        await close()
