"""The edge's turn under any order of events: what readers are told is right at every step."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue_contract.errors import (
    BadRecipe,
    Internal,
    Overloaded,
    SegueError,
    UnknownTurn,
    Unreachable,
)
from segue_contract.limits import EdgeTurnLimits
from segue_contract.plan import Shape
from segue_contract.turn.events import Durable, Ended, Frame, MadeBy, Reason, Rewound, Started
from segue_edge.turns.state import signals as s
from segue_edge.turns.state.turn import TurnState

LIMITS = EdgeTurnLimits(retry_s=10.0, timeout_s=60.0, pause_s=0.1, pause_max_s=1.0)
LENGTH = 8  # tokens of a whole reply


def word(token: int) -> str:
    return f"<{token}>"


class Reader:
    """A device: it shows what it is told, and asserts that this is possible."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.durable = 0
        self.started = 0
        self.ended: Ended | None = None
        self.closed = False
        self.error: SegueError | None = None

    def take(self, event: Any) -> None:
        assert not self.closed
        assert self.ended is None, "something after the end"
        match event:
            case Started():
                self.started += 1
                assert self.started == 1
            case Frame():
                assert self.started, "tokens before the start"
                assert event.index == len(self.tokens), "a hole, or tokens shown twice"
                self.tokens += event.tokens
                self.pieces += event.pieces
                if event.durable and self.durable == event.index:
                    self.durable = len(self.tokens)
            case Durable():
                assert event.next_index <= len(self.tokens)
                self.durable = max(self.durable, event.next_index)
            case Rewound():
                assert self.durable <= event.index < len(self.tokens)
                del self.tokens[event.index :], self.pieces[event.index :]
            case Ended():
                assert self.started
                self.ended = event
        assert self.pieces == [word(token) for token in self.tokens], "text is not the tokens'"


class World:
    """One edge turn, its makers, clouds and log, played by a seeded player.

    The log is the truth: `log` holds its tokens, `log_end` its end. A cloud's owner may be
    anywhere; links tell what the log holds.
    """

    def __init__(self, random: Random, shape: Shape, *, online: bool) -> None:
        self.random = random
        self.state = TurnState("t1", 1 if online else 0, 2, shape, LIMITS)
        self.reader = Reader()
        self.now = 0.0
        self.log: list[int] = []
        self.epoch = 1
        self.log_end: Reason | None = None
        self.maker: tuple[int, list[int]] | None = None  # number and its own tokens so far
        self.maker_done = False
        self.halted = False
        self.link: Any = None
        self.told = 0  # tokens of the log told over the link
        self.up: list[int] | None = None  # what the cloud of the first link got from the edge
        self.handed = self.opened = self.taking = False
        self.pauses = 0
        self.kept = self.asked_room = False
        self.storing: Reason | None = None
        self.stored: list[int] | None = None
        begin = self.state.begin if online else self.state.begin_offline
        self.kept = not online
        self.perform(begin(self.now))

    def feed(self, signal: s.Signal) -> None:
        self.perform(self.state.on(signal, self.now))

    def perform(self, instructions: list[s.Instruction]) -> None:
        for one in instructions:
            assert not self.reader.closed, "an instruction after the end"
            match one:
                case s.Show():
                    self.reader.take(one.event)
                case s.MakeTokens():
                    assert list(one.made) == self.reader.tokens
                    self.maker, self.maker_done = (one.maker, list(one.made)), False
                    self.halted = False
                case s.HaltMaker():
                    self.halted = True
                case s.Open() | s.TakeOver() | s.Follow():
                    self.link, self.told, self.opened = one, 0, False
                    self.taking = isinstance(one, s.Open) and one.shape is not Shape.TEXT
                    self.up, self.handed = [], False
                case s.CloseLink():
                    self.link = None
                case s.SendTokens():
                    assert self.taking
                    assert not self.handed
                    assert self.up is not None
                    assert one.frame.index == len(self.up), "a hole on its way up"
                    self.up += one.frame.tokens
                case s.HandOver() | s.SendEnd():
                    assert not self.handed, "handed over twice"
                    self.handed = True
                    if self.taking:
                        assert self.up is not None
                        assert one.next_index == len(self.up)
                    if isinstance(one, s.HandOver):
                        assert self.halted or not self.taking or self.maker_done
                case s.SendPlan():
                    pass
                case s.Wait():
                    self.pauses += 1
                case s.KeepRoom():
                    self.asked_room = True
                case s.FreeRoom():
                    self.kept = False
                case s.Store():
                    assert self.storing is None
                    self.storing = one.reason
                    self.stored = list(self.state.tokens)
                case s.Close():
                    self.reader.closed, self.reader.error = True, one.error

    # -- moves ---------------------------------------------------------------------------------

    def token(self) -> int:
        return self.random.randrange(2)  # makers often differ

    def make(self) -> None:
        if self.maker is None or self.maker_done:
            return
        number, tokens = self.maker
        if self.random.random() < 0.1:
            self.feed(s.Made(number, len(tokens)))  # held for a stop string
        elif self.random.random() < 0.05:
            self.maker_done = True
            self.feed(s.MakerFailed(number, Internal("The model failed.")))
        elif len(tokens) >= LENGTH:
            self.maker_done = True
            self.feed(s.MakerEnded(number, Reason.LENGTH))
        else:  # also after a halt: what was under way still arrives
            token = self.token()
            self.feed(s.Made(number, len(tokens), (token,), (word(token),)))
            tokens.append(token)

    def cloud_works(self) -> None:
        """The log grows, whoever owns the turn."""
        if self.log_end is not None or not self.state.in_log:
            return
        up, at = self.up or [], len(self.log)
        if self.taking and len(up) > at and up[:at] == self.log and self.random.random() < 0.8:
            self.log.append(up[at])
            return
        if len(self.log) >= LENGTH:
            self.log_end = Reason.LENGTH
        elif not self.taking or self.handed or self.random.random() < 0.1:
            self.log.append(self.token())

    def open(self) -> None:
        if self.link is None or self.opened or isinstance(self.link, s.Follow):
            return
        self.opened = True
        if isinstance(self.link, s.TakeOver):
            self.epoch += 1
            known = list(self.link.known)
            at = len(self.log)
            if self.log_end is None and known[:at] == self.log and self.random.random() < 0.7:
                self.log = known[:LENGTH]  # adopted
            ships = self.random.random() < 0.5
            self.feed(s.Opened(self.link.link, self.epoch, at, ships=ships))
        else:
            attached = self.random.random() < 0.2
            if attached:
                self.taking = False
            self.feed(s.Opened(self.link.link, self.epoch, 0, attached=attached))

    def tell(self) -> None:
        """The link says what the log has beyond what it told; sometimes again, or in one piece."""
        if self.link is None or not (self.opened or isinstance(self.link, s.Follow)):
            return
        number = self.link.link
        if self.told >= len(self.log):
            if self.log_end is not None:
                durable = self.random.random() < 0.9
                end = Ended(reason=self.log_end, next_index=len(self.log), durable=durable)
                self.feed(s.Logged(number, end))
            return
        start = max(0, self.told - self.random.randrange(2))
        stop = self.random.randrange(self.told, len(self.log)) + 1
        tokens = tuple(self.log[start:stop])
        self.told = stop
        if self.taking and self.up is not None and self.up[:stop] == self.log[:stop]:
            self.feed(s.Logged(number, Durable(stop, 9)))
            return
        frame = Frame(self.epoch, start, tokens, tuple(map(word, tokens)), True, 9, MadeBy.CLOUD)
        self.feed(s.Logged(number, frame))

    def signal_link(self) -> None:
        if self.link is None:
            return
        kinds: list[s.Signal] = [s.Ready(self.link.link), s.ShipFailed(self.link.link)]
        self.feed(self.random.choice(kinds))

    def stop_now(self) -> None:
        if self.link is not None and self.opened and self.log_end is None:
            self.log_end = Reason.CANCELLED
            self.feed(s.StopNow(self.link.link))

    def break_link(self) -> None:
        if self.link is None:
            return
        errors: list[SegueError] = [Unreachable("gone")] * 6
        errors += [Overloaded("full"), BadRecipe("no")]
        if self.random.random() < 0.1 and self.log_end is None and self.opened is False:
            if self.reader.durable:  # a log that loses what was durable is another test
                return
            errors = [UnknownTurn("lost")]
            self.log, self.told = [], 0
        number, self.link = self.link.link, None
        if self.random.random() < 0.2:
            self.feed(s.NoMoreClouds(number))
        else:
            slept = self.random.random() < 0.2
            self.feed(s.Broke(number, self.random.choice(errors), slept))

    def stale(self) -> None:
        """What earlier attempts still say has no effect."""
        before = list(self.reader.tokens)
        frame = Frame(99, 0, (7,), (word(7),), True, 1)
        for signal in (s.Logged(0, frame), s.Made(0, 0, (7,), (word(7),)), s.Ready(0)):
            assert self.state.on(signal, self.now) == []
        assert self.reader.tokens == before

    def local(self) -> None:
        if self.asked_room:
            self.asked_room = False
            if self.random.random() < 0.8:
                self.kept = True
                self.feed(s.RoomKept())
            else:
                self.feed(s.NoRoom(Overloaded("full")))
        elif self.storing is not None and self.stored is not None:
            reason, tokens = self.storing, self.stored
            end = Ended(reason=reason, next_index=len(tokens), durable=False)
            self.feed(s.Stored(end))
        elif self.pauses:
            self.pauses -= 1
            self.feed(s.Woke())

    def stop_asked(self) -> None:
        self.feed(s.StopAsked())

    def play(self, steps: int) -> None:
        moves = [
            *[self.make] * 5,
            *[self.cloud_works] * 4,
            *[self.open] * 3,
            *[self.tell] * 5,
            self.signal_link,
            *[self.local] * 4,
            self.break_link,
            self.stale,
        ]
        rare = [self.stop_now, self.stop_asked]
        for _ in range(steps):
            if self.reader.closed:
                return
            self.now += self.random.choice([0.0, 0.01, 0.3, 2.0])
            self.random.choice(rare if self.random.random() < 0.01 else moves)()

    def finish(self) -> None:
        """The faults are over: the turn must end, within bounded time."""
        for _ in range(400):
            if self.reader.closed:
                return
            self.now += 0.5
            for move in (self.local, self.open, self.signal_link, self.make, self.cloud_works):
                if not self.reader.closed:
                    move()
            if not self.reader.closed:
                self.tell()
        raise AssertionError("the turn does not end")


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([Shape.TEXT, Shape.SHIP, Shape.EDGE]),
    online=st.booleans(),
)
def test_no_token_is_lost_or_doubled_and_there_is_one_end(
    seed: int, shape: Shape, online: bool
) -> None:
    world = World(Random(seed), shape if online else Shape.EDGE, online=online)
    world.play(120)
    world.finish()
    reader, ended = world.reader, world.reader.ended
    if ended is None:
        assert reader.error is not None, "closed without an end and without a reason"
        return
    assert len(reader.tokens) == ended.next_index
    if ended.durable:
        assert reader.tokens == world.log, "the asker ends with the log's text"
        assert world.log_end is ended.reason
    else:
        assert reader.tokens == world.stored, "the outbox has what was shown"
        assert world.kept


@pytest.mark.parametrize("shape", [Shape.TEXT, Shape.SHIP, Shape.EDGE])
def test_without_faults_the_turn_ends_with_the_logs_text(shape: Shape) -> None:
    for seed in range(50):
        world = World(Random(seed), shape, online=True)
        world.finish()
        assert world.reader.ended is not None or world.reader.error is not None
        if world.reader.ended is not None and world.reader.ended.durable:
            assert world.reader.tokens == world.log


@pytest.mark.parametrize("slept", [False, True])
def test_an_edge_that_slept_takes_nothing_from_whoever_goes_on(slept: bool) -> None:
    turn = TurnState("t", 1, 2, Shape.TEXT, LIMITS)
    turn.begin(0.0)
    turn.on(s.Opened(1, 1, 0, attached=False, ships=False), 0.1)
    said = Frame(1, 0, (5,), (word(5),), True, 3, MadeBy.CLOUD)
    turn.on(s.Logged(1, said), 0.2)
    out = turn.on(s.Broke(1, Unreachable("The stream broke."), slept), 9.0)
    assert isinstance(out[-1], s.Follow if slept else s.TakeOver)
