"""What a `FakeNode` answers: a text, or steps.

["Paris, ", Pause(0.1), "of course."]
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from segue_contract.errors import SegueError


@dataclass(frozen=True, slots=True)
class Pause:
    """The reply stands still for so long."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Wait:
    """The reply goes on when the test sets `event`."""

    event: asyncio.Event


@dataclass(frozen=True, slots=True)
class Preview:
    """Text that only the asking device is shown at first, as an edge does before the log has it.
    What comes next confirms it, or `Rewind` takes it back."""

    text: str


@dataclass(frozen=True, slots=True)
class Rewind:
    """All previews are taken back: the asking device gets `Rewound`."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The turn ends with an error."""

    error: SegueError


Step: TypeAlias = str | Pause | Wait | Preview | Rewind | Fail
Script: TypeAlias = str | Sequence[Step]
Reply: TypeAlias = Script | Callable[[str], Script]
"""A script, or a function that makes one of the prompt."""

_WORD = re.compile(r"\s*\S+|\s+")


def steps_of(reply: Reply, prompt: str) -> list[Step]:
    found = reply(prompt) if callable(reply) else reply
    return [found] if isinstance(found, str) else list(found)


def pieces_of(text: str) -> tuple[str, ...]:
    """A token is a word with the space before it; joined, they are the text."""
    return tuple(_WORD.findall(text))


def token_of(piece: str) -> int:
    """Its id: equal words have equal ones."""
    return sum(piece.encode()) % 50_000
