"""The product's Lua scripts, run by Lua 5.1 over the model of the store."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from typing import Any

from lupa import lua51

from tests.sim.redis_model import Keyspace, Reply, ReplyError, Status


class Scripts:
    """Compiles each script once; `run` is one EVALSHA."""

    def __init__(self) -> None:
        self._lua = lua51.LuaRuntime(encoding=None, unpack_returned_tuples=False)
        self._compiled: dict[str, Any] = {}
        self._space: Keyspace | None = None
        self._redis = self._lua.table_from(
            {
                b"call": self._call,
                b"pcall": self._pcall,
                b"sha1hex": self._hex,
                b"error_reply": lambda text: self._lua.table_from({b"err": text}),
                b"status_reply": lambda text: self._lua.table_from({b"ok": text}),
            }
        )
        self._lua.eval(_SEAL)()

    def run(
        self, space: Keyspace, source: str, keys: Sequence[bytes], args: Sequence[bytes]
    ) -> Reply:
        """The script's reply. Raises ReplyError, with what it wrote before kept, as in Redis."""
        body = self._compiled.get(source)
        if body is None:
            body = self._lua.eval(f"function(KEYS, ARGV, redis) {source}\nend".encode())
            self._compiled[source] = body
        self._space = space
        try:
            result = body(self._table(keys), self._table(args), self._redis)
        except lua51.LuaError as error:
            raise ReplyError(f"ERR {error} script: simulated") from None
        finally:
            self._space = None
        return self._reply(result)

    def _table(self, values: Sequence[Any]) -> Any:
        return self._lua.table_from(values)

    def _hex(self, data: bytes) -> bytes:
        return sha1(data, usedforsecurity=False).hexdigest().encode()

    # -- redis.call ---------------------------------------------------------------------------

    def _call(self, *args: Any) -> Any:
        """An error reply goes through Lua as an exception, and comes out of the script again."""
        assert self._space is not None
        if not args:
            raise ReplyError("ERR Please specify at least one argument for this redis.lib call")
        return self._value(self._space.execute(*map(_argument, args)))

    def _pcall(self, *args: Any) -> Any:
        try:
            return self._call(*args)
        except ReplyError as error:
            return self._lua.table_from({b"err": str(error).encode()})

    def _value(self, reply: Reply) -> Any:
        if reply is None:
            return False
        if isinstance(reply, list):
            return self._table([self._value(one) for one in reply])
        if isinstance(reply, Status):
            return self._lua.table_from({b"ok": bytes(reply)})
        return reply

    def _reply(self, value: Any) -> Reply:
        """As Redis turns what a script returns into a reply."""
        if value is None or value is False:
            return None
        if value is True:
            return 1
        if isinstance(value, int | float):
            return int(value)
        if isinstance(value, bytes):
            return value
        if value[b"err"] is not None:
            raise ReplyError(value[b"err"].decode())
        if value[b"ok"] is not None:
            return Status(value[b"ok"])
        reply = []
        place = 1
        while (item := value[place]) is not None:
            reply.append(self._reply(item))
            place += 1
        return reply


def _argument(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ReplyError("ERR Lua redis lib command arguments must be strings or integers")
    if isinstance(value, int) or value == int(value):
        return b"%d" % int(value)
    return f"{value:.17g}".encode()


# Redis lets no script make or read an unknown global.
_SEAL = b"""
function()
  python, io, os, require, module, package = nil, nil, nil, nil, nil, nil
  setmetatable(_G, {
    __newindex = function(_, name) error('a script made the global ' .. tostring(name), 2) end,
    __index = function(_, name) error('there is no global ' .. tostring(name), 2) end,
  })
end
"""
