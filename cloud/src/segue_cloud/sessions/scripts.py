"""Lua scripts of this folder, as the store is given them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha1
from importlib.resources import files

Command = tuple[str | bytes | int | float, ...]


class Script:
    """A Lua script, called by its digest."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = sha1(source.encode(), usedforsecurity=False).hexdigest()

    def call(self, keys: Sequence[str], *args: str | bytes | int | float) -> Command:
        return ("EVALSHA", self.digest, len(keys), *keys, *args)


def text(name: str) -> str:
    return files(__package__).joinpath(name).read_text()


def load(*names: str) -> Script:
    """The files as one script, with what all scripts begin with."""
    return Script("".join(map(text, ("common.lua", *names))))
