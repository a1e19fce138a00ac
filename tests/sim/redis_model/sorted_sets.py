"""Commands of sorted sets."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

from tests.sim.redis_model.keyspace import (
    ANY,
    SYNTAX,
    Args,
    Handler,
    Keyspace,
    Reply,
    ReplyError,
    SortedSet,
    integer,
    number,
    score_text,
)


def _zadd(space: Keyspace, args: Args) -> Reply:
    place, options = 1, set()
    while place < len(args) and args[place].upper() in (b"NX", b"XX", b"GT", b"LT", b"CH"):
        options.add(args[place].upper())
        place += 1
    pairs = args[place:]
    if not pairs or len(pairs) % 2:
        raise ReplyError(SYNTAX)
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
            raise ReplyError(SYNTAX)
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
        raise ReplyError(SYNTAX)
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


COMMANDS: dict[bytes, Handler] = {
    b"ZADD": (_zadd, 3, ANY, True),
    b"ZSCORE": (_zscore, 2, 2, False),
    b"ZCARD": (_zcard, 1, 1, False),
    b"ZREM": (_zrem, 2, ANY, True),
    b"ZRANK": (_zrank, 2, 2, False),
    b"ZRANGE": (_zrange, 3, ANY, False),
    b"ZREVRANGE": (_zrevrange, 3, ANY, False),
    b"ZRANGEBYSCORE": (_zrangebyscore, 3, ANY, False),
    b"ZCOUNT": (_zcount, 3, 3, False),
    b"ZREMRANGEBYSCORE": (_zremrangebyscore, 3, 3, True),
    b"ZREMRANGEBYRANK": (_zremrangebyrank, 3, 3, True),
}
