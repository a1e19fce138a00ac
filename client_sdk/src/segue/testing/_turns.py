"""Turns of a `FakeNode`: each a script that is played into the log and to who asked."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from segue.testing._log import MemoryLog
from segue.testing.script import Fail, Pause, Preview, Rewind, Step, Wait, pieces_of, token_of
from segue_contract.errors import Internal, SegueError
from segue_contract.sync import ops
from segue_contract.transport.turn_feed import TurnFeed
from segue_contract.turn.events import Durable, Ended, Frame, MadeBy, Reason, Rewound, Started

_numbers = itertools.count(1)


def op_id() -> str:
    return f"fake{next(_numbers)}"


@dataclass
class PlayedTurn:
    """One that runs, or ran. `feed` has its events for those who asked."""

    log: MemoryLog
    turn: str
    device: str
    prompt: str
    max_tokens: int
    sampling: ops.Sampling
    stop: tuple[str, ...] = ()
    feed: TurnFeed = field(default_factory=TurnFeed)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    _epoch: int = 1
    _shown: int = 0
    _durable: int = 0
    _previews: list[str] = field(default_factory=list)

    @property
    def asked(self) -> str:
        """What tells the same question, asked again, from another one."""
        return ops.request_digest(self.prompt, self.max_tokens, self.sampling, self.stop)

    def begin(self, model: str) -> None:
        """Write its message and its start."""
        log = self.log
        now_ms = int(time.time() * 1000)
        message = ops.UserMessage(
            id=op_id(), device=self.device, at_ms=now_ms, turn=self.turn, text=self.prompt
        )
        self._model = model
        offset = log.append(message, self._start())
        self.feed.publish(Started(self.turn, self._epoch, offset))

    def _start(self) -> ops.TurnStarted:
        return ops.TurnStarted(
            id=op_id(), turn=self.turn, epoch=self._epoch, model=self._model,
            max_tokens=self.max_tokens, sampling=self.sampling, stop=self.stop,
        )  # fmt: skip

    async def play(self, script: Callable[[], Sequence[Step]]) -> None:
        """To its end, whoever listens."""
        reason, error = Reason.STOP, None
        try:
            for step in script():
                if self.stopped.is_set():
                    reason = Reason.CANCELLED
                    break
                if isinstance(step, Fail):
                    reason, error = Reason.ERROR, step.error
                    break
                await self._take(step)
                if self._shown >= self.max_tokens:
                    reason = Reason.LENGTH
                    break
            else:
                reason = Reason.CANCELLED if self.stopped.is_set() else Reason.STOP
        except SegueError as wrong:
            reason, error = Reason.ERROR, wrong
        except Exception as wrong:  # of the test's own script
            reason, error = Reason.ERROR, Internal(f"The script raised {wrong!r}.")
        self._end(reason, error)

    async def _take(self, step: Step) -> None:
        match step:
            case str():
                self._confirm()
                for piece in self._allowed(step):
                    self._write(piece)
                    await asyncio.sleep(0)  # its readers see one token after another
            case Preview():
                for piece in self._allowed(step.text):
                    self._show(piece)
            case Rewind():
                self._take_back()
            case Pause():
                await self._pause(asyncio.sleep(step.seconds))
            case Wait():
                await self._pause(step.event.wait())

    async def _pause(self, waiting: object) -> None:
        """Until it is over, or the turn is stopped."""
        tasks = [asyncio.ensure_future(one) for one in (waiting, self.stopped.wait())]  # type: ignore[call-overload]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()

    def _allowed(self, text: str) -> tuple[str, ...]:
        return pieces_of(text)[: max(0, self.max_tokens - self._shown)]

    def _write(self, piece: str) -> None:
        offset = self._append([piece], MadeBy.CLOUD)
        frame = Frame(self._epoch, self._shown, (token_of(piece),), (piece,), True, offset)
        self._shown += 1
        self.feed.publish(frame)

    def _append(self, pieces: Sequence[str], made_by: MadeBy) -> int:
        tokens = tuple(map(token_of, pieces))
        op = ops.Frame(
            id=op_id(), turn=self.turn, epoch=self._epoch, index=self._durable,
            tokens=tokens, pieces=tuple(pieces), made_by=made_by,
        )  # fmt: skip
        self._durable += len(pieces)
        return self.log.append(op)

    def _show(self, piece: str) -> None:
        self.feed.publish(
            Frame(self._epoch, self._shown, (token_of(piece),), (piece,), made_by=MadeBy.EDGE)
        )
        self._previews.append(piece)
        self._shown += 1

    def _confirm(self) -> None:
        if self._previews:
            offset = self._append(self._previews, MadeBy.EDGE)
            self._previews.clear()
            self.feed.publish(Durable(self._durable, offset))

    def _take_back(self) -> None:
        """The next epoch goes on at the first token that the log does not have."""
        self._previews.clear()
        self._epoch += 1
        self._shown = self._durable
        self.log.append(self._start())
        self.feed.publish(Rewound(self._epoch, self._durable))

    def _end(self, reason: Reason, error: SegueError | None) -> None:
        self._confirm()
        usage = ops.Usage(
            prompt_tokens=len(pieces_of(self.prompt)), completion_tokens=self._durable
        )
        code, message = (error.code, error.message) if error is not None else ("", "")
        ended = ops.TurnEnded(
            id=op_id(), turn=self.turn, epoch=self._epoch, reason=reason, usage=usage,
            error_code=code, error_message=message,
        )  # fmt: skip
        offset = self.log.append(ended)
        self.feed.publish(
            Ended(
                reason=reason, next_index=self._durable, epoch=self._epoch, usage=usage,
                offset=offset, error_code=code, error_message=message,
            )
        )  # fmt: skip
        self.feed.close()
