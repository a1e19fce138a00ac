"""The data of one server, and how a command finds its values and reads its arguments."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

Reply: TypeAlias = Any
Args: TypeAlias = Sequence[bytes]
Id: TypeAlias = tuple[int, int]


class ReplyError(Exception):
    """An error reply; its text begins with the error's code."""


class Status(bytes):
    """A status reply, such as +OK."""


OK = Status(b"OK")
WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"
SYNTAX = "ERR syntax error"
_NO_INTEGER = "ERR value is not an integer or out of range"
_NO_FLOAT = "ERR value is not a valid float"


class Stream:
    def __init__(self) -> None:
        self.ids: list[Id] = []
        self.entries: dict[Id, list[bytes]] = {}
        self.last: Id = (0, 0)


class SortedSet:
    def __init__(self) -> None:
        self.scores: dict[bytes, float] = {}
        self.order: list[tuple[float, bytes]] = []

    def put(self, member: bytes, score: float) -> bool:
        """True where it is new."""
        old = self.scores.get(member)
        if old is not None:
            if old == score:
                return False
            self._out(member, old)
        self.scores[member] = score
        insort(self.order, (score, member))
        return old is None

    def remove(self, member: bytes) -> bool:
        score = self.scores.pop(member, None)
        if score is None:
            return False
        self._out(member, score)
        return True

    def _out(self, member: bytes, score: float) -> None:
        del self.order[bisect_left(self.order, (score, member))]


class Keyspace:
    """The data of one server.

    Args:
        commands: by name, in capitals.
        now: the server's clock, seconds since the epoch.
        wrote: told every command that changed something, as what replicas and the append-only
            file get.
    """

    def __init__(
        self,
        commands: Mapping[bytes, Handler],
        now: Callable[[], float],
        wrote: Callable[[tuple[bytes, ...]], None] = lambda command: None,
    ) -> None:
        self.values: dict[bytes, Any] = {}
        self.info: dict[str, str] = {}
        self.replicas = 0
        self.config: dict[str, str] = {"maxmemory-policy": "noeviction", "maxmemory": "0"}
        self.published: Callable[[bytes, bytes], int] = lambda channel, message: 0
        self._commands = commands
        self._now = now
        self._wrote = wrote

    def execute(self, *command: bytes) -> Reply:
        """Raises ReplyError."""
        name = command[0].upper()
        handler = self._commands.get(name)
        if handler is None:
            raise ReplyError(f"ERR unknown command '{command[0].decode(errors='replace')}'")
        run, least, most, writes = handler
        count = len(command) - 1
        if not least <= count <= most:
            shown = name.decode().lower()
            raise ReplyError(f"ERR wrong number of arguments for '{shown}' command")
        reply = run(self, command[1:])
        if writes:
            self._wrote(command)
        return reply

    # -- places -------------------------------------------------------------------------------

    def find(self, key: bytes, kind: type) -> Any:
        value = self.values.get(key)
        if value is not None and type(value) is not kind:
            raise ReplyError(WRONG_TYPE)
        return value

    def make(self, key: bytes, kind: type) -> Any:
        value = self.find(key, kind)
        if value is None:
            value = self.values[key] = kind()
        return value

    def drop_empty(self, key: bytes) -> None:
        value = self.values.get(key)
        empty = value.scores == {} if isinstance(value, SortedSet) else value == {}
        if empty:
            del self.values[key]

    def time(self) -> tuple[int, int]:
        micros = int(self._now() * 1_000_000)
        return micros // 1_000_000, micros % 1_000_000


def integer(data: bytes) -> int:
    text = data.decode("latin-1")
    try:
        value = int(text)
    except ValueError:
        raise ReplyError(_NO_INTEGER) from None
    if str(value) != text or not -(2**63) <= value < 2**63:
        raise ReplyError(_NO_INTEGER)
    return value


def number(data: bytes) -> float:
    try:
        value = float(data)
    except ValueError:
        raise ReplyError(_NO_FLOAT) from None
    if math.isnan(value) or data.strip() != data:
        raise ReplyError(_NO_FLOAT)
    return value


def score_text(score: float) -> bytes:
    if score == math.inf:
        return b"inf"
    if score == -math.inf:
        return b"-inf"
    if score == int(score) and abs(score) < 1e17:
        return b"%d" % int(score)
    return f"{score:.17g}".encode() if float(repr(score)) != score else repr(score).encode()


# Its function, the least and the most arguments, whether it writes.
Handler: TypeAlias = tuple[Callable[[Keyspace, Args], Reply], int, int, bool]
ANY = 10_000  # arguments
