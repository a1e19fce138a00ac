"""One stack of real processes for a whole module; whoever breaks a part restarts it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from segue.testing import LocalStack
from tests.support.servers import require_broker, require_valkey


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(model_dir: Path) -> AsyncIterator[LocalStack]:
    require_valkey()
    require_broker()
    async with LocalStack(model=str(model_dir)) as running:
        yield running
        assert running.crashed is None, running.crashed
