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
class Die:
    """Nothing more can be computed: the engine thread ends with this error."""

    error: SegueError


@dataclass(frozen=True)
class Close:
    pass


Command: TypeAlias = Submit | Cancel | Offer | Die | Close
