"""Segue: agent sessions that follow their user from device to device.

    async with segue.Client("127.0.0.1:7411", device="phone") as client:
        session = await client.session("trip")
        async with session.run("Plan a day in Paris.", max_tokens=200) as turn:
            async for event in turn:
                print(event.text, end="")

Names are loaded when they are first used, so that `import segue` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segue.client import Client as Client
    from segue.errors import SegueError as SegueError
    from segue.events import Durable as Durable
    from segue.events import Ended as Ended
    from segue.events import Entry as Entry
    from segue.events import Frame as Frame
    from segue.events import Imported as Imported
    from segue.events import Lost as Lost
    from segue.events import OfflineTurn as OfflineTurn
    from segue.events import Reply as Reply
    from segue.events import Rewound as Rewound
    from segue.events import SessionInfo as SessionInfo
    from segue.events import Snapshot as Snapshot
    from segue.events import Started as Started
    from segue.events import Timing as Timing
    from segue.follow import Follower as Follower
    from segue.options import Timeout as Timeout
    from segue.session import Session as Session
    from segue.sync import SyncClient as SyncClient
    from segue.sync import SyncFollower as SyncFollower
    from segue.sync import SyncSession as SyncSession
    from segue.sync import SyncTurn as SyncTurn
    from segue.turn import Turn as Turn

__version__ = "0.1.0"

_HOME = {
    "Client": "client",
    "Session": "session",
    "Turn": "turn",
    "Follower": "follow",
    "SegueError": "errors",
    "SyncClient": "sync",
    "SyncSession": "sync",
    "SyncTurn": "sync",
    "SyncFollower": "sync",
    "Timeout": "options",
    "Started": "events",
    "Frame": "events",
    "Durable": "events",
    "Rewound": "events",
    "Ended": "events",
    "Reply": "events",
    "Snapshot": "events",
    "Entry": "events",
    "Imported": "events",
    "Lost": "events",
    "OfflineTurn": "events",
    "SessionInfo": "events",
    "Timing": "events",
}
_MODULES = ("errors", "events", "testing", "tokens")

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"segue.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"segue.{name}")
    raise AttributeError(f"module 'segue' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
