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


def load(name: str) -> Script:
    """The file's script, with what all of them begin with."""
    return Script(text("common.lua") + text(name))
