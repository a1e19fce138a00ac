"""What a chat knows: the session's turns, its own streamed by `run`, all others by `follow`.

No terminal here: a `Screen` shows it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import segue
from segue.errors import SegueError, Unreachable
from segue_contract.limits import RETRY_PAUSE_MAX_S
from segue_contract.plan import PlanReport, decode_plan
from segue_contract.sync.branches import branch_of, branches
from segue_contract.sync.ops import Frame, TurnStarted, TurnWaiting, TurnWithdrawn, UserMessage
from segue_contract.sync.state import SessionState, TurnState, find_turn
from segue_contract.transport.together import end

_QUOTED_CHARS = 60


def _quoted(text: str) -> str:
    said = " ".join(text.split())
    return f"“{said if len(said) <= _QUOTED_CHARS else said[:_QUOTED_CHARS] + '…'}”"


@dataclass(eq=False)
class Talk:
    """One turn as it is shown.

    `ours`: its frames come from our own run stream. `late`: it ran already when we came, so its
    times are not known here. `offline`: it was said out of reach of the log; `beside`: and so many
    turns of others were there meanwhile. `waiting`: for the session's turn, on another device.
    """

    turn: str
    device: str
    prompt: str
    begun_at: float
    ours: bool = False
    late: bool = False
    pieces: list[str] = field(default_factory=list)
    reason: str = ""
    error: str = ""
    timing: segue.Timing = field(default_factory=segue.Timing)
    plan: PlanReport | None = None
    cached_tokens: int = 0
    offline: bool = False
    beside: int = 0
    waiting: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Screen(Protocol):
    """Where a room is shown. None of these waits."""

    def history(self, talks: Sequence[Talk]) -> None:
        """Turns that had ended before we came, oldest first."""
        ...

    def changed(self) -> None:
        """`Room.live` is to be shown anew."""
        ...

    def finished(self, talk: Talk) -> None:
        """A turn ended; it will not change any more."""
        ...

    def note(self, text: str) -> None: ...


class Room:
    """One device in one session.

    Args:
        options: keyword arguments of `Session.run`.
    """

    def __init__(
        self,
        session: segue.Session,
        screen: Screen,
        options: dict[str, Any],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session = session
        self.options = options
        self.live: dict[str, Talk] = {}
        self.arrived = asyncio.Event()  # history was shown
        self._screen = screen
        self._clock = clock
        self._done: set[str] = set()
        self._context_from = ""
        self._besides: set[asyncio.Task[None]] = set()
        self._branched: set[str] = set()  # first turns of branches that were shown
        self._follower: segue.Follower | None = None

    @property
    def transport(self) -> str:
        """What brings the others' turns now."""
        live = self._follower.live if self._follower is not None else ""
        return {"mqtt": "live over MQTT", "grpc": "live over gRPC"}.get(live, "connecting")

    # -- the others -------------------------------------------------------------------------------
    async def follow(self) -> None:
        """Show the session until cancelled; come back when a node comes back."""
        try:
            await self._follow()
        finally:
            await end(*self._besides)

    async def _follow(self) -> None:
        told = False
        while True:
            self._follower = self.session.follow()
            try:
                async for item in self._follower:
                    told = False
                    if isinstance(item, segue.Snapshot):
                        self._snapshot(item.state)
                    else:
                        self._entry(item, self._follower.state)
                return
            except SegueError as error:
                if not error.retryable:
                    raise
                if not told:
                    self._screen.note(f"{error.message} Trying again.")
                told = True
                await asyncio.sleep(RETRY_PAUSE_MAX_S)

    def _snapshot(self, state: SessionState) -> None:
        first = not self.arrived.is_set()
        history = []
        for known in state.turns:
            if known.turn in self._done:
                continue
            if first and known.ended:
                talk = self._talk(known)
                self._fill(talk, known, state)
                self.live.pop(talk.turn)
                self._done.add(talk.turn)
                history.append(talk)
            else:
                self._talk(known).late = first
                self._update(known, state)
        if first:
            self._screen.history(history)
            self._show_offline()
            self.arrived.set()
        self._show_branches(state, known=first)
        for known in state.turns[-1:]:
            self._show_context(known, state)
        self._show_waiting(state)
        self._screen.changed()

    def _entry(self, entry: segue.Entry, state: SessionState) -> None:
        name = getattr(entry.op, "turn", "")
        known = find_turn(state, name)
        if isinstance(entry.op, TurnStarted):
            self._show_branches(state, known=False)
        if isinstance(entry.op, TurnWaiting | TurnWithdrawn | UserMessage):
            self._show_waiting(state)
            self._screen.changed()
        if known is None or name in self._done:
            return
        self._show_context(known, state)
        talk = self._talk(known)
        if isinstance(entry.op, Frame) and not (talk.ours or talk.late):
            seconds = self._clock() - talk.begun_at
            talk.timing.saw(seconds, len(known.tokens), entry.op.made_by)
        elif isinstance(entry.op, UserMessage):
            talk.prompt = entry.op.text
        self._update(known, state)
        self._screen.changed()

    def _show_offline(self) -> None:
        """What was said here offline in an earlier life, and is not in the log."""
        own = [one for one in self.session.offline_turns if one.device == self.session.device]
        refused = [one for one in own if one.error is not None]
        for one in refused:
            self._screen.note(f"The log refused {_quoted(one.title)} for good. {one.error}")
        if refused:
            self._beside(self._dismiss(*(one.turn for one in refused)), "dismiss")
        waiting = sum(one.error is None for one in own)
        if waiting:
            self._screen.note(f"{waiting} of your messages wait for the cloud to come back.")

    def _show_waiting(self, state: SessionState) -> None:
        """Messages of other devices that wait for the session's turn, and no others any more."""
        waiting = {one.turn for one in state.waiting}
        for name, talk in list(self.live.items()):
            if talk.waiting and name not in waiting:
                talk.waiting = False
                if find_turn(state, name) is None:
                    del self.live[name]
        for one in state.waiting:
            if one.turn not in self._done and one.turn not in self.live:
                talk = Talk(one.turn, one.device, one.prompt, self._clock(), waiting=True)
                self.live[one.turn] = talk

    def _show_context(self, known: TurnState, state: SessionState) -> None:
        """The line above which the model forgets, each time it moves."""
        if known.context_from in ("", self._context_from):
            return
        self._context_from = known.context_from
        first = find_turn(state, known.context_from)
        if first is not None:
            self._screen.note(
                "── The conversation is longer than the model's context. It no longer sees what "
                f"was said before {_quoted(first.prompt)} ──"
            )

    def _show_branches(self, state: SessionState, *, known: bool) -> None:
        """The line that says that a branch begins, once; `known`: its turns were shown as such."""
        for branch in branches(state.turns):
            first = branch.turns[0]
            said, other = find_turn(state, first), find_turn(state, branch.beside[0])
            told = known or first in self._branched
            self._branched.add(first)
            if not told and said is not None and other is not None:
                self._screen.note(
                    f"── {said.device or '?'} said {_quoted(said.prompt)} offline, while "
                    f"{other.device or '?'} said {_quoted(other.prompt)}: a branch, made without "
                    "the other. The next reply sees both ──"
                )

    def _talk(self, known: TurnState) -> Talk:
        talk = self.live.get(known.turn)
        if talk is None:
            talk = Talk(known.turn, known.device, known.prompt, self._clock())
            self.live[known.turn] = talk
        return talk

    def _update(self, known: TurnState, state: SessionState) -> None:
        talk = self._talk(known)
        if talk.ours:
            return
        self._fill(talk, known, state)
        if known.ended:
            self._finish(talk)

    def _fill(self, talk: Talk, known: TurnState, state: SessionState) -> None:
        talk.pieces = known.pieces
        talk.offline = known.offline
        branch = branch_of(state.turns, known.turn) if known.offline else None
        talk.beside = len(branch.beside) if branch is not None else 0
        if not known.ended:
            return
        talk.reason, talk.error = known.reason, known.error_message
        talk.timing.tokens = len(known.tokens)
        talk.cached_tokens = known.usage.edge_cached_tokens or known.usage.cloud_cached_tokens
        if known.plan:
            try:
                talk.plan = decode_plan(known.plan)
            except SegueError:
                talk.plan = None

    def _finish(self, talk: Talk) -> None:
        if talk.turn not in self._done:
            self._done.add(talk.turn)
            self.live.pop(talk.turn, None)
            self._screen.finished(talk)

    # -- we ---------------------------------------------------------------------------------------
    async def say(self, prompt: str) -> None:
        """Run a turn and show it as it comes; what goes wrong is shown, not raised."""
        talk: Talk | None = None
        try:
            turn = self.session.run(prompt, **self.options)
            talk = Talk(turn.id, self.session.device, prompt, self._clock(), ours=True)
            talk.timing = turn.timing
            self.live[turn.id] = talk
            self._screen.changed()
            async with turn:
                async for event in turn:
                    self._own(talk, event)
            if turn.ended is not None and turn.ended.pending:
                self._beside(self._settle(turn, talk), f"settle {turn.id}")
        except Unreachable as error:
            self._screen.note(str(error))
            if talk is not None:
                self._hand_to_log(talk)
        except SegueError as error:
            self._screen.note(str(error))
            if talk is not None:
                self.live.pop(talk.turn, None)
                self._screen.changed()

    def _own(self, talk: Talk, event: object) -> None:
        if isinstance(event, segue.Frame):
            talk.pieces[event.index :] = event.pieces
        elif isinstance(event, segue.Rewound):
            del talk.pieces[event.index :]
        elif isinstance(event, segue.Ended):
            talk.reason, talk.plan = event.reason, event.plan
            talk.offline = event.pending
            talk.error = event.error.message if event.error is not None else ""
            usage = event.usage
            talk.cached_tokens = usage.edge_cached_tokens or usage.cloud_cached_tokens
            self._finish(talk)
        self._screen.changed()

    async def _settle(self, turn: segue.Turn, talk: Talk) -> None:
        """A message that was said offline: show what the log made of it, where that is another."""
        shown = talk.text
        try:
            async for event in turn.settled():
                if not isinstance(event, segue.Ended):
                    continue
                said = _quoted(talk.prompt)
                if event.error is not None:
                    self._screen.note(f"The log refused {said} for good. {event.error}")
                    await self._dismiss(turn.id)
                elif turn.text != shown:
                    self._screen.note(f"The log keeps another reply to {said}:")
                    kept = replace(talk, pieces=[turn.text], reason=event.reason, plan=event.plan)
                    self._screen.finished(kept)
        except SegueError as error:
            self._screen.note(str(error))

    async def _dismiss(self, *turns: str) -> None:
        """They were shown; where nobody can be told of it, they are shown again another time."""
        with contextlib.suppress(SegueError):
            await self.session.dismiss(*turns)

    def _beside(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Do it while the conversation goes on, until it is left."""
        task = asyncio.create_task(work, name=name)
        self._besides.add(task)
        task.add_done_callback(self._besides.discard)

    def _hand_to_log(self, talk: Talk) -> None:
        """Our stream is gone for good; if the turn ever began, the log shows its rest."""
        talk.ours = False
        state = self._follower.state if self._follower is not None else SessionState()
        known = find_turn(state, talk.turn)
        if known is None:
            self.live.pop(talk.turn, None)
        else:
            self._update(known, state)
        self._screen.changed()

    async def stop(self) -> None:
        """Stop the turn that is shown as running, whoever asked for it: not one that begins as this
        is asked. Others wait behind it."""
        running = (name for name, talk in self.live.items() if not talk.waiting)
        shown = next(running, "")
        try:
            if not shown or not await self.session.stop(shown):
                self._screen.note("Nothing is running.")
        except SegueError as error:
            self._screen.note(str(error))
