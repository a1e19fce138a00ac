"""The node's small parts: reply, feed, history, compute thread, settings, command line."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from segue_contract.errors import (
    Internal,
    InvalidArgument,
    ModelMissing,
    NotLoopback,
    Overloaded,
)
from segue_contract.ids import SessionName
from segue_contract.limits import PREFILL_QUEUE_JOBS
from segue_contract.sync.state import TurnState
from segue_edge.compute import ComputeThread, Job, Load, Priority
from segue_edge.config import read_config
from segue_edge.node import EdgeNode
from segue_edge.planner_cli import app as plan_app
from segue_edge.prefill.providers import choose_device
from segue_edge.turns.history import HistoryCache, SessionHistory

# -- history ------------------------------------------------------------------------------------


def turn(name: str, tokens: list[int] | None = None) -> TurnState:
    return TurnState(turn=name, prompt=f"ask {name}", tokens=tokens or [1], reason="stop")


def test_the_logs_own_turn_replaces_what_the_node_served() -> None:
    history = SessionHistory()
    history.merge(1, 0, [turn("a")])
    history.add(turn("b"))
    assert not history.merge(1, 1, [turn("b")]), "the same conversation"
    assert [t.turn for t in history.confirmed] == ["a", "b"]
    assert history.provisional == []


def test_a_turn_that_the_log_has_otherwise_counts_as_changed() -> None:
    history = SessionHistory()
    history.merge(1, 0, [turn("a")])
    history.add(turn("b", [1, 2]))
    assert history.merge(1, 1, [turn("b", [1, 3])])


def test_what_no_prompt_holds_again_is_forgotten_and_never_sent_for() -> None:
    history = SessionHistory()
    history.merge(1, 0, [turn("a"), turn("b"), turn("c")])
    history.forget("d", "c")
    assert [t.turn for t in history.turns] == ["c"]
    assert history.known_turns == 3
    history.add(turn("d"))
    assert not history.merge(1, 3, [turn("d")]), "the same conversation"
    assert [t.turn for t in history.turns] == ["c", "d"]
    assert history.merge(1, 7, [turn("h")]), "the turns between are before the cut"
    assert [t.turn for t in history.turns] == ["h"]
    assert history.known_turns == 8
    history.forget("i", "i")
    assert history.turns == []
    assert history.known_turns == 8
    history.merge(2, 0, [turn("a")])
    assert history.known_turns == 1


def test_what_waits_in_the_outbox_stays_in_the_conversation_until_it_is_delivered() -> None:
    history = SessionHistory()
    history.merge(1, 0, [turn("a")])
    history.wait(turn("b"))
    history.merge(1, 1, [turn("other")])
    assert [t.turn for t in history.turns] == ["a", "other", "b"]
    history.delivered("b", True)
    history.merge(1, 2, [turn("b")])
    assert [t.turn for t in history.turns] == ["a", "other", "b"]
    assert history.provisional == []


def test_a_turn_that_the_log_has_otherwise_is_not_remembered_as_shown() -> None:
    history = SessionHistory()
    history.wait(turn("b"))
    history.delivered("b", False)
    assert history.turns == []


def test_another_generation_forgets_what_was_known() -> None:
    history = SessionHistory()
    history.merge(1, 0, [turn("a"), turn("b")])
    assert history.merge(2, 0, [turn("a")])
    assert [t.turn for t in history.turns] == ["a"]


def test_the_cache_keeps_the_sessions_used_last() -> None:
    cache = HistoryCache(capacity=2)
    for name in ("a", "b", "a", "c"):
        cache.of(SessionName("default", name))
    assert cache.find(SessionName("default", "b")) is None
    assert cache.find(SessionName("default", "a")) is not None
    assert cache.find(SessionName("acme", "a")) is None


def test_what_a_cloud_holds_is_the_common_beginning() -> None:
    history = SessionHistory()
    history.cloud_now_holds("x", [1, 2, 3, 4])
    assert history.cloud_has("x", [1, 2, 9]) == 2
    assert history.cloud_has("y", [1, 2, 9]) == 0


# -- compute ------------------------------------------------------------------------------------


class Call(Job[Any]):
    """A job of one step: a plain function."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__()
        self._function = function
        self._value: Any = None

    def step(self) -> bool:
        self._value = self._function()
        return True

    def result(self) -> Any:
        return self._value


class Steps(Job[list[str]]):
    """Writes its name at every step; the first one may wait for `gate`."""

    def __init__(
        self, name: str, count: int, log: list[str], gate: threading.Event | None = None
    ) -> None:
        super().__init__()
        self._name, self._left, self._log, self._gate = name, count, log, gate
        self.begun = threading.Event()

    def step(self) -> bool:
        self.begun.set()
        if self._gate is not None:
            assert self._gate.wait(10)
        self._log.append(self._name)
        self._left -= 1
        return self._left == 0

    def result(self) -> list[str]:
        return self._log


async def test_an_arriving_turn_preempts_a_warm_up_between_steps() -> None:
    compute, log, gate = ComputeThread(), [], threading.Event()
    compute.start()
    warm = Steps("warm", 3, log, gate)
    warming = compute.submit(warm, Priority.WARM)
    await asyncio.to_thread(warm.begun.wait, 10)
    turn_done = compute.submit(Steps("turn", 2, log), Priority.PREFILL)
    token = compute.submit(Steps("token", 1, log), Priority.DECODE)
    gate.set()
    await asyncio.gather(warming, turn_done, token)
    assert log == ["warm", "token", "turn", "turn", "warm", "warm"]
    await compute.close()


async def test_a_job_that_fails_fails_alone() -> None:
    compute = ComputeThread()
    compute.start()
    with pytest.raises(Internal, match="ZeroDivisionError"):
        await compute.submit(Call(lambda: 1 // 0), Priority.DECODE)
    assert await compute.submit(Call(lambda: 7), Priority.DECODE) == 7
    await compute.close()


async def test_the_queue_is_bounded_and_closing_drops_it() -> None:
    compute, gate = ComputeThread(), threading.Event()
    compute.start()
    first = Steps("first", 1, [], gate)
    running = compute.submit(first, Priority.DECODE)
    await asyncio.to_thread(first.begun.wait, 10)
    waiting: list[Any] = [
        compute.submit(Call(lambda: 1), Priority.WARM) for _ in range(PREFILL_QUEUE_JOBS)
    ]
    with pytest.raises(Overloaded):
        compute.submit(Call(lambda: 1), Priority.PREFILL)
    token = compute.submit(Call(lambda: 1), Priority.DECODE)  # of a reply that has begun
    closing = asyncio.create_task(compute.close())
    results = await asyncio.gather(*waiting, token, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    gate.set()
    assert await running == ["first"]
    await closing


async def test_a_step_that_hangs_is_seen_running() -> None:
    clock = [100.0]
    compute, gate = ComputeThread(now=lambda: clock[0]), threading.Event()
    compute.start()
    assert compute.running() == (0.0, math.inf)
    job = Steps("job", 2, [], gate)
    done = compute.submit(job, Priority.PREFILL)
    await asyncio.to_thread(job.begun.wait, 10)
    number, _ = compute.running()
    clock[0] = 107.5
    assert compute.running()[0] == number == 1.0
    gate.set()
    await done
    await compute.close()
    assert compute.running() == (0.0, math.inf)


class Prompt(Steps):
    """`left` grows less with every step, 64 tokens each."""

    @property
    def left(self) -> int:
        return 64 * self._left


async def test_the_load_counts_each_prompt_once_and_each_reply() -> None:
    compute, gate = ComputeThread(), threading.Event()
    compute.start()
    first, second, dropped = (Prompt(name, 2, [], gate) for name in ("one", "two", "three"))
    done = [compute.submit(job, Priority.PREFILL) for job in (first, second, dropped)]
    await asyncio.to_thread(first.begun.wait, 10)
    dropped.cancel()
    with compute.decoding(), compute.decoding():
        assert compute.load() == Load(prefill_tokens=256, decoding=2)
    gate.set()
    await asyncio.gather(*done[:2])
    await compute.close()
    assert compute.load() == Load(prefill_tokens=0, decoding=0)


# -- settings and command line ------------------------------------------------------------------


def test_flags_come_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_EDGE_PORT", "7000")
    monkeypatch.setenv("SEGUE_EDGE_CLOUD", "127.0.0.1:1,127.0.0.1:2")
    assert read_config().port == 7000
    assert read_config(port=0).port == 0
    assert read_config().cloud == ("127.0.0.1:1", "127.0.0.1:2")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": 70000}, "port"),
        ({"plan": "fastest"}, "plan"),
        ({"cloud": ("nowhere",)}, "address"),
        ({"cache_mb": 0}, "cache-mb"),
        ({"link_mbps": -1}, "link-mbps"),
    ],
)
def test_a_bad_setting_is_named(flags: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_config(**flags)
    assert named in str(caught.value)


async def test_only_loopback_is_listened_on() -> None:
    with pytest.raises(NotLoopback):
        async with EdgeNode(read_config(host="0.0.0.0", port=0)):
            pass


async def test_a_model_that_is_not_built_is_named() -> None:
    with pytest.raises(ModelMissing, match="no-such-model"):
        async with EdgeNode(read_config(port=0, model="no-such-model", cloud=("127.0.0.1:1",))):
            pass


def test_the_command_line_ends_with_a_message_not_a_traceback() -> None:
    command = [sys.executable, "-m", "segue_edge", "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "without encryption and authentication" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_device_that_is_not_there_ends_with_a_message() -> None:
    with pytest.raises(InvalidArgument, match="no CUDA provider") as caught:
        choose_device("cuda", ["CPUExecutionProvider"])
    assert "edge-gpu" in str(caught.value)


def test_plan_explain_names_every_shape_and_the_choice() -> None:
    result = CliRunner().invoke(plan_app, ["explain", "--prompt", "512"])
    assert result.exit_code == 0, result.output
    for word in ("edge", "ship", "text", "split", "chosen"):
        assert word in result.output
    offline = CliRunner().invoke(plan_app, ["explain", "--offline"])
    assert "only edge is possible" in offline.output


def test_plan_explain_refuses_what_is_no_number() -> None:
    result = CliRunner().invoke(plan_app, ["explain", "--link-mbps", "0"])
    assert result.exit_code == 1
    assert "goodput" in result.output
