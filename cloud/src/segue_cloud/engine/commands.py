"""What the event loop asks of the engine thread."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TypeAlias

from segue_cloud.engine.port import EngineTurn
from segue_contract.errors import SegueError
from segue_contract.kv.layout import KvBlock


@dataclass(frozen=True)
class Submit:
    turn: EngineTurn


@dataclass(frozen=True)
class Cancel:
    key: str


@dataclass(frozen=True)
class Offer:
    """`taken` gets the number of blocks that are in the pool now."""

    blocks: tuple[KvBlock, ...]
    taken: asyncio.Future[int]


@dataclass(frozen=True)
class Look:
    """`found` gets the KV of the last full block before the last token of the turn's prompt, as the
    cache has it for the turn; None where it has not."""

    turn: EngineTurn
    found: asyncio.Future[KvBlock | None]


@dataclass(frozen=True)
class Die:
    """Nothing more can be computed: the engine thread ends with this error."""

    error: SegueError


@dataclass(frozen=True)
class Close:
    pass


Command: TypeAlias = Submit | Cancel | Offer | Look | Die | Close
