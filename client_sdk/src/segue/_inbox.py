"""What reached a follower and was not looked at yet: from MQTT, from a gRPC stream, or about them.

Bounded by entries and by their bytes. Beyond a bound everything that waits is dropped and one
`Overflow` stands for it: the reader then asks the log, which has it all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from types import UnionType
from typing import TypeAlias

from segue_contract.limits import FOLLOWER_QUEUE_BYTES, FOLLOWER_QUEUE_ENTRIES
from segue_contract.sync.state import Cursor


@dataclass(frozen=True, slots=True)
class RawEntry:
    """A log entry as it came: `op` is not decoded yet."""

    generation: int
    offset: int
    op: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    entries: tuple[RawEntry, ...]
    mqtt: bool = False  # who brought it: the broker, or a gRPC stream

    @property
    def bytes(self) -> int:
        return sum(len(entry.op) for entry in self.entries)

    @property
    def places(self) -> int:
        """In a queue: an empty one takes one, too."""
        return max(len(self.entries), 1)


@dataclass(frozen=True, slots=True)
class Head:
    """The log reaches at least up to `cursor`. `urgent`: nothing else will bring it."""

    cursor: Cursor
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """MQTT delivers from now on, or does not."""

    up: bool


@dataclass(frozen=True, slots=True)
class Tail:
    """The log itself says that it reaches to `cursor`, and whether the broker is told of more.

    `digest`: the log's there. `known`: the follower's cursor as it asked.
    """

    cursor: Cursor
    publishing: bool
    digest: bytes = b""
    known: Cursor = field(default_factory=Cursor)


@dataclass(frozen=True, slots=True)
class StreamLost:
    """The gRPC stream number `number` ended."""

    number: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Overflow:
    pass


@dataclass(frozen=True, slots=True)
class Closed:
    """The client or the follower was closed."""


Item: TypeAlias = Batch | Head | Link | Tail | StreamLost | Overflow | Closed


class Inbox:
    """Many writers, one reader, one event loop."""

    def __init__(
        self, max_entries: int = FOLLOWER_QUEUE_ENTRIES, max_bytes: int = FOLLOWER_QUEUE_BYTES
    ) -> None:
        self._items: deque[Item] = deque()
        self._entries = self._bytes = 0
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._filled = asyncio.Event()

    def put(self, item: Item) -> None:
        if isinstance(item, Batch):
            self._entries += item.places
            self._bytes += item.bytes
        elif isinstance(item, Head):
            item = self._merged(item)
        elif isinstance(item, Link | Tail | Overflow):
            self._drop(type(item))
        self._items.append(item)
        if self._entries > self._max_entries or self._bytes > self._max_bytes:
            self._drop(Batch | Head | Overflow)
            self._items.append(Overflow())
            self._entries = self._bytes = 0
        self._filled.set()

    async def get(self, timeout_s: float | None) -> Item | None:
        """The oldest item; None when `timeout_s` passed without one."""
        while not self._items:
            self._filled.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._filled.wait()
            except TimeoutError:
                return None
        item = self._items.popleft()
        if isinstance(item, Batch):
            self._entries -= item.places
            self._bytes -= item.bytes
        return item

    def check_integrity(self) -> None:
        """Assert what must always hold."""
        batches = [item for item in self._items if isinstance(item, Batch)]
        assert self._entries == sum(one.places for one in batches) <= self._max_entries
        assert self._bytes == sum(one.bytes for one in batches) <= self._max_bytes
        for kind in (Link, Tail, Overflow, Head):
            assert sum(isinstance(item, kind) for item in self._items) <= 1, kind

    def _merged(self, head: Head) -> Head:
        """Of several heads the last one says it all."""
        last = next((item for item in self._items if isinstance(item, Head)), None)
        if last is None:
            return head
        self._drop(Head)
        same = last.cursor.generation == head.cursor.generation
        cursor = max(last.cursor, head.cursor) if same else head.cursor
        return Head(cursor, last.urgent or head.urgent)

    def _drop(self, kinds: type | UnionType) -> None:
        """Only the last word counts: a reader that sleeps must not find one for each second."""
        if any(isinstance(item, kinds) for item in self._items):
            self._items = deque(item for item in self._items if not isinstance(item, kinds))
