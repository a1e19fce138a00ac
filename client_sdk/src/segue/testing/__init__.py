"""For tests of applications.

    async with FakeNode(replies=["Paris, of course."]) as node:     # in memory, in milliseconds
        async with node.client("phone") as client: ...

    async with LocalStack() as stack:                               # all of Segue, real programs
        async with segue.Client(stack.edge_address, device="phone") as client: ...

Names are loaded when they are first used: a fake needs nothing of a stack.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segue.local.parts import Part as Part
    from segue.local.parts import Program as Program
    from segue.local.parts import Server as Server
    from segue.local.stack import LocalStack as LocalStack
    from segue.testing._stack import local_stack as local_stack
    from segue.testing.fake_node import FakeNode as FakeNode
    from segue.testing.script import Fail as Fail
    from segue.testing.script import Pause as Pause
    from segue.testing.script import Preview as Preview
    from segue.testing.script import Rewind as Rewind
    from segue.testing.script import Script as Script
    from segue.testing.script import Wait as Wait
    from segue.testing.sync_fake_node import SyncFakeNode as SyncFakeNode

_HOME = {
    "FakeNode": "segue.testing.fake_node",
    "SyncFakeNode": "segue.testing.sync_fake_node",
    "Fail": "segue.testing.script",
    "Pause": "segue.testing.script",
    "Preview": "segue.testing.script",
    "Rewind": "segue.testing.script",
    "Script": "segue.testing.script",
    "Wait": "segue.testing.script",
    "LocalStack": "segue.local.stack",
    "Part": "segue.local.parts",
    "Program": "segue.local.parts",
    "Server": "segue.local.parts",
    "local_stack": "segue.testing._stack",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'segue.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
