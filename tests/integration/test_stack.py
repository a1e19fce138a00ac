"""The machinery of the local stack: programs that fail, hang, crash, and outlive nobody."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from segue.local.parts import Part, Program, Server
from segue.local.revival import Restarts, keep_up
from segue.local.stack import LocalStack, together
from segue_contract.errors import Internal, InvalidArgument, PortInUse, StartFailed
from segue_contract.limits import RESTARTS
from segue_contract.servers import Broker, Valkey
from segue_contract.servers.ports import check_free, free_port, is_free
from tests.support.servers import require_broker, require_valkey

WAIT_S = 30.0

# Serves nothing, but says that it is ready, and ends when it is asked to.
READY = """
import json, os, signal, socket, sys, threading
ended = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: ended.set())
listener = socket.create_server(("127.0.0.1", PORT))
print("a line before", flush=True)
print(json.dumps({"event": "ready", "role": "edge", "host": "127.0.0.1", "port": PORT,
                  "seconds": 0.1, "model": "tiny"}), flush=True)
print("a line after", flush=True)
ended.wait()
print("said goodbye", flush=True)
"""

Make = Callable[..., Program]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    made: list[Program] = []

    def make_program(
        script: str,
        timeout_s: float = WAIT_S,
        on_crash: Callable[[Part], None] | None = None,
        on_news: Callable[[Part, str], None] | None = None,
    ) -> Program:
        program = Program(
            "edge-1",
            [sys.executable, "-c", script],
            log=tmp_path / "edge-1.log",
            timeout_s=timeout_s,
            on_crash=on_crash,
            on_news=on_news,
        )
        made.append(program)
        return program

    yield make_program
    for program in made:
        await program.stop()


def ready_on(port: int) -> str:
    return READY.replace("PORT", str(port))


async def test_a_program_is_ready_stops_and_comes_back_at_its_port(make: Make) -> None:
    port = free_port()
    program = make(ready_on(port))
    await program.start()
    assert program.address == f"127.0.0.1:{port}"
    assert program.ready is not None
    assert program.ready.facts == {"model": "tiny"}
    first = program.pid
    await program.stop()
    assert not program.running
    assert program.ended_how == "exit code 0"
    assert "said goodbye" in program.log.read_text()
    assert is_free(port)
    await program.restart()
    assert program.address == f"127.0.0.1:{port}"
    assert program.pid != first
    await program.stop()
    await program.stop()


async def test_a_program_that_takes_long_says_what_it_does(make: Make) -> None:
    news: list[tuple[str, str]] = []
    said = [{"event": "preparing", "what": "compiles"}, {"event": "other", "what": "no"}, "x", [1]]
    before = f"import json\nfor said in {said!r}: print(json.dumps(said), flush=True)\n"
    program = make(
        before + ready_on(free_port()), on_news=lambda part, what: news.append((part.name, what))
    )
    await program.start()
    assert news == [("edge-1", "compiles")]


async def test_a_program_that_says_that_it_prepares_has_longer(make: Make) -> None:
    said = {"event": "preparing", "what": "compiles"}
    before = f"import json, time\nprint(json.dumps({said!r}), flush=True)\ntime.sleep(2.5)\n"
    program = make(before + ready_on(free_port()), timeout_s=2.0)
    await program.start()
    assert program.running


async def test_a_program_that_ends_early_says_why(make: Make) -> None:
    script = 'import sys; sys.exit("There is no built model here.")'
    program = make(script)
    with pytest.raises(StartFailed, match="ended before it was ready: exit code 1") as caught:
        await program.start()
    assert "There is no built model here." in caught.value.hint
    assert str(program.log) in caught.value.hint
    assert not program.running


async def test_a_program_that_says_nothing_is_ended(make: Make) -> None:
    before = psutil.Process().children(recursive=True)
    program = make("import signal; signal.pause()", timeout_s=1.0)
    with pytest.raises(StartFailed, match=r"not ready within \d+ s"):
        await program.start()
    assert psutil.Process().children(recursive=True) == before


async def test_a_crash_is_told_once_and_a_kill_is_none(make: Make) -> None:
    crashed: list[Part] = []
    told = asyncio.Event()

    def on_crash(part: Part) -> None:
        crashed.append(part)
        told.set()

    program = make(ready_on(free_port()), on_crash=on_crash)
    await program.start()
    await program.kill()
    assert program.ended_how == "killed by SIGKILL"
    await program.start()
    async with asyncio.timeout(WAIT_S):
        while "a line after" not in program.tail():  # noqa: ASYNC110 - another process's output
            await asyncio.sleep(0.01)
        os.kill(program.pid, signal.SIGSEGV)
        await told.wait()
    assert crashed == [program]
    assert program.ended_how == "killed by SIGSEGV"
    assert "a line before" in program.tail()


async def test_a_part_that_ends_each_time_is_given_up(make: Make, tmp_path: Path) -> None:
    """Not started again for ever: what its last lines say is told instead."""
    stack = LocalStack(folder=tmp_path)
    ended: list[Part] = []
    dying = make(
        ready_on(free_port()).replace("ended.wait()", "sys.exit(3)"), on_crash=stack._on_crash
    )
    await dying.start()
    with pytest.raises(StartFailed, match="edge-1 ended by itself: exit code 3"):
        await asyncio.wait_for(keep_up(stack, ended.append), WAIT_S)
    assert ended == [dying] * RESTARTS


async def test_a_part_that_does_not_start_again_is_given_up(make: Make, tmp_path: Path) -> None:
    stack = LocalStack(folder=tmp_path)
    mark = tmp_path / "started"
    once = f"import pathlib, sys\nmark = pathlib.Path({str(mark)!r})\n"
    once += "if mark.exists(): sys.exit('no second time')\nmark.touch()\n"
    dying = make(
        once + ready_on(free_port()).replace("ended.wait()", "sys.exit(3)"),
        on_crash=stack._on_crash,
    )
    await dying.start()
    with pytest.raises(StartFailed) as caught:
        await asyncio.wait_for(keep_up(stack, lambda part: None), WAIT_S)
    assert "no second time" in caught.value.hint


def test_restarts_are_counted_in_a_window() -> None:
    restarts = Restarts(most=2, window_s=60.0)
    assert restarts.allow(0.0)
    assert restarts.allow(1.0)
    assert not restarts.allow(59.0)
    assert restarts.allow(60.0)
    assert not restarts.allow(60.5)


async def test_servers_are_killed_and_restarted_at_their_address() -> None:
    require_valkey()
    require_broker()
    for server in (Server("store", Valkey.start()), Server("broker", Broker.start())):
        await server.start()
        address, first = server.address, server.pid
        await server.kill()
        assert not server.running
        await server.restart()
        assert server.address == address
        assert server.pid != first
        await server.stop()
        assert not psutil.pid_exists(first)


async def test_children_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """SIGKILL leaves the parent no time for a goodbye: the kernel does it."""
    require_valkey()
    parent = textwrap.dedent(f"""
        import asyncio, sys
        from pathlib import Path
        from segue.local.parts import Program, Server
        from segue_contract.servers import Valkey

        async def main():
            store = Server("store", Valkey.start())
            await store.start()
            program = Program("edge-1", [sys.executable, "-c", {ready_on(free_port())!r}],
                              log=Path({str(tmp_path)!r}) / "edge.log")
            await program.start()
            print(store.pid, program.pid, flush=True)
            await asyncio.Event().wait()

        asyncio.run(main())
        """)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", parent, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(WAIT_S):
        line = await process.stdout.readline()
    children = [psutil.Process(int(pid)) for pid in line.split()]
    assert len(children) == 2
    process.kill()
    await process.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=WAIT_S)
    # where nobody reaps orphans (a container without an init) they stay as zombies: ended, too
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in alive)


async def test_a_port_that_is_taken_is_refused_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=f"Port {port}.*taken") as caught:
            check_free(port, "--edge-port")
        assert "--edge-port" in caught.value.hint
        stack = LocalStack(edge_port=port)
        with pytest.raises(PortInUse):
            await stack.__aenter__()
        assert not stack.processes
    assert is_free(port)


def test_the_number_of_edges_is_bounded() -> None:
    for edges in (0, 9):
        with pytest.raises(InvalidArgument, match=f"{edges} edge nodes"):
            LocalStack(edges=edges)


async def test_a_stack_whose_model_is_missing_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    require_valkey()
    require_broker()
    stack = LocalStack(model=str(tmp_path / "no-such-model"), folder=tmp_path / "logs")
    with pytest.raises(StartFailed) as caught:
        await stack.__aenter__()
    assert "no-such-model" in caught.value.hint
    assert stack.processes
    assert not any(part.running for part in stack.processes.values())


async def test_the_first_error_of_several_jobs_ends_the_others() -> None:
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def fails() -> None:
        raise Internal("broken")

    with pytest.raises(Internal, match="broken"):
        await together([waits(), fails()])
    assert ended == ["cancelled"]
