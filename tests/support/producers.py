"""Producers as tests need them: registered once per session, by name."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakKeyDictionary

from segue_cloud.sessions.port import OpenedSession, Producer
from segue_contract.ids import SessionName


class Opens(Protocol):
    async def open_session(self, session: SessionName, *, producer: str = "") -> OpenedSession: ...


_epochs: WeakKeyDictionary[Opens, dict[tuple[SessionName, str], int]] = WeakKeyDictionary()


async def producer(at: Opens, session: SessionName, name: str, first_seq: int) -> Producer:
    """Of the store or log `at`; the first call for a name opens the session as that producer."""
    known = _epochs.setdefault(at, {})
    if (session, name) not in known:
        known[session, name] = (await at.open_session(session, producer=name)).epoch
    return Producer(name, known[session, name], first_seq)
