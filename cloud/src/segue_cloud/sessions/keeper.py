"""Whole sessions on Redis or Valkey: listed, deleted, made of an export. See `keep.lua`."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

from segue_cloud.sessions import scripts
from segue_cloud.sessions.keys import SessionKeys, active_key, active_shard, index_key
from segue_cloud.sessions.known import Part, known_fields, known_turns
from segue_cloud.sessions.scripts import Command
from segue_cloud.sessions.whole import (
    Deleted,
    SessionImport,
    SessionSummary,
    Shown,
    all_shown,
)
from segue_cloud.sessions.wire import Wire
from segue_contract.errors import InvalidArgument, SessionBusy, SessionNotEmpty
from segue_contract.ids import SessionName
from segue_contract.limits import (
    DELETED_MEMORY_S,
    EXPIRE_INTERVAL_S,
    IMPORT_STAGE_S,
    KIB,
    LIST_LOOKED,
    MAX_APPEND_OPS,
    MAX_COUNT,
    MIB,
)
from segue_contract.sync.chain import chained
from segue_contract.sync.state import Cursor

KEEP = scripts.load("keep.lua")

_LATER_STEP = 1024  # entries of a list, where the caller may not see many of them
_STAGE_BYTES = 256 * KIB  # of one command: no other session waits longer for the store than that
_AFTER = re.compile(r"(\d{1,16})(?::(.+)|\+(\d{1,16}))")


class SessionKeeper:
    """`Keeping` of `segue_cloud.sessions.whole`."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    async def list_sessions(
        self, tenant: str, max_sessions: int, after: str = "", shown: Shown = all_shown
    ) -> tuple[list[SessionSummary], str]:
        most = max(max_sessions, 1)
        names, following = await self._page(tenant, most, after, shown)
        if not names:
            return [], following
        sessions = [SessionName(tenant, name) for name in names]
        found = [one for one in await self._summaries(sessions) if one is not None]
        return sorted(found, key=lambda one: (-one.updated_ms, one.session)), following

    async def summary(self, session: SessionName) -> SessionSummary | None:
        return (await self._summaries([session]))[0]

    async def deleted(self, sessions: Sequence[SessionName]) -> set[SessionName]:
        if not sessions:
            return set()
        rows = await self._wire.call_each(*(self._call(one, "past") for one in sessions))
        return {one for one, (_, gone) in zip(sessions, rows, strict=True) if gone}

    # -- deletion -----------------------------------------------------------------------------

    async def delete(self, session: SessionName, idle_s: float | None = None) -> Deleted:
        idle = "" if idle_s is None else int(idle_s * 1000)
        verb = self._call(session, "delete", idle, int(DELETED_MEMORY_S * 1000))
        ((status, used_ms, turn),) = await self._wire.call(verb)
        if status == b"busy":
            raise SessionBusy(
                f"A turn runs in the session {session.session}.",
                hint="Stop it, or wait for its end; then delete the session.",
                turn=turn.decode(),
            )
        index = index_key(session.tenant)
        if status == b"used":  # somebody opened it since it was listed as old
            at_ms = max(used_ms, _now_ms() - int((idle_s or 0.0) * 1000) + _MARGIN_MS)
            await self._wire.call(("ZADD", index, "XX", at_ms, session.session))
            return Deleted.USED
        # Whoever opened it anew between the two commands named it before, and is named again.
        await self._wire.call(("ZREM", index, session.session))
        (there,) = await self._wire.call(("EXISTS", SessionKeys.of(session).meta))
        if there:
            await self._wire.call(("ZADD", index, "NX", _now_ms(), session.session))
        return Deleted.YES if status == b"ok" else Deleted.MISSING

    async def oldest(self, tenant: str, idle_s: float, most: int) -> list[SessionName]:
        until_ms = _now_ms() - int(idle_s * 1000)
        (names,) = await self._wire.call(
            ("ZRANGEBYSCORE", index_key(tenant), "-inf", until_ms, "LIMIT", 0, most)
        )
        return [SessionName(tenant, name.decode()) for name in names]

    async def postpone(self, session: SessionName) -> None:
        await self._wire.call(("ZADD", index_key(session.tenant), "XX", _now_ms(), session.session))

    # -- imports ------------------------------------------------------------------------------

    async def latest_generation(self, session: SessionName) -> int:
        ((latest, _),) = await self._wire.call(self._call(session, "past"))
        return int(latest)

    async def make(self, session: SessionName, made: SessionImport, nonce: str) -> Cursor:
        keys = SessionKeys.of(session)
        staged = keys.staged(nonce)
        kept_ms = int(IMPORT_STAGE_S * 1000)
        for first, page in _pages(made.first, made.ops):
            await self._wire.call(
                KEEP.call((*keys.all, staged.log), "stage", made.generation, first, kept_ms, *page)
            )
        for start in range(0, len(made.state), _STAGE_BYTES):
            piece = made.state[start : start + _STAGE_BYTES]
            await self._wire.call(
                ("SETRANGE", staged.snapshot, start, piece), ("PEXPIRE", staged.snapshot, kept_ms)
            )
        await self._stage_meta(staged, made, kept_ms)
        before_fold = sum(map(len, made.ops[: max(made.folded - made.first + 1, 0)]))
        # Named first, as for any session: see keys.py.
        shard = active_key(active_shard(session))
        now_ms = _now_ms()
        await self._wire.call(
            ("ZADD", index_key(session.tenant), "NX", now_ms, session.session),
            ("ZADD", shard, now_ms, str(session)),
        )
        ((status, tail),) = await self._wire.call(
            KEEP.call(
                (*keys.all, *staged.all), "commit", made.generation, made.tail, made.folded,
                sum(map(len, made.ops)), before_fold, nonce,
            )
        )  # fmt: skip
        if status == b"ok":
            return Cursor(made.generation, int(tail))
        await self._wire.call(("UNLINK", *staged.all))
        if status == b"taken":
            raise SessionNotEmpty(
                f"The session {session.session} has entries.",
                hint="Import into another name, or delete it first.",
            )
        raise SessionBusy(
            f"The session {session.session} was opened while it was imported.",
            hint="Import it again.",
        )

    async def _stage_meta(self, staged: SessionKeys, made: SessionImport, kept_ms: int) -> None:
        # As a follower of the empty session makes it. Of what was folded nobody has a digest.
        digest = reduce(chained, made.ops, b"")
        fields: list[Part] = [
            "title", made.title, "mx", max(map(len, made.ops), default=1), "ck", digest,
            *known_fields(made.session),
        ]  # fmt: skip
        for start in range(0, len(fields), 1024):
            await self._wire.call(
                ("HSET", staged.meta, *fields[start : start + 1024]),
                ("PEXPIRE", staged.meta, kept_ms),
            )
        if scores := known_turns(made.session):
            await self._wire.call(
                ("ZADD", staged.turns, *scores), ("PEXPIRE", staged.turns, kept_ms)
            )

    # -- inside -------------------------------------------------------------------------------

    async def count(self, tenant: str) -> int:
        (found,) = await self._wire.call(("ZCARD", index_key(tenant)))
        return int(found)

    async def _page(
        self, tenant: str, most: int, after: str, shown: Shown
    ) -> tuple[list[str], str]:
        """Names behind the place `after`, newest first, and the place behind the last of them.

        By score and not by rank: sessions that come to the front meanwhile move nothing.
        """
        place = _Place.read(after)
        found: list[tuple[int, str]] = []
        looked = place.passed  # of those from its score on
        last, passed = place.score, place.passed  # where we are, and how many of that score we saw
        step = most + 1
        while True:
            (row,) = await self._wire.call(
                ("ZRANGE", index_key(tenant), place.score, "-inf", "BYSCORE", "REV",
                 "LIMIT", looked, step, "WITHSCORES")
            )  # fmt: skip
            pairs = [
                (int(float(at)), one.decode()) for one, at in zip(row[::2], row[1::2], strict=True)
            ]
            for score, name in pairs:
                passed = passed + 1 if str(score) == last else 1
                last = str(score)
                # Of equal scores Redis gives the greater name first.
                behind = not place.name or (score, name) < (int(place.score), place.name)
                if behind and shown(name):
                    found.append((score, name))
            looked += len(pairs)
            if len(found) > most:
                at, name = found[most - 1]
                return [one for _, one in found[:most]], f"{at}:{name}"
            if len(pairs) < step:
                return [one for _, one in found], ""
            if looked - place.passed >= LIST_LOOKED:  # nobody else waits for a long list
                return [one for _, one in found], f"{last}+{passed}"
            step = max(step, _LATER_STEP)

    async def _summaries(self, sessions: Sequence[SessionName]) -> list[SessionSummary | None]:
        fields = ("gen", "tail", "u", "title", "n", "cur")
        rows = await self._wire.call_each(
            *(("HMGET", SessionKeys.of(one).meta, *fields) for one in sessions)
        )
        return [
            _summary(session.session, row) if row[0] is not None else None
            for session, row in zip(sessions, rows, strict=True)
        ]

    def _call(self, session: SessionName, verb: str, *args: str | bytes | int) -> Command:
        return KEEP.call(SessionKeys.of(session).all, verb, *args)


_MARGIN_MS = int(EXPIRE_INTERVAL_S * 1000)  # clocks differ: then the next sweep looks again


def _now_ms() -> int:
    return int(time.time() * 1000)


class _Place(NamedTuple):
    """Behind a session of that score and name; or behind the first `passed` of that score, where
    the last one that was looked at is not for the caller to know."""

    score: str
    name: str = ""
    passed: int = 0

    @classmethod
    def read(cls, after: str) -> _Place:
        """Raises InvalidArgument."""
        if not after:
            return cls("+inf")
        found = _AFTER.fullmatch(after)
        if found is None or max(int(found[1]), int(found[3] or 0)) > MAX_COUNT:
            raise InvalidArgument(
                "This is no place in the list of sessions.", hint="Use `next` of the page before."
            )
        return cls(found[1], found[2] or "", int(found[3] or 0))


def _summary(session: str, row: list[Any]) -> SessionSummary:
    generation, tail, updated, title, turns, running = row
    return SessionSummary(
        session=session,
        cursor=Cursor(int(generation), int(tail)),
        updated_ms=int(updated),
        title=title.decode(),
        turns=int(turns),
        running_turn=running.decode(),
    )


def _pages(first: int, ops: Sequence[bytes]) -> list[tuple[int, Sequence[bytes]]]:
    """Ops in pages of some `MIB` and MAX_APPEND_OPS, each with its first offset."""
    pages: list[tuple[int, Sequence[bytes]]] = []
    start = size = 0
    for place, op in enumerate(ops):
        if place > start and (size + len(op) > MIB or place - start == MAX_APPEND_OPS):
            pages.append((first + start, ops[start:place]))
            start, size = place, 0
        size += len(op)
    if start < len(ops):
        pages.append((first + start, ops[start:]))
    return pages
