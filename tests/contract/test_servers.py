"""The child processes: ready when entered, typed errors, gone with their parent."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import psutil
import pytest

from segue_contract.errors import DeadlineExceeded, Internal, PortInUse
from segue_contract.servers import Broker, ChildProcess, Valkey
from tests.support.servers import require_broker


async def _ping(port: int) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"PING\r\n")
    reply = await reader.readline()
    writer.close()
    return reply


async def test_valkey_answers_when_entered_and_restarts_on_its_port(valkey: Valkey) -> None:
    assert await _ping(valkey.port) == b"+PONG\r\n"
    port = valkey.port
    valkey.process.kill()
    await valkey.process.wait()
    with pytest.raises(OSError):
        await _ping(port)
    await valkey.restart()
    assert valkey.port == port
    assert await _ping(port) == b"+PONG\r\n"


async def test_a_taken_port_is_named(valkey: Valkey, broker: Broker) -> None:
    with pytest.raises(PortInUse, match=str(valkey.port)):
        async with Valkey.start(port=valkey.port):
            pass
    with pytest.raises(PortInUse, match=str(broker.port)):
        async with Broker.start(port=broker.port):
            pass


@pytest.mark.parametrize("kind", ["mosquitto", "iotcore"])
async def test_each_broker_accepts_connections_when_entered(kind: str) -> None:
    require_broker(kind)
    async with Broker.start(kind=kind) as broker:
        assert broker.kind == kind
        _, writer = await asyncio.open_connection("127.0.0.1", broker.port)
        writer.close()
        pid = broker.process.pid
    assert not psutil.pid_exists(pid)


async def test_a_program_that_fails_says_why() -> None:
    code = "print('first'); print('the reason'); raise SystemExit(3)"
    with pytest.raises(Internal, match="status 3") as caught:
        await ChildProcess.start("it", [sys.executable, "-c", code], ready=lambda _: False)
    assert "the reason" in caught.value.fields["log"]


async def test_a_program_that_never_gets_ready_is_ended() -> None:
    pids: list[int] = []
    code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    with pytest.raises(DeadlineExceeded):
        await ChildProcess.start(
            "it",
            [sys.executable, "-c", code],
            ready=lambda _: False,
            timeout_s=1.0,
            on_line=lambda line: pids.append(int(line)),
        )
    assert len(pids) == 1
    assert not psutil.pid_exists(pids[0])


async def test_stop_kills_what_ignores_the_request() -> None:
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('up', flush=True)\nwhile True: signal.pause()"
    )
    child = await ChildProcess.start(
        "it", [sys.executable, "-c", code], ready=lambda line: line == "up"
    )
    assert await child.stop(grace_s=0.2) == -9
    assert await child.stop() == -9


_PARENT = """\
import asyncio
from segue_contract.servers import Broker, Valkey
async def main():
    async with Valkey.start() as valkey, Broker.start() as broker:
        print(valkey.process.pid, broker.process.pid, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


def test_servers_end_with_a_parent_that_is_killed() -> None:
    require_broker()
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    servers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(servers) == 2
    parent.kill()
    parent.communicate()
    for server in servers:
        try:
            server.wait(timeout=10)
        except psutil.TimeoutExpired:
            # In a container nobody may collect it; what counts is that it runs no more.
            assert server.status() == psutil.STATUS_ZOMBIE
