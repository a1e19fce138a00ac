"""The commands of a Redis store, as far as the product uses them, in memory.

Values and replies are bytes, ints, lists and None, as they come over RESP 2. A command, option or
number of arguments that is not modelled is an error: the model never guesses. Checked against a
real Valkey, command by command, in `test_sim_store_model.py`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Reply: TypeAlias = Any
Id: TypeAlias = tuple[int, int]


class ReplyError(Exception):
    """An error reply; its text begins with the error's code."""


class Status(bytes):
    """A status reply, such as +OK."""


OK = Status(b"OK")
_WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"
_SYNTAX = "ERR syntax error"
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
        now: the server's clock, seconds since the epoch.
        wrote: told every command that changed something, as what replicas and the append-only
            file get.
    """

    def __init__(
        self,
        now: Callable[[], float],
        wrote: Callable[[tuple[bytes, ...]], None] = lambda command: None,
    ) -> None:
        self.values: dict[bytes, Any] = {}
        self.info: dict[str, str] = {}
        self.replicas = 0
        self.config: dict[str, str] = {"maxmemory-policy": "noeviction", "maxmemory": "0"}
        self.published: Callable[[bytes, bytes], int] = lambda channel, message: 0
        self._now = now
        self._wrote = wrote

    def execute(self, *command: bytes) -> Reply:
        """Raises ReplyError."""
        name = command[0].upper()
        handler = _COMMANDS.get(name)
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
            raise ReplyError(_WRONG_TYPE)
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


Args: TypeAlias = Sequence[bytes]

# -- server -----------------------------------------------------------------------------------


def _time(space: Keyspace, args: Args) -> Reply:
    seconds, micros = space.time()
    return [b"%d" % seconds, b"%d" % micros]


def _ping(space: Keyspace, args: Args) -> Reply:
    return args[0] if args else Status(b"PONG")


def _info(space: Keyspace, args: Args) -> Reply:
    return "".join(f"{name}:{value}\r\n" for name, value in space.info.items()).encode()


def _wait(space: Keyspace, args: Args) -> Reply:
    return space.replicas


def _publish(space: Keyspace, args: Args) -> Reply:
    return space.published(*args)


def _config(space: Keyspace, args: Args) -> Reply:
    if args[0].upper() != b"GET":
        raise ReplyError("ERR only CONFIG GET is modelled")
    reply: list[bytes] = []
    for name in args[1:]:
        value = space.config.get(name.decode())
        if value is not None:
            reply += [name, value.encode()]
    return reply


# -- keys and strings -------------------------------------------------------------------------


def _get(space: Keyspace, args: Args) -> Reply:
    return space.find(args[0], bytes)


def _set(space: Keyspace, args: Args) -> Reply:
    options = [option.upper() for option in args[2:]]
    known = space.values.get(args[0])
    if options not in ([], [b"NX"], [b"XX"]):
        raise ReplyError(_SYNTAX)
    if (options == [b"NX"] and known is not None) or (options == [b"XX"] and known is None):
        return None
    space.values[args[0]] = bytes(args[1])
    return OK


def _del(space: Keyspace, args: Args) -> Reply:
    return sum(space.values.pop(key, None) is not None for key in args)


def _exists(space: Keyspace, args: Args) -> Reply:
    return sum(key in space.values for key in args)


def _getrange(space: Keyspace, args: Args) -> Reply:
    value = space.find(args[0], bytes) or b""
    start, stop = int(args[1]), int(args[2])
    assert min(start, stop) >= 0, "from the end is not modelled"
    return bytes(value[start : stop + 1])


def _strlen(space: Keyspace, args: Args) -> Reply:
    return len(space.find(args[0], bytes) or b"")


def _type(space: Keyspace, args: Args) -> Reply:
    kinds = {bytes: b"string", dict: b"hash", SortedSet: b"zset", Stream: b"stream"}
    value = space.values.get(args[0])
    return Status(b"none" if value is None else kinds[type(value)])


# -- hashes -----------------------------------------------------------------------------------


def _hset(space: Keyspace, args: Args) -> Reply:
    if len(args) % 2 == 0:
        raise ReplyError("ERR wrong number of arguments for 'hset' command")
    fields = space.make(args[0], dict)
    before = len(fields)
    for place in range(1, len(args), 2):
        fields[args[place]] = args[place + 1]
    return len(fields) - before


def _hsetnx(space: Keyspace, args: Args) -> Reply:
    fields = space.make(args[0], dict)
    if args[1] in fields:
        return 0
    fields[args[1]] = args[2]
    return 1


def _hget(space: Keyspace, args: Args) -> Reply:
    return (space.find(args[0], dict) or {}).get(args[1])


def _hmget(space: Keyspace, args: Args) -> Reply:
    fields = space.find(args[0], dict) or {}
    return [fields.get(name) for name in args[1:]]


def _hgetall(space: Keyspace, args: Args) -> Reply:
    fields = space.find(args[0], dict) or {}
    return [part for pair in fields.items() for part in pair]


def _hdel(space: Keyspace, args: Args) -> Reply:
    fields = space.find(args[0], dict) or {}
    gone = sum(fields.pop(name, None) is not None for name in args[1:])
    space.drop_empty(args[0])
    return gone


def _hlen(space: Keyspace, args: Args) -> Reply:
    return len(space.find(args[0], dict) or {})


def _hexists(space: Keyspace, args: Args) -> Reply:
    return int(args[1] in (space.find(args[0], dict) or {}))


def _hincrby(space: Keyspace, args: Args) -> Reply:
    step = integer(args[2])
    fields = space.make(args[0], dict)
    try:
        value = integer(fields.get(args[1], b"0")) + step
    except ReplyError:
        raise ReplyError("ERR hash value is not an integer") from None
    if not -(2**63) <= value < 2**63:
        raise ReplyError("ERR increment or decrement would overflow")
    fields[args[1]] = b"%d" % value
    return value


# -- sorted sets ------------------------------------------------------------------------------


def _zadd(space: Keyspace, args: Args) -> Reply:
    place, options = 1, set()
    while place < len(args) and args[place].upper() in (b"NX", b"XX", b"GT", b"LT", b"CH"):
        options.add(args[place].upper())
        place += 1
    pairs = args[place:]
    if not pairs or len(pairs) % 2:
        raise ReplyError(_SYNTAX)
    if {b"NX", b"XX"} <= options:
        raise ReplyError("ERR XX and NX options at the same time are not compatible")
    if len(options & {b"NX", b"GT", b"LT"}) > 1:
        raise ReplyError("ERR GT, LT, and/or NX options at the same time are not compatible")
    scored = [(pairs[i + 1], number(pairs[i])) for i in range(0, len(pairs), 2)]
    if b"XX" in options and space.find(args[0], SortedSet) is None:
        return 0
    zset = space.make(args[0], SortedSet)
    added = changed = 0
    for member, score in scored:
        old = zset.scores.get(member)
        skip = (
            (b"NX" in options and old is not None)
            or (b"XX" in options and old is None)
            or (b"GT" in options and old is not None and score <= old)
            or (b"LT" in options and old is not None and score >= old)
        )
        if skip:
            continue
        new = zset.put(member, score)
        added += new
        changed += new or old != score
    space.drop_empty(args[0])
    return changed if b"CH" in options else added


def _zscore(space: Keyspace, args: Args) -> Reply:
    zset = space.find(args[0], SortedSet)
    score = zset.scores.get(args[1]) if zset is not None else None
    return None if score is None else score_text(score)


def _zcard(space: Keyspace, args: Args) -> Reply:
    zset = space.find(args[0], SortedSet)
    return len(zset.scores) if zset is not None else 0


def _zrem(space: Keyspace, args: Args) -> Reply:
    zset = space.find(args[0], SortedSet)
    if zset is None:
        return 0
    gone = sum(zset.remove(member) for member in args[1:])
    space.drop_empty(args[0])
    return gone


def _zrank(space: Keyspace, args: Args) -> Reply:
    zset = space.find(args[0], SortedSet)
    score = zset.scores.get(args[1]) if zset is not None else None
    return None if score is None else bisect_left(zset.order, (score, args[1]))


def _slice(items: list[Any], start: int, stop: int) -> list[Any]:
    size = len(items)
    first = max(start + size if start < 0 else start, 0)
    last = stop + size if stop < 0 else stop
    return items[first : last + 1] if last >= 0 else []


def _pairs(found: list[tuple[float, bytes]], with_scores: bool) -> list[bytes]:
    if not with_scores:
        return [member for _, member in found]
    return [part for score, member in found for part in (member, score_text(score))]


def _bound(data: bytes) -> tuple[float, bool]:
    """A bound of a score range, and whether it is excluded."""
    try:
        return (number(data[1:]), True) if data.startswith(b"(") else (number(data), False)
    except ReplyError:
        raise ReplyError("ERR min or max is not a float") from None


def _by_score(zset: SortedSet | None, low: bytes, high: bytes) -> list[tuple[float, bytes]]:
    (least, above), (most, below) = _bound(low), _bound(high)
    return [
        pair
        for pair in (zset.order if zset is not None else [])
        if (pair[0] > least if above else pair[0] >= least)
        and (pair[0] < most if below else pair[0] <= most)
    ]


def _limited(found: list[Any], offset: int, count: int) -> list[Any]:
    if offset < 0:
        return []
    return found[offset : offset + count] if count >= 0 else found[offset:]


def _zrange(space: Keyspace, args: Args) -> Reply:
    options = [option.upper() for option in args[3:]]
    reverse = by_score = with_scores = False
    limit: tuple[int, int] | None = None
    while options:
        option = options.pop(0)
        if option == b"REV":
            reverse = True
        elif option == b"BYSCORE":
            by_score = True
        elif option == b"WITHSCORES":
            with_scores = True
        elif option == b"LIMIT" and len(options) >= 2:
            limit = integer(options.pop(0)), integer(options.pop(0))
        else:
            raise ReplyError(_SYNTAX)
    if limit is not None and limit[1] != -1 and not by_score:
        raise ReplyError(
            "ERR syntax error, LIMIT is only supported in combination with either BYSCORE or BYLEX"
        )
    if by_score:
        low, high = (args[2], args[1]) if reverse else (args[1], args[2])
        _bound(low), _bound(high)
        found = _by_score(space.find(args[0], SortedSet), low, high)
        found = found[::-1] if reverse else found
        found = _limited(found, *limit) if limit is not None else found
    else:
        start, stop = integer(args[1]), integer(args[2])
        zset = space.find(args[0], SortedSet)
        found = list(zset.order) if zset is not None else []
        found = _slice(found[::-1] if reverse else found, start, stop)
    return _pairs(found, with_scores)


def _zrevrange(space: Keyspace, args: Args) -> Reply:
    if [option.upper() for option in args[3:]] not in ([], [b"WITHSCORES"]):
        raise ReplyError(_SYNTAX)
    return _zrange(space, [*args[:3], b"REV", *args[3:]])


def _zrangebyscore(space: Keyspace, args: Args) -> Reply:
    return _zrange(space, [*args[:3], b"BYSCORE", *args[3:]])


def _zcount(space: Keyspace, args: Args) -> Reply:
    return len(_by_score(space.find(args[0], SortedSet), args[1], args[2]))


def _zremrangebyscore(space: Keyspace, args: Args) -> Reply:
    zset = space.find(args[0], SortedSet)
    found = _by_score(zset, args[1], args[2])
    for _, member in found:
        zset.remove(member)
    space.drop_empty(args[0])
    return len(found)


def _zremrangebyrank(space: Keyspace, args: Args) -> Reply:
    start, stop = integer(args[1]), integer(args[2])
    zset = space.find(args[0], SortedSet)
    found = _slice(list(zset.order), start, stop) if zset is not None else []
    for _, member in found:
        zset.remove(member)
    space.drop_empty(args[0])
    return len(found)


# -- streams ----------------------------------------------------------------------------------

_BAD_ID = "ERR Invalid stream ID specified as stream command argument"
_MOST = 2**64 - 1


def _id(data: bytes, missing: int) -> Id:
    parts = data.split(b"-", 1)
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        raise ReplyError(_BAD_ID) from None
    if any(not part.isdigit() for part in parts) or max(numbers) > _MOST:
        raise ReplyError(_BAD_ID)
    return numbers[0], numbers[1] if len(numbers) == 2 else missing


def id_text(entry: Id) -> bytes:
    return b"%d-%d" % entry


def _xadd(space: Keyspace, args: Args) -> Reply:
    if len(args) < 4 or len(args) % 2:
        raise ReplyError("ERR wrong number of arguments for 'xadd' command")
    entry = _id(args[1], 0)
    stream = space.find(args[0], Stream)
    if entry == (0, 0):
        raise ReplyError("ERR The ID specified in XADD must be greater than 0-0")
    if stream is not None and entry <= stream.last:
        raise ReplyError(
            "ERR The ID specified in XADD is equal or smaller than the target stream top item"
        )
    stream = space.make(args[0], Stream)
    stream.ids.append(entry)
    stream.entries[entry] = list(args[2:])
    stream.last = entry
    return id_text(entry)


def _range_ends(low: bytes, high: bytes) -> tuple[Id, Id]:
    start = (0, 0) if low == b"-" else _open_id(low, 0, 1)
    stop = (_MOST, _MOST) if high == b"+" else _open_id(high, _MOST, -1)
    return start, stop


def _open_id(data: bytes, missing: int, step: int) -> Id:
    """Also "-" and "+", and an exclusive id."""
    if data == b"-":
        return 0, 0
    if data == b"+":
        return _MOST, _MOST
    if not data.startswith(b"("):
        return _id(data, missing)
    first, second = _id(data[1:], missing)
    if step < 0 and not second:
        if not first:
            raise ReplyError("ERR invalid end ID for the interval")
        return first - 1, _MOST
    return first, second + step


def _count_option(args: Args) -> int | None:
    if not args:
        return None
    if len(args) != 2 or args[0].upper() != b"COUNT":
        raise ReplyError(_SYNTAX)
    return max(integer(args[1]), 0)


def _entries(space: Keyspace, key: bytes, start: Id, stop: Id) -> list[Any]:
    stream = space.find(key, Stream)
    if stream is None:
        return []
    first = bisect_left(stream.ids, start)
    last = bisect_left(stream.ids, (stop[0], stop[1] + 1))
    return [[id_text(one), list(stream.entries[one])] for one in stream.ids[first:last]]


def _xrange(space: Keyspace, args: Args) -> Reply:
    start, stop = _range_ends(args[1], args[2])
    count = _count_option(args[3:])
    if count == 0:
        return None if space.find(args[0], Stream) is not None else []
    return _entries(space, args[0], start, stop)[:count]


def _xrevrange(space: Keyspace, args: Args) -> Reply:
    start, stop = _range_ends(args[2], args[1])
    count = _count_option(args[3:])
    if count == 0:
        return None if space.find(args[0], Stream) is not None else []
    return _entries(space, args[0], start, stop)[::-1][:count]


def _xlen(space: Keyspace, args: Args) -> Reply:
    stream = space.find(args[0], Stream)
    return len(stream.ids) if stream is not None else 0


def _xdel(space: Keyspace, args: Args) -> Reply:
    stream = space.find(args[0], Stream)
    if stream is None:
        return 0
    gone = 0
    for one in [_id(one, 0) for one in args[1:]]:
        if stream.entries.pop(one, None) is not None:
            stream.ids.remove(one)
            gone += 1
    return gone


def _xtrim(space: Keyspace, args: Args) -> Reply:
    how, rest = args[1].upper(), list(args[2:])
    if rest and rest[0] == b"=":
        rest = rest[1:]
    if how not in (b"MINID", b"MAXLEN") or len(rest) != 1:
        raise ReplyError(_SYNTAX)
    least = _id(rest[0], 0) if how == b"MINID" else (0, 0)
    most = integer(rest[0]) if how == b"MAXLEN" else 0
    if most < 0:
        raise ReplyError("ERR The MAXLEN argument must be >= 0.")
    stream = space.find(args[0], Stream)
    if stream is None:
        return 0
    gone = bisect_left(stream.ids, least) if how == b"MINID" else max(len(stream.ids) - most, 0)
    for one in stream.ids[:gone]:
        del stream.entries[one]
    del stream.ids[:gone]
    return gone


_Handler: TypeAlias = tuple[Callable[[Keyspace, Args], Reply], int, int, bool]
_ANY = 10_000

# Name: its function, the least and the most arguments, whether it writes.
_COMMANDS: dict[bytes, _Handler] = {
    b"TIME": (_time, 0, 0, False),
    b"PING": (_ping, 0, 1, False),
    b"INFO": (_info, 0, 8, False),
    b"WAIT": (_wait, 2, 2, False),
    b"PUBLISH": (_publish, 2, 2, False),
    b"CONFIG": (_config, 2, _ANY, False),
    b"GET": (_get, 1, 1, False),
    b"SET": (_set, 2, _ANY, True),
    b"DEL": (_del, 1, _ANY, True),
    b"UNLINK": (_del, 1, _ANY, True),
    b"EXISTS": (_exists, 1, _ANY, False),
    b"STRLEN": (_strlen, 1, 1, False),
    b"GETRANGE": (_getrange, 3, 3, False),
    b"TYPE": (_type, 1, 1, False),
    b"HSET": (_hset, 3, _ANY, True),
    b"HSETNX": (_hsetnx, 3, 3, True),
    b"HGET": (_hget, 2, 2, False),
    b"HMGET": (_hmget, 2, _ANY, False),
    b"HGETALL": (_hgetall, 1, 1, False),
    b"HDEL": (_hdel, 2, _ANY, True),
    b"HLEN": (_hlen, 1, 1, False),
    b"HEXISTS": (_hexists, 2, 2, False),
    b"HINCRBY": (_hincrby, 3, 3, True),
    b"ZADD": (_zadd, 3, _ANY, True),
    b"ZSCORE": (_zscore, 2, 2, False),
    b"ZCARD": (_zcard, 1, 1, False),
    b"ZREM": (_zrem, 2, _ANY, True),
    b"ZRANK": (_zrank, 2, 2, False),
    b"ZRANGE": (_zrange, 3, _ANY, False),
    b"ZREVRANGE": (_zrevrange, 3, _ANY, False),
    b"ZRANGEBYSCORE": (_zrangebyscore, 3, _ANY, False),
    b"ZCOUNT": (_zcount, 3, 3, False),
    b"ZREMRANGEBYSCORE": (_zremrangebyscore, 3, 3, True),
    b"ZREMRANGEBYRANK": (_zremrangebyrank, 3, 3, True),
    b"XADD": (_xadd, 4, _ANY, True),
    b"XRANGE": (_xrange, 3, _ANY, False),
    b"XREVRANGE": (_xrevrange, 3, _ANY, False),
    b"XLEN": (_xlen, 1, 1, False),
    b"XDEL": (_xdel, 2, _ANY, True),
    b"XTRIM": (_xtrim, 3, _ANY, True),
}
WRITES = frozenset(name for name, handler in _COMMANDS.items() if handler[3])
