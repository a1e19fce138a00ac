"""Kills a process at every step of writing an outbox file, and reads the file after each.

    python -m tests.support.journal_child FOLDER

The child is a fork: it does some work on the file and says what was acknowledged; before step N
(a write, whole or in half, a flush, a sync, a rename) it ends itself with SIGKILL. The parent then
opens the file as the next edge would. Prints one line per broken promise, then how many deaths.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from segue_contract.v1 import agent_pb2 as pb
from segue_edge.turns.offline import journal as module
from segue_edge.turns.offline.journal import Journal, StoredTurn


def stored(name: str) -> StoredTurn:
    request = pb.RunTurnRequest(session="s", device="d", turn=name, prompt="Hi", max_tokens=9)
    return StoredTurn(
        request=request.SerializeToString(),
        prompt=(1, 2, 3),
        tokens=(4, 5),
        pieces=("a", "b"),
        reason="stop",
        plan=b"",
    )


def name_of(turn: StoredTurn) -> str:
    return pb.RunTurnRequest.FromString(turn.request).turn + turn.refused_code


class Fate:
    """Counts steps; the one numbered `last` is not reached, or only half done."""

    def __init__(self, last: int) -> None:
        self.left = last

    def step(self, half: Callable[[], object] = lambda: None) -> None:
        self.left -= 1
        if self.left == 0:
            half()
            os.kill(os.getpid(), signal.SIGKILL)


class MortalFile(io.BufferedWriter):
    """Writes go to the file at once, so that each is a step of its own."""

    fate: Fate

    def write(self, data: Any) -> int:
        half = bytes(data)[: len(data) // 2]
        self.fate.step(lambda: os.write(self.fileno(), half) if half else None)
        self.fate.step()
        written = super().write(data)
        super().flush()
        return written


def mortal(fate: Fate) -> None:
    """From now on in this process: every step of the journal's writing counts."""
    sync, replace, opened = os.fsync, Path.replace, Path.open

    def open_file(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if mode != "wb":
            return opened(path, mode, *rest, **more)
        fate.step()
        file = MortalFile(io.FileIO(path, "w"))
        file.fate = fate
        return file

    def fsync(number: int) -> None:
        fate.step()
        sync(number)

    def rename(path: Path, target: Any) -> Path:
        fate.step()
        return replace(path, target)

    module.os.fsync = fsync  # type: ignore[attr-defined]
    Path.open, Path.replace = open_file, rename  # type: ignore[method-assign,assignment]


def work(path: Path, said: int) -> None:
    """Adds, delivers and refuses; tells what is to be believed from then on."""

    def tell(word: str) -> None:
        os.write(said, f"{word}\n".encode())

    journal = Journal(path)
    numbers = {}
    for name in ("t2", "t3", "t4"):
        tell(f"may+ {name}")
        numbers[name] = journal.add(stored(name))
        tell(f"must+ {name}")
    for name in ("t2", "t3"):
        tell(f"may- {name}")
        journal.remove(numbers[name])
        tell(f"must- {name}")
    refused = stored("t4")
    refused = type(refused)(**{**vars_of(refused), "refused_code": "!"})
    tell("may- t4")
    tell("may+ t4!")
    journal.replace(numbers["t4"], refused)
    tell("must- t4")
    tell("must+ t4!")
    tell("may- t1")
    tell("may- t4!")
    for number, _ in journal.turns:
        journal.remove(number)  # the last one makes a new file
    tell("must- t1")
    tell("must- t4!")
    tell("may+ t5")
    journal.add(stored("t5"))
    tell("must+ t5")
    tell("done")


def vars_of(turn: StoredTurn) -> dict[str, Any]:
    return {name: getattr(turn, name) for name in turn.__struct_fields__}


def one_death(folder: Path, last: int) -> tuple[bool, str]:
    """Whether the child came to its end, and what was wrong with the file."""
    path = folder / f"outbox-{last}"
    first = Journal(path)
    first.add(stored("t1"))
    first.close()
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        mortal(Fate(last))
        work(path, said)
        os._exit(0)
    os.close(said)
    with os.fdopen(heard) as lines:
        words = [line.split() for line in lines.read().splitlines()]
    os.waitpid(child, 0)
    must, may = {"t1"}, {"t1"}
    for word, *names in words:
        for name in names:
            if word == "may+":
                may.add(name)
            elif word == "must+":
                must.add(name)
            elif word == "may-":
                must.discard(name)
            elif word == "must-":
                may.discard(name)
    again = Journal(path)
    found = {name_of(turn) for _, turn in again.turns}
    again.add(stored("after"))
    again.close()
    wrong = "" if must <= found <= may else f"step {last}: {sorted(must)} {sorted(found)}"
    if path.with_name(f"{path.name}.damaged").exists():
        wrong += f" step {last}: set aside as damaged"
    return ["done"] in words, wrong


def main(folder: Path) -> None:
    last, done = 0, False
    while not done:
        last += 1
        done, wrong = one_death(folder, last)
        if wrong:
            print("wrong", wrong)
    print("deaths", last - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
