"""What the edge does in one turn, whatever happens in whatever order. Pure.

`TurnState.on(signal, now)` gives the instructions that follow. In short:

    no cloud     make the reply here, put it into the outbox
    text         the cloud makes the reply; show what the log says
    ship         prefill, send KV, show the first tokens; when the cloud is ready, hand over
    edge         make the whole reply, the cloud writes it into the log
    joined       another node runs it: follow the log

    the link breaks        take the turn over at the next cloud. A maker at work goes on meanwhile
                           as a bridge; after a hand-over the reply pauses.
    none for `retry_s`     offline: make the rest here, and go on looking for a cloud
    a cloud has it again   the maker stops; what the log has otherwise than shown is taken back
    the edge ends it alone the outbox takes it, and the end says that it is not durable
    the log lost the turn  offline to the end: the outbox begins it anew
    a cloud refuses it     for good, twice: follow the log; somebody there finishes it
    the edge itself slept  follow the log: the turn may be served elsewhere by now

Readers are told one end. It is the log's, or the outbox's where no cloud was there; a link that
closes without an end, or with one that is not durable, is a broken link.
"""

from __future__ import annotations

from segue_contract.errors import (
    Internal,
    InvalidArgument,
    NotFound,
    Revoked,
    SegueError,
    Unreachable,
)
from segue_contract.limits import EdgeTurnLimits
from segue_contract.plan import Shape
from segue_contract.turn.events import Durable, Ended, Frame, MadeBy, Reason, Rewound, Started
from segue_edge.turns.state import signals as s
from segue_edge.turns.state.parts import DUTIES, Link, Maker
from segue_edge.turns.state.patience import Patience
from segue_edge.turns.state.shown import Shown
from segue_edge.turns.state.signals import Instruction, Signal


class TurnState:
    """One turn. `begin` first, then `on` for every signal; after `Close` there is nothing to do.

    Args:
        turn, epoch, offset: as the log began it; epoch 0 where it did not.
        shape: the plan.
    """

    def __init__(
        self,
        turn: str,
        epoch: int,
        offset: int,
        shape: Shape,
        limits: EdgeTurnLimits = EdgeTurnLimits(),
    ) -> None:
        self._shape = shape
        self._shown = Shown(turn, epoch, offset)
        self._merger = self._shown.merger
        self._patience = Patience(limits)
        self._maker = Maker.NONE
        self._makers = 0
        self._made_one = False
        self.maker_index = 0  # tokens that this edge made and showed, from the reply's start
        self._reason: Reason | None = None  # the maker's end
        self._link: Link | None = None
        self._links = 0
        self.offline = False
        self._in_log = True
        self._follow_only = False
        self._storing = False
        self.closed = False
        self._refusals = 0
        self._last_error: SegueError = Unreachable("No cloud answers for this turn.")

    @property
    def waits_for_maker(self) -> bool:
        """The next token can only be made here."""
        served = self._link is not None and self._link.opened
        return self._maker in (Maker.MAKING, Maker.FAILED) and not served

    @property
    def tokens(self) -> list[int]:
        return self._merger.tokens

    @property
    def pieces(self) -> list[str]:
        """The text that each of `tokens` completed."""
        return self._merger.pieces

    @property
    def shape(self) -> Shape:
        return self._shape

    @property
    def in_log(self) -> bool:
        """The log has begun the turn, as far as this edge knows."""
        return self._in_log

    @property
    def epoch(self) -> int:
        return self._shown.epoch

    # -- the beginning -------------------------------------------------------------------------

    def begin(self, now: float) -> list[Instruction]:
        """The turn began in a cloud: do as planned."""
        self._patience.begin(now)
        out = self._shown.start()
        if DUTIES[self._shape].makes:
            out += self._make()  # before the link: the first token depends on nothing else
        self._links += 1
        self._link = Link(self._links, self._shape, takes_tokens=True)
        out.append(s.Open(self._links, self._shape))
        if not DUTIES[self._shape].makes:
            self._link.settled = True
            out.append(s.SendPlan())
        return out

    def begin_offline(self, now: float) -> list[Instruction]:
        """No cloud is there; the outbox has room for the turn."""
        self._patience.begin(now)
        self.offline, self._in_log = True, False
        return [*self._shown.start(), *self._make()]

    def join(self, now: float) -> list[Instruction]:
        """The log knows the turn: whoever runs it, follow it."""
        self._patience.begin(now)
        self._follow_only = True
        return self._seek(now, fresh=True)

    # -- signals -------------------------------------------------------------------------------

    def on(self, signal: Signal, now: float) -> list[Instruction]:
        """The instructions that follow from `signal`, to be performed in order."""
        if self.closed:
            return []
        match signal:
            case s.Made() | s.MakerEnded() | s.MakerFailed():
                if signal.maker != self._makers or self._maker is not Maker.MAKING:
                    return []
                return self._on_maker(signal, now)
            case s.Stored():
                return self._on_stored(signal)
            case _ if self._storing:
                return []
            case s.Woke():
                return self._on_woke(now)
            case s.RoomKept():
                return self._on_room()
            case s.NoRoom():
                self._last_error = signal.error
                return self._close(signal.error) if not self._in_log else []
            case s.StopAsked():
                return self._on_stop_asked()
            case _:
                if self._link is None or signal.link != self._link.number:
                    return []
                return self._on_link(self._link, signal, now)

    def _on_maker(
        self, signal: s.Made | s.MakerEnded | s.MakerFailed, now: float
    ) -> list[Instruction]:
        match signal:
            case s.Made():
                return self._on_made(signal)
            case s.MakerEnded():
                self._maker, self._reason = Maker.ENDED, signal.reason
                return self._on_made_all(signal.reason)
            case s.MakerFailed():
                self._maker, self._last_error = Maker.FAILED, signal.error
                if not self._in_log:
                    return self._close(signal.error)
                if self._link is not None and self._link.takes_tokens:
                    self._link.last = self._link.ready = True
                return self._maybe_hand_over()

    def _on_link(self, link: Link, signal: Signal, now: float) -> list[Instruction]:
        match signal:
            case s.Opened():
                return self._on_opened(link, signal, now)
            case s.Ready():
                link.ready = True
                return self._maybe_hand_over()
            case s.ShipFailed():
                link.ready = link.last = True
                return self._maybe_hand_over()
            case s.StopNow():
                link.settled = True
                return self._halt(drop=True)
            case s.Logged():
                return self._on_logged(link, signal, now)
            case s.Broke():
                # Whoever it lost may be alive, and the turn served elsewhere: nothing is taken.
                self._follow_only |= signal.slept and link.opened and not self.offline
                return self._on_broke(link, signal.error, now)
            case s.NoMoreClouds():
                return self._on_no_more_clouds(now)
            case _:
                raise AssertionError(signal)

    # -- the edge's own tokens -----------------------------------------------------------------

    def _make(self) -> list[Instruction]:
        self._makers += 1
        self._maker = Maker.MAKING
        self._made_one = False
        self.maker_index = self._merger.next_index
        return [s.MakeTokens(self._makers, tuple(self._merger.tokens))]

    def _halt(self, *, drop: bool = False) -> list[Instruction]:
        if self._maker is Maker.MAKING:
            self._maker = Maker.HALTED
        return [s.HaltMaker(drop)] if self._makers else []

    def _on_made(self, made: s.Made) -> list[Instruction]:
        self._made_one = True
        out: list[Instruction] = []
        if made.tokens:
            frame = Frame(self.epoch, made.index, made.tokens, made.pieces, made_by=MadeBy.EDGE)
            out += self._shown.show(self._merger.push(frame))
            if not self._merger.shows(made.index, made.tokens):
                return out + self._halt()  # the log was first here, with other tokens
            self.maker_index = frame.next_index
            if self._link is not None and self._link.owes:
                out.append(s.SendTokens(frame))
        return out + self._maybe_hand_over()

    def _on_made_all(self, reason: Reason) -> list[Instruction]:
        link = self._link
        if self.offline:
            # One that is being opened may take the turn: `_on_broke` says if it did not.
            return [] if link is not None else self._store(reason)
        if link is None or not link.owes:
            return []
        link.settled = True
        return [s.SendPlan(), s.SendEnd(reason, self.maker_index)]

    def _maybe_hand_over(self) -> list[Instruction]:
        """The cloud goes on from here, once it can and what is owed to it was sent."""
        link = self._link
        if link is None or link.settled or link.attached or not link.ready:
            return []
        if not link.takes_tokens:
            return self._hand_over_again(link)
        failed = self._maker is Maker.FAILED
        if not failed and not (DUTIES[link.shape].hands_over and self._made_one):
            return []
        if self._maker is Maker.ENDED:
            return []
        link.settled = True
        return [*self._halt(), s.SendPlan(), s.HandOver(self.maker_index, link.last)]

    def _hand_over_again(self, link: Link) -> list[Instruction]:
        """After a take-over: from what was known, unless the log's own tokens are others."""
        at = link.resume_at
        if not link.ships or not link.opened or self._merger.durable_index < at:
            return []
        if list(link.known[:at]) == self._merger.tokens[:at]:
            at = max(at, len(link.known))
        link.settled = True
        return [s.HandOver(at, link.last)]

    # -- a cloud -------------------------------------------------------------------------------

    def _on_opened(self, link: Link, opened: s.Opened, now: float) -> list[Instruction]:
        link.resume_at = opened.next_index
        link.ships = opened.ships
        link.attached = opened.attached or (link.takes_tokens and opened.next_index > 0)
        self._shown.learn(opened.epoch)
        if link.takes_tokens and not link.attached:
            link.opened, link.opened_at = True, now
            return self._maybe_hand_over()
        return self._adopted(link, now)

    def _adopted(self, link: Link, now: float) -> list[Instruction]:
        """A cloud decodes the turn, from what it knew as this link was opened."""
        link.opened, link.opened_at = True, now
        out = self._halt(drop=True)
        if self._maker is Maker.ENDED:
            self._maker, self._reason = Maker.HALTED, None
        if self.offline:
            self.offline = False
            out.append(s.FreeRoom())
        return out

    def _on_logged(self, link: Link, logged: s.Logged, now: float) -> list[Instruction]:
        event = logged.event
        if isinstance(event, Ended):
            return self._on_ended(link, event, now)
        out = self._adopted(link, now) if link.follows and not link.opened else []
        known = self._merger.durable_index
        match event:
            case Started():
                self._shown.learn(event.epoch, event.offset)
                return [*out, *self._shown.start()]
            case Frame():
                if event.index > self._merger.next_index:
                    gap = InvalidArgument(
                        f"The cloud sent token {event.index}; {self._merger.next_index} is next."
                    )
                    return out + self._on_broke(link, gap, now)
                merged = self._merger.push(event)
                over = event.next_index > self.maker_index  # the cloud decodes by itself
            case Durable():
                merged, over = self._merger.confirm(event.next_index, event.offset), False
            case Rewound():
                merged, over = self._merger.rewind(event.epoch, event.index), True
        out += self._shown.show(merged)
        if self._merger.durable_index != known:
            link.progressed = True
            self._patience.served()
        if self._maker is Maker.MAKING and (
            over or any(isinstance(one, Rewound) for one in merged)
        ):
            out += self._halt(drop=True)
        return out + self._maybe_hand_over()

    def _on_ended(self, link: Link, ended: Ended, now: float) -> list[Instruction]:
        if not ended.durable or self._merger.durable_index < ended.next_index:
            error = Unreachable("The cloud closed the turn before the log had its end.")
            return self._on_broke(link, error, now)
        out = self._halt(drop=True)
        out += self._shown.show(self._merger.end(ended.next_index))
        out += [*self._shown.start(), s.Show(ended)]
        return out + self._close(None)

    def _on_broke(self, link: Link, error: SegueError, now: float) -> list[Instruction]:
        self._link, self._last_error = None, error
        out: list[Instruction] = [s.CloseLink()]
        if link.opened:
            self._patience.was_served(link.opened_at, now)
        if link.follows and not error.retryable and not isinstance(error, Internal):
            return out + self._close(error)
        if isinstance(error, Revoked):
            return out + self._close(error)
        if isinstance(error, NotFound) and not link.follows:
            self._in_log = False  # the log has lost the turn
            return out + ([] if self.offline else [s.KeepRoom()]) + self._store_if_made()
        # gRPC calls some losses of a link internal: only what a cloud says of the turn counts.
        if not error.retryable and not isinstance(error, Internal):
            self._refusals += 1
            self._follow_only = self._refusals > 1
        if self.offline and self._reason is not None:
            return out + self._store_if_made()
        return out + self._seek(now, fresh=link.takes_tokens or link.progressed)

    # -- without a cloud -----------------------------------------------------------------------

    def _seek(self, now: float, *, fresh: bool) -> list[Instruction]:
        """Try the next cloud."""
        self._patience.lost(now)
        if self._follow_only and not fresh:
            self._link = None
            return self._rest(now)
        self._links += 1
        known = tuple(self._merger.tokens)
        self._link = Link(self._links, known=known, follows=self._follow_only)
        if self._follow_only:
            return [s.Follow(self._links, self._merger.durable_index)]
        return [s.TakeOver(self._links, known, fresh, ship=self._refusals == 0)]

    def _on_no_more_clouds(self, now: float) -> list[Instruction]:
        self._link = None
        if self.offline and self._reason is not None:
            return self._store_if_made()
        return self._rest(now)

    def _rest(self, now: float) -> list[Instruction]:
        """Pause; go offline, or give up, where that took too long."""
        out: list[Instruction] = []
        expired = self._patience.expired(now)
        if not self.offline and self._patience.over(now):
            if self._follow_only or expired:
                return self._close(self._last_error)
            out.append(s.KeepRoom())
        elif self._maker is Maker.FAILED and expired:
            return self._close(self._last_error)
        return [*out, s.Wait(self._patience.pause())]

    def _on_woke(self, now: float) -> list[Instruction]:
        if self._link is not None or not self._in_log:
            return []
        return self._seek(now, fresh=True)

    def _on_room(self) -> list[Instruction]:
        if self._link is not None and self._link.opened:
            return [s.FreeRoom()]  # a cloud was quicker
        self.offline = True
        if self._maker is Maker.ENDED:
            return self._store_if_made()
        if self._maker is Maker.MAKING:
            return []
        return self._make()

    def _on_stop_asked(self) -> list[Instruction]:
        if not self.offline:
            return []
        return [*self._halt(drop=True), *self._store(Reason.CANCELLED)]

    def _store_if_made(self) -> list[Instruction]:
        if self.offline and self._reason is not None and self._link is None:
            return self._store(self._reason)
        return []

    def _store(self, reason: Reason) -> list[Instruction]:
        self._storing = True
        closing: list[Instruction] = [s.CloseLink()] if self._link is not None else []
        self._link = None
        return [*closing, s.Store(reason)]

    def _on_stored(self, stored: s.Stored) -> list[Instruction]:
        return [s.Show(stored.ended), *self._close(None)] if self._storing else []

    def _close(self, error: SegueError | None) -> list[Instruction]:
        self.closed = True
        closing: list[Instruction] = [s.CloseLink()] if self._link is not None else []
        self._link = None
        return [*closing, s.Close(error)]
