"""Commands of the server, of keys, strings and hashes."""

from __future__ import annotations

from tests.sim.redis_model.keyspace import (
    ANY,
    OK,
    SYNTAX,
    Args,
    Handler,
    Keyspace,
    Reply,
    ReplyError,
    SortedSet,
    Status,
    Stream,
    integer,
)

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
        raise ReplyError(SYNTAX)
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


COMMANDS: dict[bytes, Handler] = {
    b"TIME": (_time, 0, 0, False),
    b"PING": (_ping, 0, 1, False),
    b"INFO": (_info, 0, 8, False),
    b"WAIT": (_wait, 2, 2, False),
    b"PUBLISH": (_publish, 2, 2, False),
    b"CONFIG": (_config, 2, ANY, False),
    b"GET": (_get, 1, 1, False),
    b"SET": (_set, 2, ANY, True),
    b"DEL": (_del, 1, ANY, True),
    b"UNLINK": (_del, 1, ANY, True),
    b"EXISTS": (_exists, 1, ANY, False),
    b"STRLEN": (_strlen, 1, 1, False),
    b"GETRANGE": (_getrange, 3, 3, False),
    b"TYPE": (_type, 1, 1, False),
    b"HSET": (_hset, 3, ANY, True),
    b"HSETNX": (_hsetnx, 3, 3, True),
    b"HGET": (_hget, 2, 2, False),
    b"HMGET": (_hmget, 2, ANY, False),
    b"HGETALL": (_hgetall, 1, 1, False),
    b"HDEL": (_hdel, 2, ANY, True),
    b"HLEN": (_hlen, 1, 1, False),
    b"HEXISTS": (_hexists, 2, 2, False),
    b"HINCRBY": (_hincrby, 3, 3, True),
}
