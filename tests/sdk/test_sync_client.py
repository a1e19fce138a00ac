"""`segue.SyncClient`: the same methods as `Client`, for code without an event loop."""

from __future__ import annotations

import asyncio
import gc
import inspect
import re
import runpy
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

import segue
from segue import errors
from segue._portal import Portal
from segue.events import Ended, Entry, Snapshot
from segue.testing import Pause, SyncFakeNode, Wait
from tests.support.fake_agent import FakeAgent, FakeLog, ended, frame, started

SCRIPT = Path(__file__).parents[2] / "scripts" / "sync-client"
TWINS = {
    segue.Client: segue.SyncClient,
    segue.Session: segue.SyncSession,
    segue.Turn: segue.SyncTurn,
    segue.Follower: segue.SyncFollower,
}
INNER = runpy.run_path(str(SCRIPT))["INNER"]


def test_the_module_is_what_the_script_writes() -> None:
    made = runpy.run_path(str(SCRIPT))
    assert made["TARGET"].read_text(encoding="utf-8") == made["generate"]()


@pytest.mark.parametrize("cls", TWINS, ids=lambda cls: cls.__name__)
def test_every_public_method_has_a_twin(cls: type) -> None:
    twin = TWINS[cls]
    names = {name for name in vars(cls) if not name.startswith("_")} - INNER
    assert names
    for name in names:
        ours = {"aclose": "close"}.get(name, name)
        assert ours in vars(twin)
        one, other = getattr(cls, name), getattr(twin, ours)
        assert isinstance(one, property) == isinstance(other, property), name
        if not isinstance(one, property):
            theirs, own = inspect.signature(one), inspect.signature(other)
            assert list(theirs.parameters.values()) == list(own.parameters.values()), name
            assert not inspect.iscoroutinefunction(other), name


async def test_every_attribute_has_a_twin() -> None:
    async with FakeAgent(FakeLog("trip"), lambda _: []) as agent:
        client = segue.Client(agent.address, device="phone")
        session = await client.session("trip")
        made = {
            segue.Client: client, segue.Session: session, segue.Turn: session.run("x"),
            segue.Follower: session.follow(),
        }  # fmt: skip
        for cls, one in made.items():
            names = {name for name in vars(one) if not name.startswith("_")}
            assert names <= set(vars(TWINS[cls])), cls
        await client.close()


@pytest.mark.timeout(60)
def test_a_turn_and_a_follower() -> None:
    with SyncFakeNode(["Paris it is.", "yes"]) as node:
        with node.client("phone") as phone, node.client("tv") as tv:
            assert phone.device == "phone"
            session = phone.session("trip")
            with session.run("Where to?") as turn:
                events = list(turn)
            assert isinstance(events[-1], Ended)
            assert turn.text == "".join(event.text for event in events) == "Paris it is."
            with session.run("sure?") as turn:
                assert turn.result().text == "yes"
            seen = []
            for item in tv.session("trip").follow(1):
                seen.append(item)
                if item.offset == session.tail.offset + 5:
                    break
            assert isinstance(seen[0], Snapshot)
            assert all(isinstance(item, Entry) for item in seen[1:])
            session.set("city", "Paris")
            assert session.state().values == {"city": b"Paris"}
            assert [one.session for one in phone.all_sessions()] == ["trip"]
            assert phone.with_options(timeout=5.0).sessions()[0].turns == 2
        with pytest.raises(errors.Unreachable):
            phone.sessions()
        phone.close()


@pytest.mark.timeout(60)
def test_errors_and_faults() -> None:
    with SyncFakeNode(["yes"]) as node, node.client("phone") as client:
        with pytest.raises(errors.UnknownSession):
            client.session("trip", must_exist=True)
        session = client.session("trip")
        node.fail_next("RunTurn", errors.Overloaded("Full.", retry_after_s=0.01))
        with session.run("go", max_retries=1) as turn:
            node.break_connections()
            assert turn.result().text == "yes"
        node.disconnect()
        with pytest.raises(errors.Unreachable):
            client.sessions()
        node.reconnect()
        node.until("trip", lambda state: state.turns[0].ended)
        assert node.state("trip").turns[0].text == "yes"
        assert list(turn.settled()) == []


@pytest.mark.timeout(60)
def test_many_threads_use_one_client() -> None:
    with SyncFakeNode([str] * 16) as node, node.client("phone") as client:

        def ask(number: int) -> str:
            session = client.session(f"s{number}")
            with session.run(f"question {number}") as turn:
                return turn.result().text

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(16))) == [f"question {n}" for n in range(16)]


@pytest.mark.timeout(60)
def test_closing_ends_a_wait_in_another_thread() -> None:
    with SyncFakeNode() as node, node.client("phone") as client:
        waiting, told = threading.Event(), []

        def follow() -> None:
            try:
                for _ in client.session("trip").follow():
                    waiting.set()
            except errors.SegueError as error:
                told.append(error)

        thread = threading.Thread(target=follow)
        thread.start()
        assert waiting.wait(30)
        client.close()
        thread.join(30)
        assert not thread.is_alive()
        assert not told  # a follower of a closed client ends


async def test_over_real_connections() -> None:
    def script(request: object) -> list[object]:
        return [started("t"), frame(0, "yes"), ended(1)]

    def story(address: str) -> str:
        with segue.SyncClient(address, device="phone", timeout=30.0) as client:
            session = client.session("trip")
            session.set("a", "1")
            with session.run("go") as turn:
                text = turn.result().text
            for item in session.follow():
                return text + item.state.values["a"].decode()  # type: ignore[union-attr]
        return ""

    async with asyncio.timeout(60), FakeAgent(FakeLog("trip"), script) as agent:  # type: ignore[arg-type]
        told = await asyncio.gather(*(asyncio.to_thread(story, agent.address) for _ in range(3)))
        assert told == ["yes 1"] * 3


@pytest.mark.timeout(60)
def test_its_own_thread_cannot_wait_for_itself() -> None:
    portal = Portal()
    try:
        with pytest.raises(errors.InvalidArgument, match="own thread"):
            portal.run(lambda: portal.run(lambda: 1))
        assert portal.run(lambda: 2) == 2
    finally:
        portal.close()
    portal.close()


@pytest.mark.timeout(60)
def test_a_client_that_nobody_has_any_more_leaves_no_thread() -> None:
    def ours() -> int:
        return sum(thread.name == "segue" for thread in threading.enumerate())

    gc.collect()
    before = ours()
    client = segue.SyncClient("127.0.0.1:1", device="phone")
    assert ours() == before + 1
    del client
    gc.collect()
    assert ours() == before


@pytest.mark.timeout(60)
def test_no_call_waits_for_ever_for_a_client_that_is_being_closed() -> None:
    checked, go_on = threading.Event(), threading.Event()

    class Late(Portal):
        """Between the look whether it is closed, and the call, another thread closes it."""

        def _check(self) -> None:
            super()._check()
            checked.set()
            assert go_on.wait(30)

    portal = Late()
    pool = ThreadPoolExecutor(2)
    called = pool.submit(portal.run, lambda: 1)
    assert checked.wait(30)
    closed = pool.submit(portal.close)
    wait([closed], 0.2)  # it has to wait for the call, and may not end before
    go_on.set()
    assert not wait([called, closed], 20).not_done
    assert called.exception() is None or isinstance(called.exception(), errors.Unreachable)
    with pytest.raises(errors.Unreachable):
        portal.run(lambda: 1)
    pool.shutdown()


@pytest.mark.timeout(60)
def test_what_a_turns_block_raises_is_told_after_another_thread_closed() -> None:
    with SyncFakeNode([["one", Pause(3600)]]) as node, node.client("phone") as client:
        session = client.session("trip")

        def fails() -> None:
            with session.run("go"):
                client.close()
                node.close()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fails()


PROGRAM = """
import segue, sys
from segue.testing import SyncFakeNode, Pause
with SyncFakeNode([["one", Pause(3600)]]) as node, node.client("phone") as client:
    session = client.session("trip")
    with session.run("go") as turn:
        for event in turn:
            print(event.text or "-", flush=True)
"""


FOLLOWING = """
from segue.testing import SyncFakeNode
with SyncFakeNode() as node, node.client("phone") as client:
    session = client.session("trip")
    for item in session.follow():
        print("one", flush=True)
"""


@pytest.mark.parametrize("program", [PROGRAM, FOLLOWING], ids=["turn", "follow"])
def test_ctrl_c_ends_it_at_once_and_cleanly(program: str) -> None:
    # A shell's background jobs ignore SIGINT, and what they start inherits that.
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    child = subprocess.Popen(
        [sys.executable, "-c", hears + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        while (line := child.stdout.readline()) != "one\n":
            assert line == "-\n"
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert len(re.findall(r"^\w*(?:Error|Interrupt)", said, re.MULTILINE)) == 1, said
    assert "never retrieved" not in said
    assert "destroyed" not in said


def test_a_program_that_closes_nothing_ends() -> None:
    program = (
        "import segue\nfrom segue.testing import SyncFakeNode\n"
        "node = SyncFakeNode(['hi']); client = node.client('phone'); s = client.session('trip')\n"
        "turn = s.run('go').__enter__(); items = iter(s.follow()); next(items)\n"
        "other = segue.SyncClient('127.0.0.1:1', device='p')\n"
        "print('done')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_held_reply_is_stopped() -> None:
    script = ["one", Pause(0), Wait(asyncio.Event()), "two"]
    with SyncFakeNode([script]) as node, node.client("phone") as client:
        session = client.session("trip")
        with session.run("go") as turn:
            assert session.stop()
            assert turn.result().reason == "cancelled"
