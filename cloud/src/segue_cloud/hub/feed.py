"""Keeps a `TailTable` true: watches sessions at the store, looks their tails up, hears of changes.

While the store's link is well nothing is asked again and again, however many sessions there are;
a beat that goes round through the store says that it is.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Protocol

import structlog

from segue_cloud.hub.tails import TailTable
from segue_cloud.sessions.news import Beat, Changes, LogTail, TailTold, Watched
from segue_cloud.sessions.port import Reading
from segue_contract.errors import SegueError, StoreUnavailable
from segue_contract.ids import SessionName, new_id
from segue_contract.limits import (
    HUB_POLL_SESSIONS,
    SILENCE_S,
    STORE_RETRY_MAX_S,
    TAIL_BEAT_S,
    TAIL_FRESH_S,
    TAIL_NEWS_DELAY_S,
)
from segue_contract.sync.state import Cursor
from segue_contract.transport.together import Together, end

log = structlog.get_logger("segue.hub")


class Followed(Protocol):
    """Who follows held sessions here: the hub."""

    def told(self, session: SessionName, tail: Cursor) -> None: ...

    async def look(self, sessions: Sequence[SessionName]) -> list[LogTail | None]: ...


class TailFeed:
    """`async with TailFeed(store, followed) as feed:`; `followed` is told of tails as they come."""

    def __init__(
        self,
        store: Reading,
        followed: Followed,
        *,
        table: TailTable | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._store = store
        self._followed = followed
        self._table = table or TailTable()
        self._monotonic = monotonic
        self._random_bytes = random_bytes
        self._work = asyncio.Event()  # something is to be watched, looked up or forgotten
        self._needed = asyncio.Event()
        self._news: dict[SessionName, Cursor] = {}
        self._sent: dict[int, float] = {}  # beats on their way round, since when
        self._heard_s = -math.inf  # everything that was told before then has been heard
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> TailFeed:
        self._task = asyncio.create_task(self._run(), name="tail feed")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task is not None:
            await end(self._task)

    @property
    def fresh(self) -> bool:
        """Whatever changed more than a moment ago has been told here."""
        return self._monotonic() - self._heard_s <= TAIL_FRESH_S

    def hold(self, session: SessionName) -> None:
        """Somebody follows it here, until `release`."""
        self._table.hold(session)
        self._to_do()

    def release(self, session: SessionName) -> None:
        self._table.release(session)
        self._to_do()

    async def tails(self, sessions: Sequence[SessionName]) -> list[LogTail | None]:
        """How far each log goes, or went `TAIL_FRESH_S` ago; None where there is no such session.

        Asked for again and again, it costs the store nothing.

        Raises:
            StoreUnavailable.
        """
        now = self._monotonic()
        known = [self._table.ask(session, now) for session in sessions]
        self._to_do()
        if not self.fresh:
            return await self._store.tails(sessions)
        missing = [one for one, tail in zip(sessions, known, strict=True) if tail is None]
        found = iter(await self._store.tails(missing))
        return [tail or next(found) for tail in known]

    def check_integrity(self) -> None:
        self._table.check_integrity()

    # -- the link -----------------------------------------------------------------------------

    async def _run(self) -> None:
        said = False
        while True:
            await self._needed.wait()
            try:
                async with self._store.changes(new_id("hub-", self._random_bytes)) as link:
                    self._table.lost()
                    self._work.set()
                    async with Together() as tasks:
                        tasks.start(self._listen(link), name="tail news")
                        tasks.start(self._keep(link), name="tail watches")
                        tasks.start(self._beat(link), name="tail beats")
            except SegueError as error:
                if not said:
                    log.warning("tails_unknown", error=str(error),
                                hint="They are looked up, a few at a time.")  # fmt: skip
                said = True
            else:
                said = False
            finally:
                self._heard_s = -math.inf
                self._table.lost()
            await asyncio.sleep(STORE_RETRY_MAX_S)

    async def _listen(self, link: Changes) -> None:
        while True:
            match await link.next():
                case TailTold(session, tail):
                    self._table.told(session, tail)
                    if tail.cursor.generation:
                        self._say(session, tail.cursor)
                    else:  # deleted, it says; the log itself shall say so
                        self._work.set()
                case Watched(session):
                    self._table.watched(session)
                    self._work.set()
                case Beat(number):
                    sent_s = self._sent.pop(number, None)
                    if sent_s is not None:
                        self._heard_s = sent_s

    async def _keep(self, link: Changes) -> None:
        """Watch, look up and forget what the table says, some at a time."""
        while True:
            await self._work.wait()
            self._work.clear()
            while self._table.waiting:
                if sessions := self._table.take_forgets(HUB_POLL_SESSIONS):
                    await link.forget(sessions)
                if sessions := self._table.take_watches(HUB_POLL_SESSIONS):
                    await link.watch(sessions)
                if looks := self._table.take_looks(HUB_POLL_SESSIONS):
                    tails = await self._followed.look([look.session for look in looks])
                    for look, tail in zip(looks, tails, strict=True):
                        self._table.looked_up(look, tail)

    async def _beat(self, link: Changes) -> None:
        """Ends, with an error, where what is said here no longer comes back."""
        self._sent.clear()
        began = self._monotonic()
        number = 0
        while True:
            now = self._monotonic()
            self._table.expire(now)
            self._to_do()
            if now - max(self._heard_s, began) > SILENCE_S:
                raise StoreUnavailable("The session store has fallen silent.")
            number += 1
            self._sent[number] = now
            try:
                async with asyncio.timeout(SILENCE_S):
                    await link.beat(number)
            except TimeoutError:
                raise StoreUnavailable("The session store does not answer.") from None
            await asyncio.sleep(TAIL_BEAT_S)

    def _to_do(self) -> None:
        if len(self._table):
            self._needed.set()
        else:
            self._needed.clear()
        if self._table.waiting:
            self._work.set()

    def _say(self, session: SessionName, tail: Cursor) -> None:
        """In a moment: what this process appends itself reaches its followers by then."""
        if not self._news:
            asyncio.get_running_loop().call_later(TAIL_NEWS_DELAY_S, self._say_all)
        self._news[session] = tail

    def _say_all(self) -> None:
        news, self._news = self._news, {}
        for session, tail in news.items():
            self._followed.told(session, tail)
