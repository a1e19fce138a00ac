"""The tails of sessions that are followed or asked for, as far as they are known at once. Pure.

A session is *watched* first: from then on the store tells of each change. Then its tail is looked
up, and known from there on, until the link to the store is lost.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count

from segue_cloud.sessions.news import LogTail
from segue_contract.ids import SessionName
from segue_contract.limits import MAX_WATCHED_TAILS, TAIL_IDLE_S


@dataclass
class _Tail:
    told: int  # number of the last news of it: a look-up may be older than that
    tail: LogTail | None = None
    known: bool = False  # `tail` is the log's


@dataclass(frozen=True)
class Look:
    """A tail to look up, and the number of the last news of it by then."""

    session: SessionName
    told: int


class TailTable:
    """Holders keep a session for good, those who ask keep it for `idle_s`."""

    def __init__(
        self, *, max_sessions: int = MAX_WATCHED_TAILS, idle_s: float = TAIL_IDLE_S
    ) -> None:
        self._max_sessions = max_sessions
        self._idle_s = idle_s
        self._tails: dict[SessionName, _Tail] = {}
        self._numbers = count()
        self._held: dict[SessionName, int] = {}
        self._asked: OrderedDict[SessionName, float] = OrderedDict()  # when last; oldest first
        # Ordered sets of what is to be done, once each.
        self._to_watch: dict[SessionName, None] = {}
        self._to_look: dict[SessionName, None] = {}
        self._to_forget: dict[SessionName, None] = {}

    def __len__(self) -> int:
        return len(self._tails)

    def hold(self, session: SessionName) -> None:
        self._held[session] = self._held.get(session, 0) + 1
        self._add(session)

    def release(self, session: SessionName) -> None:
        self._held[session] -= 1
        if not self._held[session]:
            del self._held[session]
            self._drop(session)

    def ask(self, session: SessionName, now_s: float) -> LogTail | None:
        """The tail, where it is known; otherwise it may be, the next time."""
        tail = self._tails.get(session)
        if tail is None and len(self._tails) >= self._max_sessions:
            return None
        self._asked[session] = now_s
        self._asked.move_to_end(session)
        if tail is None:
            self._add(session)
            return None
        return tail.tail if tail.known else None

    def expire(self, now_s: float) -> None:
        """Nobody asked for them of late."""
        while self._asked:
            session, asked_s = next(iter(self._asked.items()))
            if now_s - asked_s < self._idle_s:
                return
            del self._asked[session]
            self._drop(session)

    # -- what the store says ------------------------------------------------------------------

    def watched(self, session: SessionName) -> None:
        """Every later change will be told: time to look it up."""
        if session in self._tails:
            self._to_look[session] = None

    def told(self, session: SessionName, told: LogTail) -> None:
        """The log's tail is, or was a moment ago, `told`."""
        tail = self._tails.get(session)
        if tail is None:
            return
        tail.told = next(self._numbers)
        if tail.tail is None or _same_life(tail.tail, told):
            tail.tail = _later(told, tail.tail or told)
            return
        if tail.known:  # news of two generations may cross: the log itself says which
            self._to_look[session] = None
        tail.tail, tail.known = told, False

    def looked_up(self, look: Look, found: LogTail | None) -> None:
        """None: there is no such session, and nothing to watch for those who ask."""
        tail = self._tails.get(look.session)
        if tail is None:
            return
        if found is None:
            tail.tail, tail.known = None, False
            if self._asked.pop(look.session, None) is not None:
                self._drop(look.session)
            return
        if tail.told != look.told and tail.tail is not None:
            if not _same_life(tail.tail, found):
                tail.tail, tail.known = found, False
                self._to_look[look.session] = None
                return
            found = _later(found, tail.tail)
        tail.tail, tail.known = found, True

    def lost(self) -> None:
        """The link is gone: whatever changes is not told from here on."""
        for tail in self._tails.values():
            tail.known = False
        self._to_watch = dict.fromkeys(self._tails)
        self._to_look.clear()
        self._to_forget.clear()

    # -- what is to be done -------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        return bool(self._to_watch or self._to_look or self._to_forget)

    def take_watches(self, most: int) -> list[SessionName]:
        return _take(self._to_watch, most)

    def take_looks(self, most: int) -> list[Look]:
        return [Look(one, self._tails[one].told) for one in _take(self._to_look, most)]

    def take_forgets(self, most: int) -> list[SessionName]:
        return _take(self._to_forget, most)

    def check_integrity(self) -> None:
        """Assert what must always hold."""
        assert self._tails.keys() == self._held.keys() | self._asked.keys()
        assert all(count > 0 for count in self._held.values())
        for waiting in (self._to_watch, self._to_look):
            assert waiting.keys() <= self._tails.keys()
        assert not self._to_forget.keys() & self._tails.keys()
        assert not any(tail.known and tail.tail is None for tail in self._tails.values())

    # -- inside -------------------------------------------------------------------------------

    def _add(self, session: SessionName) -> None:
        if session not in self._tails:
            self._tails[session] = _Tail(next(self._numbers))
            self._to_forget.pop(session, None)
            self._to_watch[session] = None

    def _drop(self, session: SessionName) -> None:
        if session in self._held or session in self._asked:
            return
        del self._tails[session]
        self._to_look.pop(session, None)
        if session in self._to_watch:
            del self._to_watch[session]
        else:
            self._to_forget[session] = None


def _same_life(one: LogTail, other: LogTail) -> bool:
    return one.cursor.generation == other.cursor.generation


def _later(one: LogTail, other: LogTail) -> LogTail:
    return one if one.cursor.offset >= other.cursor.offset else other


def _take(waiting: dict[SessionName, None], most: int) -> list[SessionName]:
    taken = [one for one, _ in zip(waiting, range(most), strict=False)]
    for one in taken:
        del waiting[one]
    return taken
