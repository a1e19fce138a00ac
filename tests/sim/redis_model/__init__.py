"""The commands of a Redis store, as far as the product uses them, in memory.

Values and replies are bytes, ints, lists and None, as they come over RESP 2. A command, option or
number of arguments that is not modelled is an error: the model never guesses. Checked against a
real Valkey, command by command, in `test_sim_store_model.py`.
"""

from __future__ import annotations

from tests.sim.redis_model import keys, sorted_sets, streams
from tests.sim.redis_model.keyspace import (
    Handler,
    Keyspace,
    Reply,
    ReplyError,
    SortedSet,
    Status,
    Stream,
)

COMMANDS: dict[bytes, Handler] = {**keys.COMMANDS, **sorted_sets.COMMANDS, **streams.COMMANDS}
WRITES = frozenset(name for name, handler in COMMANDS.items() if handler[3])

__all__ = [
    "COMMANDS",
    "WRITES",
    "Keyspace",
    "Reply",
    "ReplyError",
    "SortedSet",
    "Status",
    "Stream",
]
