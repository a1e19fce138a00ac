"""Commands of streams."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from tests.sim.redis_model.keyspace import (
    ANY,
    SYNTAX,
    Args,
    Handler,
    Id,
    Keyspace,
    Reply,
    ReplyError,
    Stream,
    integer,
)

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
        raise ReplyError(SYNTAX)
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
        raise ReplyError(SYNTAX)
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


COMMANDS: dict[bytes, Handler] = {
    b"XADD": (_xadd, 4, ANY, True),
    b"XRANGE": (_xrange, 3, ANY, False),
    b"XREVRANGE": (_xrevrange, 3, ANY, False),
    b"XLEN": (_xlen, 1, 1, False),
    b"XDEL": (_xdel, 2, ANY, True),
    b"XTRIM": (_xtrim, 3, ANY, True),
}
