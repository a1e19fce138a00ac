"""One stack of real processes for the whole folder; it ends with the folder's last test."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest_asyncio

from segue.local.parts import Part, Program, module_command
from segue.testing import LocalStack
from tests.support.servers import require_broker, require_valkey

OnCrash = Callable[[Part], None]


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def running_stack(model_dir: Path) -> AsyncIterator[LocalStack]:
    require_valkey()
    require_broker()
    async with LocalStack(model=str(model_dir)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="package")
async def stack(running_stack: LocalStack) -> AsyncIterator[LocalStack]:
    """All of it runs; a test may break parts of it, the next one finds them whole again."""
    parts = running_stack.processes.values()
    for part in parts:
        if not part.running:
            await part.restart()
    yield running_stack
    for part in parts:
        part.resume()
    assert running_stack.crashed is None, running_stack.crashed


def second_cloud(
    stack: LocalStack, model: Path, folder: Path, *arguments: str, on_crash: OnCrash | None = None
) -> Program:
    """Another cloud on the stack's servers, not started."""
    return Program(
        "cloud-2",
        module_command("segue", "cloud", "--port", "0", "--model", str(model), *arguments),
        log=folder / "cloud-2.log",
        env={**os.environ, "SEGUE_REDIS_URL": stack.redis_url, "SEGUE_MQTT_URL": stack.mqtt_url},
        on_crash=on_crash,
    )
