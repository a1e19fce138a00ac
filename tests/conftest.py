"""Fixtures of all tests: real servers on free ports, and the built default model."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

from segue_contract.model.home import is_built, model_home
from segue_contract.servers import Broker, Valkey
from tests.support.servers import require_broker, require_valkey

# As segue_cloud.engine sets it, for tests that load torch before the engine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What parts in this process log. structlog's own choice draws tracebacks with all variables, for
# a third of a second each.
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.dev.ConsoleRenderer(
            colors=False, exception_formatter=structlog.dev.plain_traceback
        ),
    ]
)

# A busy machine is no failure. Where CI runs, hypothesis has a profile of its own: without chance.
if "CI" not in os.environ:
    settings.register_profile("here", deadline=None)
    settings.load_profile("here")

DEFAULT_MODEL = "smollm2-135m"
MODEL_BUILD_TIMEOUT_S = 900


@pytest.fixture
async def valkey() -> AsyncIterator[Valkey]:
    """A fresh, empty Valkey."""
    require_valkey()
    async with Valkey.start() as server:
        yield server


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    """A fresh MQTT 5 broker: Mosquitto where it is installed."""
    require_broker()
    async with Broker.start() as server:
        yield server


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The built default model; built once per machine where it is missing (takes a minute)."""
    home = model_home()
    directory = home / DEFAULT_MODEL
    if is_built(directory):
        return directory
    home.mkdir(parents=True, exist_ok=True)
    with (home / ".build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test processes build it once
        if not is_built(directory):
            build = subprocess.run(
                [sys.executable, "-m", "segue", "model", "build"],
                capture_output=True,
                text=True,
                timeout=MODEL_BUILD_TIMEOUT_S,
                env=os.environ,
                check=False,
            )
            if build.returncode != 0:
                pytest.fail(f"The default model cannot be built:\n{build.stdout}{build.stderr}")
    return directory
