"""A start that takes long says so while it lasts, and a quick one says nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from segue_cloud.engine import first_start
from segue_cloud.engine.first_start import told_if_slow
from segue_contract.telemetry import EVENT_PREPARING

WAIT_S = 30.0


class Log:
    def __init__(self, on_event: Callable[[], None]) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._on_event = on_event

    def info(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))
        self._on_event()


@pytest.fixture
def heard() -> threading.Event:
    return threading.Event()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, heard: threading.Event) -> Log:
    replaced = Log(heard.set)
    monkeypatch.setattr(first_start, "log", replaced)
    return replaced


def test_slow_work_is_told_while_it_lasts(log: Log, heard: threading.Event) -> None:
    with told_if_slow("compiles", after_s=0.0):
        assert heard.wait(WAIT_S)
        assert log.events == [(EVENT_PREPARING, {"what": "compiles"})]
    assert [event for event, _ in log.events] == [EVENT_PREPARING, "prepared"]


def test_quick_work_is_not_told(log: Log) -> None:
    with told_if_slow("compiles", after_s=WAIT_S):
        pass
    assert log.events == []
    timers = [t for t in threading.enumerate() if isinstance(t, threading.Timer)]
    for timer in timers:
        timer.join(WAIT_S / 2)  # a cancelled one ends at once
        assert not timer.is_alive()


def test_work_that_fails_is_not_said_to_be_done(log: Log, heard: threading.Event) -> None:
    def fail() -> None:
        assert heard.wait(WAIT_S)
        raise OSError

    with pytest.raises(OSError), told_if_slow("compiles", after_s=0.0):
        fail()
    assert [event for event, _ in log.events] == [EVENT_PREPARING]
