"""Real servers for tests: where one is missing, say so; in CI that is a failure."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from segue_contract.errors import MissingExtra
from segue_contract.servers.broker import find_broker
from segue_contract.servers.lifetime import LocalServer
from segue_contract.servers.valkey import find_valkey


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def require_valkey() -> None:
    try:
        find_valkey()
    except MissingExtra as error:
        _missing(str(error))


def require_broker(kind: str = "") -> None:
    try:
        find_broker(kind)
    except MissingExtra as error:
        _missing(str(error))


@contextmanager
def stopped(server: LocalServer) -> Iterator[None]:
    """The server's process stands still meanwhile: it answers nothing, and breaks no connection."""
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


def require_mosquitto() -> None:
    """For tests of what only Mosquitto does."""
    require_broker("mosquitto")


def _missing(reason: str) -> None:
    if in_ci():
        pytest.fail(reason)
    pytest.skip(reason)
