"""The model of the store answers as a real Valkey does: plain commands, and the log's script."""

from __future__ import annotations

import contextlib
import time
from random import Random
from typing import Any

import pytest
from redis._parsers.base import BaseParser
from redis.asyncio.connection import Connection, parse_url
from redis.exceptions import ResponseError

from segue_cloud.sessions import store as product
from segue_cloud.sessions.port import Producer, TurnHold
from segue_contract.errors import SegueError
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.sync.state import Cursor
from tests.sim.lua import Scripts
from tests.sim.redis_model import COMMANDS, Keyspace, ReplyError, Status

# The script's clock, read from a key, so that both sides see the same time.
_CLOCK = b"sim:clock"
_TIME = "redis.call('HMGET', 'sim:clock', 's', 'us')"
_COMMANDS = 1500
_VERBS = 700


class Both:
    """Sends a command to a real server and to the model, and compares the replies."""

    def __init__(self, real: Connection) -> None:
        self.real = real
        self.model = Keyspace(COMMANDS, time.time)
        self.scripts = Scripts()
        self.sources: dict[bytes, str] = {}

    async def send(self, *command: Any) -> Any:
        packed = [part if isinstance(part, bytes) else str(part).encode() for part in command]
        await self.real.send_command(*packed)
        try:
            real = await self.real.read_response()
        except ResponseError as error:
            real = error
        try:
            model = self._execute(packed)
        except ReplyError as error:
            model = BaseParser.parse_error(str(error))
        if isinstance(real, Exception):
            assert isinstance(model, ResponseError), (command, real, model)
            assert type(real) is type(model), (command, real, model)
        else:
            assert _plain(real) == _plain(model), (command, real, model)
        return real

    def _execute(self, packed: list[bytes]) -> Any:
        if packed[0] == b"EVAL":
            keys = int(packed[2])
            return self.scripts.run(
                self.model, packed[1].decode(), packed[3 : 3 + keys], packed[3 + keys :]
            )
        return self.model.execute(*packed)

    async def compare_keys(self) -> None:
        await self.real.send_command("KEYS", "*")
        keys = await self.real.read_response()
        assert sorted(keys) == sorted(self.model.values)
        for key in sorted(keys):
            kind = _plain(await self.send("TYPE", key))
            read: dict[bytes, tuple[Any, ...]] = {
                b"string": ("GET", key),
                b"hash": ("HGETALL", key),
                b"zset": ("ZRANGE", key, 0, -1, "WITHSCORES"),
                b"stream": ("XRANGE", key, "-", "+"),
            }
            if kind == b"hash":  # in no order
                await self.real.send_command("HGETALL", key)
                flat = await self.real.read_response()
                assert dict(zip(flat[::2], flat[1::2], strict=True)) == self.model.values[key]
            else:
                await self.send(*read[kind])


def _plain(reply: Any) -> Any:
    if isinstance(reply, Status):
        return bytes(reply)
    return [_plain(one) for one in reply] if isinstance(reply, list) else reply


@pytest.fixture
async def both(valkey: Valkey) -> Any:
    options = dict(parse_url(valkey.url))
    connection = Connection(**options, protocol=2)
    await connection.connect()
    yield Both(connection)
    await connection.disconnect()


def _command(rng: Random) -> list[Any]:
    """One of the commands that are modelled, right or nearly right."""

    def key(kind: str) -> str:
        return f"{kind}{rng.randrange(2)}" if rng.random() < 0.97 else rng.choice("shzx") + "0"

    def member() -> str:
        return rng.choice(["a", "b", "c", "", "7"])

    def count() -> int:
        return rng.randrange(-4, 5)

    def score() -> Any:
        return rng.choice([0, 1, 2, -3, 1.5, 1e15, 1795000000123, "inf", "-inf", "(1", "x"])

    def entry() -> str:
        one = f"{rng.randrange(4)}-{rng.randrange(6)}"
        return rng.choice([one, one, one, "1", "x"])

    def end() -> str:
        return rng.choice(["-", "+", entry(), "(" + entry()])

    s, h, z, x = key("s"), key("h"), key("z"), key("x")
    few = rng.randrange(1, 4)
    some = [member() for _ in range(few)]
    zadd = rng.sample(["NX", "XX", "GT", "LT", "CH"], rng.choice([0, 0, 0, 1, 2]))
    limit = ["LIMIT", count(), count()] if rng.random() < 0.3 else []
    scores = ["WITHSCORES"] if rng.random() < 0.4 else []
    counted = ["COUNT", rng.randrange(0, 4)] if rng.random() < 0.5 else []
    return rng.choice(
        [
            ["SET", s, member(), *rng.choice([[], [], ["NX"], ["XX"], ["NX", "XX"]])],
            ["GET", s],
            ["STRLEN", s],
            ["EXISTS", s, h],
            ["DEL", rng.choice([s, h, z, x])],
            ["UNLINK", rng.choice([s, h, z, x])],
            ["TYPE", rng.choice([s, h, z, x])],
            ["HSET", h, *[part for one in some for part in (one, member())]],
            ["HSET", h, member()],
            ["HSETNX", h, member(), member()],
            ["HGET", h, member()],
            ["HMGET", h, *some],
            ["HDEL", h, *some],
            ["HLEN", h],
            ["HEXISTS", h, member()],
            ["HINCRBY", h, member(), rng.choice([1, -5, 0, "x", "01", 2**62])],
            ["ZADD", z, *zadd, *[part for one in some for part in (score(), one)]],
            ["ZADD", z, "1"],
            ["ZSCORE", z, member()],
            ["ZCARD", z],
            ["ZREM", z, *some],
            ["ZRANK", z, member()],
            ["ZRANGE", z, count(), count(), *rng.choice([[], ["REV"]]), *scores],
            ["ZRANGE", z, score(), score(), "BYSCORE", *limit, *scores],
            ["ZRANGE", z, score(), score(), "BYSCORE", "REV", *limit],
            ["ZRANGE", z, 0, -1, *limit],
            ["ZREVRANGE", z, count(), count(), *scores],
            ["ZRANGEBYSCORE", z, score(), score(), *scores, *limit],
            ["ZCOUNT", z, score(), score()],
            ["ZREMRANGEBYSCORE", z, score(), score()],
            ["ZREMRANGEBYRANK", z, count(), count()],
            ["XADD", x, entry(), *[part for one in some for part in (one, member())]],
            ["XADD", x, f"{rng.randrange(3, 9)}-{rng.randrange(1, 999)}", "o", member()],
            ["XADD", x, entry(), "o"],
            ["XRANGE", x, end(), end(), *counted],
            ["XREVRANGE", x, end(), end(), *counted],
            ["XLEN", x],
            ["XDEL", x, entry()],
            ["XTRIM", x, *rng.choice([["MINID"], ["MINID", "="]]), entry()],
            ["XTRIM", x, "MAXLEN", count()],
            ["PING"],
            ["EVAL", "return {redis.call('HGET', KEYS[1], 'a'), 1.9, true, false, 3}", 1, h],
            ["EVAL", "return redis.pcall('HSET', KEYS[1], 'n', ARGV[1] * 3)", 1, h, 4.5],
            ["EVAL", "return redis.sha1hex(ARGV[1])", 0, "a"],
            ["EVAL", "return 10^15 .. ''", 0],
            ["EVAL", "return redis.call('SET', KEYS[1], 10^15)", 1, s],
            ["EVAL", "redis.call('SET', KEYS[1], 'kept') return redis.call('HGET')", 1, s],
            ["EVAL", "return redis.status_reply('FINE')", 0],
            ["EVAL", "return redis.error_reply('WRONG it is')", 0],
            ["EVAL", "return {1, 2, nil, 4}", 0],
            ["EVAL", "return nothing_such", 0],
        ]
    )


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_model_answers_plain_commands_as_valkey(both: Both, seed: int) -> None:
    print("seed", seed)
    rng = Random(seed)
    for _ in range(_COMMANDS):
        await both.send(*_command(rng))
    await both.compare_keys()


class BothWires:
    """As `Wire`, over both: what the product's store asks and what it is answered."""

    def __init__(self, both: Both) -> None:
        self._both = both
        self._sources = {one.digest: _with_our_clock(one.source) for one in product.SCRIPTS}

    async def call(self, *commands: Any, replicas: Any = None) -> list[Any]:
        return [await self._one(*command) for command in commands]

    call_each = call

    async def _one(self, name: str, *args: Any) -> Any:
        if name == "TIME":
            return await self._both.send("HMGET", _CLOCK, "s", "us")
        if name == "EVALSHA":
            return await self._both.send("EVAL", self._sources[args[0]], *args[1:])
        return await self._both.send(name, *args)


def _with_our_clock(source: str) -> str:
    changed = source.replace("redis.call('TIME')", _TIME)
    assert changed != source, "the script reads the clock in another way"
    # Two servers have two lives; what comes of another one is for the whole simulation.
    return changed.replace("redis.pcall('INFO', 'replication')", "'master_replid:1'")


async def _verb(store: product.RedisStore, rng: Random, memory: dict[str, Any]) -> None:
    """One call of the product's store, with arguments that are right, repeated, or too old."""
    session = SessionName("default", rng.choice(["a", "b"]))
    turn = f"t{rng.randrange(6)}"
    device = rng.choice(["phone", "laptop"])
    held = memory.get(f"{session}{turn}") or TurnHold(turn, rng.randrange(1, 3), "other")
    ops = [rng.randbytes(rng.randrange(1, 40)) for _ in range(rng.randrange(1, 4))]
    writer = f"{session}{device}"
    producer = Producer(device, memory.get(writer, 1), rng.randrange(1, 8))
    match rng.randrange(14):
        case 0 | 1:
            opened = await store.open_session(
                session, must_exist=rng.random() < 0.3, device=device, producer=device
            )
            memory[writer] = opened.epoch
        case 2 | 3 | 4:
            await store.append(session, producer, ops)
        case 5 | 6:
            claim = await store.begin_turn(session, turn, ops, rng.choice([0.5, 6.0]), title="x")
            if claim.nonce:
                memory[f"{session}{turn}"] = claim.hold(turn)
        case 7:
            claim = await store.take_over(session, turn, 2.0, quiet_s=rng.choice((0.0, 0.5, 2.0)))
            if claim.nonce and rng.random() < 0.8:
                memory[f"{session}{turn}"] = claim.hold(turn)
        case 8 | 9:
            seq, ends = rng.randrange(1, 5), rng.random() < 0.2
            await store.append_turn(session, held, seq, ops, ends=ends)
        case 10:
            await store.renew_turn(session, held, 3.0)
        case 11:
            place = Cursor(rng.randrange(1, 3), rng.randrange(0, 40))
            await store.read(session, place, rng.randrange(1, 20), judged=rng.random() < 0.5)
        case 12:
            await store.tails([SessionName("default", name) for name in "abc"])
        case _:
            await rng.choice(
                [
                    lambda: store.check_device(session, device),
                    lambda: store.request_stop(session, rng.choice(["", turn])),
                    lambda: store.keeper.list_sessions("default", 5),
                    lambda: store.take_dirty(32, 0.5),
                    lambda: store.take_idle(32, 30.0),
                    lambda: store.mark_published(session, Cursor(1, rng.randrange(30))),
                ]
            )()


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_logs_script_does_the_same_over_the_model(both: Both, seed: int) -> None:
    print("seed", seed)
    rng = Random(seed)
    store = product.RedisStore(BothWires(both), random_bytes=rng.randbytes)  # type: ignore[arg-type]
    memory: dict[str, Any] = {}
    now_us = 1_795_000_000_000_000
    for _ in range(_VERBS):
        now_us += rng.choice([0, 1_000, 300_000, 4_000_000])
        await both.send("HSET", _CLOCK, "s", now_us // 1_000_000, "us", now_us % 1_000_000)
        with contextlib.suppress(SegueError):
            await _verb(store, rng, memory)
    await both.compare_keys()
