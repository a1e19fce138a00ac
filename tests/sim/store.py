"""A store that can crash, fail over, stand still, refuse and forget; and connections to it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import sha1
from typing import Any

import hiredis
from redis._parsers.base import BaseParser
from redis.exceptions import ConnectionError as LinkError

from tests.sim.lua import Scripts
from tests.sim.network import End
from tests.sim.process import Process, current
from tests.sim.redis_model import COMMANDS, WRITES, Keyspace, Reply, ReplyError, Status
from tests.sim.world import EPOCH_S, World

ADDRESS = "store:6379"
URL = f"redis://{ADDRESS}"
_SCRIPTS = Scripts()  # compiled once for all runs; it keeps nothing of any

Unit = list[tuple[bytes, ...]]
# Told of each command that changed something, and of the state being put back to an earlier one.
Observer = Callable[[Process | None, tuple[bytes, ...]], None]


class Store:
    """One address at which a primary answers; a replica is its past.

    Attributes:
        space: what the primary holds now.
        life: counts the lives; a new one begins with each restart and fail-over.
        refusal: the error that every write is answered with, "" where it is taken.
        away: the error that every command is answered with, "" where it is served.
        evicts: keys may go at any time (a wrong maxmemory-policy).
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.life = 0
        self.refusal = self.away = ""
        self.skew_s = 0.0  # of the server's clock
        self.wrote: list[Observer] = []
        self.changed: list[Callable[[str], None]] = []
        self._rng = world.rng("store")
        self._units: list[Unit] = []
        self._unit: Unit = []
        self._sources: dict[bytes, str] = {}
        self._client: Process | None = None
        self._listening: dict[bytes, dict[End, None]] = {}  # by channel
        self.space = self._new_space()
        self.process: Process
        self._begin_life()

    # -- faults -------------------------------------------------------------------------------

    def restart(self, down_s: float, *, lose: int = 0, why: str = "restart") -> None:
        """Killed, and back after `down_s` without the last `lose` writes."""
        self.process.kill()
        kept = self._units[: max(len(self._units) - lose, 0)]
        lost = len(self._units) - len(kept)
        self.world.say("store", why, {"lost": lost, "down_s": down_s})
        self._units = kept
        self.space = self._new_space()
        for unit in kept:
            for command in unit:
                self.space.execute(*command)
        for told in self.changed:
            told(why)
        self._sources.clear()
        self.world.loop.call_later(
            down_s, self._begin_life, context=self.world.network._outside.copy()
        )

    def stall(self) -> None:
        self.world.say("store", "stall")
        self.process.pause()

    def go_on(self) -> None:
        self.process.resume()

    def evict(self, keys: Sequence[bytes]) -> None:
        """As a store under memory pressure does, replicas and file included."""
        gone = [key for key in keys if key in self.space.values]
        if gone:
            self.world.say("store", "evict", gone)
            self.space.execute(b"DEL", *gone)
            self._units.append(self._unit)
            self._unit = []
            for told in self.changed:
                told("evict")

    @property
    def writes(self) -> int:
        return len(self._units)

    # -- serving ------------------------------------------------------------------------------

    def _new_space(self) -> Keyspace:
        space = Keyspace(COMMANDS, lambda: EPOCH_S + self.world.now_s + self.skew_s, self._note)
        space.info = dict(getattr(self, "_info", {}))
        space.published = self._publish
        return space

    def _begin_life(self) -> None:
        self.life += 1
        self.refusal = self.away = ""
        self._listening.clear()
        self._info = {
            "redis_version": "7.2.4",
            "role": "master",
            "run_id": self._rng.randbytes(20).hex(),
            "master_replid": self._rng.randbytes(20).hex(),
            "connected_slaves": "0",
            "loading": "0",
            "maxmemory": "0",
            "maxmemory_policy": "noeviction",
        }
        self.space.info = dict(self._info)
        self.process = self.world.process("store")
        self.world.network.listen(self.process, ADDRESS, self._accept)

    def _accept(self, end: End) -> None:
        end.on_message = lambda batch: end.send(self._serve(end, batch))

    def _serve(self, end: End, batch: Sequence[tuple[bytes, ...]]) -> list[Any]:
        self._client = end.peer.process
        replies: list[Any] = []
        for command in batch:
            if command[0] in (b"SUBSCRIBE", b"UNSUBSCRIBE") and not self.away:
                replies += [self._subscribe(end, command[0], channel) for channel in command[1:]]
                continue
            try:
                replies.append(self._execute(command))
            except ReplyError as error:
                replies.append(error)
        self._client = None
        return replies

    def _subscribe(self, end: End, how: bytes, channel: bytes) -> list[Any]:
        listening = self._listening.setdefault(channel, {})
        if how == b"SUBSCRIBE":
            listening[end] = None
        else:
            listening.pop(end, None)
        return [how.lower(), channel, 1]

    def _publish(self, channel: bytes, message: bytes) -> int:
        listening = [end for end in self._listening.get(channel, ()) if end.open]
        self._listening[channel] = dict.fromkeys(listening)
        for end in listening:
            end.send([[b"message", channel, message]])
        return len(listening)

    def _execute(self, command: tuple[bytes, ...]) -> Reply:
        """One command, or one script with all that it writes, as one unit."""
        self._unit = []
        try:
            return self._run(command)
        finally:
            if self._unit:
                self._units.append(self._unit)
                self._unit = []

    def _run(self, command: tuple[bytes, ...]) -> Reply:
        name = command[0].upper()
        if self.away:
            raise ReplyError(self.away)
        if name == b"SCRIPT":
            digest = sha1(command[2], usedforsecurity=False).hexdigest().encode()
            self._sources[digest] = command[2].decode()
            return digest
        if name in (b"CLIENT", b"SELECT"):
            return Status(b"OK")
        if name not in (b"EVALSHA", b"EVAL"):
            if self.refusal and name in WRITES:
                raise ReplyError(self.refusal)
            return self.space.execute(*command)
        source = self._sources.get(command[1]) if name == b"EVALSHA" else command[1].decode()
        if source is None:
            raise ReplyError("NOSCRIPT No matching script.")
        keys = int(command[2])
        args = command[3 + keys :]
        if self.refusal:  # Redis refuses a script when it tries to write
            return _SCRIPTS.run(_Refusing(self), source, command[3 : 3 + keys], args)
        return _SCRIPTS.run(self.space, source, command[3 : 3 + keys], args)

    def _note(self, command: tuple[bytes, ...]) -> None:
        self._unit.append(command)
        for told in self.wrote:
            told(self._client, command)


class _Refusing(Keyspace):
    """What a script sees of a store that takes no writes."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def execute(self, *command: bytes) -> Reply:
        if command[0].upper() in WRITES:
            raise ReplyError(self._store.refusal)
        return self._store.space.execute(*command)


class Connection:
    """As `redis.asyncio.connection.Connection`, as far as the product's wire uses it."""

    def __init__(self, world: World, **options: Any) -> None:
        self._world = world
        self._end: End | None = None
        self._replies: deque[Any] = deque()
        self._reader: asyncio.Future[None] | None = None

    @property
    def is_connected(self) -> bool:
        return self._end is not None and self._end.open

    async def connect(self) -> None:
        if self.is_connected:
            return
        process = current()
        assert process is not None
        try:
            self._end = await self._world.network.connect(process, ADDRESS)
        except ConnectionRefusedError as error:
            raise LinkError(str(error)) from error
        self._replies.clear()
        self._end.on_message = self._took
        self._end.on_lost = lambda: self._took([LinkError("Connection lost.")])

    def _took(self, replies: list[Any]) -> None:
        self._replies.extend(replies)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    async def send_packed_command(self, packed: list[bytes], **_: Any) -> None:
        if not self.is_connected or self._end is None:
            raise LinkError("Connection lost.")
        reader = hiredis.Reader()
        reader.feed(b"".join(packed))
        self._end.send([tuple(reader.gets()) for _ in packed])

    async def read_response(self, **_: Any) -> Any:
        while not self._replies:
            self._reader = self._world.loop.create_future()
            await self._reader
        reply = self._replies.popleft()
        if isinstance(reply, LinkError):
            raise reply
        if isinstance(reply, ReplyError):
            raise BaseParser.parse_error(str(reply))
        return bytes(reply) if isinstance(reply, Status) else reply

    async def can_read(self, **_: Any) -> bool:
        return bool(self._replies) or not self.is_connected

    async def disconnect(self, **_: Any) -> None:
        end, self._end = self._end, None
        if end is not None:
            end.close()
