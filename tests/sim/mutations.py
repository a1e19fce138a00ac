"""Faults planted in the product's code: each must be found, or the invariants are too weak.

`python -m tests.sim.mutations NAME` loads the product with that one change and runs seeds until an
invariant breaks. A change names a module (or a script beside it), the text that is there, and what
replaces it; one whose text is not there exactly once is an error. Whoever rewrites such a place
moves its mutation along.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

SEEDS = 500  # within which each must be found


@dataclass(frozen=True)
class Mutation:
    """`file`: a script of the store that the module loads; "": its own source."""

    module: str
    old: str
    new: str
    file: str = ""


STORE = "segue_cloud.sessions.store"

MUTATIONS: dict[str, Mutation] = {
    "a take-over leaves the epoch as it was": Mutation(
        STORE, "  epoch = epoch + 1\n  redis.call(", "  redis.call(", "turns.lua"
    ),
    "a repeated batch is appended again": Mutation(
        STORE,
        "  if last <= seq then\n",
        "  if last <= seq then seq = first - 1 end\n  if last < 0 then\n",
        "append.lua",
    ),
    "a turn that is known begins again": Mutation(
        STORE,
        "  if known[5] then\n    local ended, owner = turn_flags(turn)\n",
        "  before = nil\n  if false then\n    local ended, owner = turn_flags(turn)\n",
        "turns.lua",
    ),
    "the numbers of a failed append are used again": Mutation(
        "segue.session",
        "            epoch, writer.epoch = writer.epoch, 0  # until the answer is here\n",
        "            epoch = writer.epoch\n",
    ),
    "a later entry is taken for the next one": Mutation(
        "segue._log",
        "entry.generation == known.generation and entry.offset == known.offset + 1",
        "entry.generation == known.generation and entry.offset > known.offset",
    ),
    "a gap in what a follower got is never healed": Mutation(
        "segue.follow", "        if not self._view.behind:\n", "        if True:\n"
    ),
    "a broken turn is joined one token too late": Mutation(
        "segue.turn",
        "request.from_index = self._view.resume_index",
        "request.from_index = self._view.resume_index + 1",
    ),
    "a store's new life goes unnoticed": Mutation(
        STORE, "  if life ~= before then\n", "  if false then\n", "log.lua"
    ),
    "the hub queues an entry behind a gap": Mutation(
        "segue_cloud.hub.state",
        "                    and entry.cursor == Cursor(end.generation, end.offset + 1)\n",
        "",
    ),
    "tokens are called durable before they are appended": Mutation(
        "segue_cloud.turns.writer",
        "            result = await self._append(list(batch))\n",
        "            for frame in batch:\n                self._publish(frame, 0)\n"
        "            result = await self._append(list(batch))\n",
    ),
    "a batch is spread under the offset of its last op": Mutation(
        "segue_cloud.log.session_log",
        "        first = tail.offset - len(ops) + 1\n        entries",
        "        first = tail.offset\n        entries",
    ),
    "a head waits and nobody looks when": Mutation(
        "segue_cloud.mqtt.outbox",
        "        self._soonest_s = min(self._soonest_s, head.due_s)\n        self._forget",
        "        self._forget",
    ),
    "the outbox gives up a turn that is refused for now": Mutation(
        "segue_edge.turns.offline.outbox",
        "        except _FOR_GOOD as error:\n",
        "        except SegueError as error:\n",
    ),
    "the outbox forgets its file": Mutation(
        "segue_edge.turns.offline.outbox",
        "in journal.turns if journal is not None else []:\n",
        "in []:\n",
    ),
    "a turn served offline is not put into the outbox": Mutation(
        "segue_edge.turns.offline.outbox",
        "            await outbox.add(turn)\n",
        "            pass\n",
    ),
    "an edge that made the whole reply alone keeps it nowhere": Mutation(
        "segue_edge.turns.state.turn",
        "return [] if link is not None else self._store(reason)\n",
        "return []\n",
    ),
}


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads one module with its source changed."""

    def __init__(self, name: str, path: str, mutation: Mutation) -> None:
        super().__init__(name, path)
        self._mutation = mutation

    def source_to_code(self, data: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        return super().source_to_code(
            changed(bytes(data).decode(), self._mutation).encode(), path, *args, **kwargs
        )

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutation: Mutation) -> None:
        self._mutation = mutation

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._mutation.module:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert found is not None
        assert found.origin is not None
        return importlib.util.spec_from_loader(
            fullname, _Loader(fullname, found.origin, self._mutation)
        )


def changed(source: str, mutation: Mutation) -> str:
    """Raises LookupError where the place is not there exactly once."""
    count = source.count(mutation.old)
    if count != 1:
        where = mutation.file or mutation.module
        raise LookupError(f"{where} has this text {count} times, not once:\n{mutation.old}")
    return source.replace(mutation.old, mutation.new)


def plant(mutation: Mutation) -> None:
    """Before the product is loaded. Raises LookupError where it does not apply any more."""
    assert mutation.module not in sys.modules, "the product was loaded already"
    if not mutation.file:
        sys.meta_path.insert(0, _Finder(mutation))
        return
    scripts = importlib.import_module("segue_cloud.sessions.scripts")
    read: Callable[[str], str] = scripts.text
    planted = changed(read(mutation.file), mutation)
    scripts.__dict__["text"] = lambda name: planted if name == mutation.file else read(name)
    module: Any = importlib.import_module(mutation.module)
    # What the store is given: else every call would fail, and any fault be "found".
    assert any(planted in script.source for script in module.SCRIPTS)


def main(name: str) -> int:
    plant(MUTATIONS[name])
    from tests.sim.run import run

    for seed in range(SEEDS):
        outcome = run(seed)
        if outcome.failure:
            print(f"found by seed {seed}: {outcome.failure}")
            return 0
    print(f"not found by {SEEDS} seeds: {name}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
