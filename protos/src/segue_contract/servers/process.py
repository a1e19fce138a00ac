"""One child process: started, watched until ready, its last words kept, always ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from segue_contract.errors import DeadlineExceeded, Internal, PortInUse
from segue_contract.limits import (
    CHILD_LOG_LINES,
    CHILD_STOP_S,
    PORT_ATTEMPTS,
    PREPARE_TIMEOUT_S,
    START_TIMEOUT_S,
)
from segue_contract.servers.ports import free_port

LOOPBACK = "127.0.0.1"
_SHIM = Path(__file__).with_name("_child.py")
_LINE_BYTES = 1 << 20


class ChildProcess:
    """A running program whose output (stdout and stderr) is read line by line.

    It is in a session of its own, so that Ctrl-C reaches only its parent, which ends it in order;
    and it ends by itself when its parent dies. The parent must start it from a thread that lives
    as long as it should (Linux ties the death signal to the thread).
    """

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._lines: deque[str] = deque(maxlen=CHILD_LOG_LINES)
        self._ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        name: str,
        argv: Sequence[str],
        *,
        ready: Callable[[str], bool],
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = START_TIMEOUT_S,
        on_line: Callable[[str], None] | None = None,
        prepares: Callable[[str], bool] | None = None,
    ) -> ChildProcess:
        """Start `argv` (absolute program path first) and wait for a line for which `ready` holds.

        `prepares`: holds for a line that says that it takes longer this time; from then on it has
        `PREPARE_TIMEOUT_S`.

        Raises:
            Internal: it ended before it was ready; `fields["log"]` has its last words.
            DeadlineExceeded: not ready in time; it has been ended.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", str(_SHIM), str(os.getpid()), *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
            limit=_LINE_BYTES,
        )  # fmt: skip
        child = cls(name, process)
        limit = asyncio.timeout(timeout_s)
        loop = asyncio.get_running_loop()
        began = loop.time()

        def told(line: str) -> None:
            if on_line is not None:
                on_line(line)
            starting = not (child._ready.done() or limit.expired())
            if starting and prepares is not None and prepares(line):
                limit.reschedule(loop.time() + max(timeout_s, PREPARE_TIMEOUT_S))

        try:
            async with limit:
                child._reader = asyncio.create_task(child._read(ready, told), name=f"read {name}")
                await asyncio.shield(child._ready)
        except TimeoutError:
            child._ready.cancel()  # nobody waits for it any more
            await child.stop()
            waited_s = loop.time() - began
            raise DeadlineExceeded(
                f"{name} was not ready within {waited_s:.0f} s.", log=child.log_tail()
            ) from None
        except BaseException:
            child._ready.cancel()
            await child.stop()
            raise
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    @property
    def ready_line(self) -> str:
        return self._ready.result()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines it printed."""
        return "\n".join(list(self._lines)[-lines:])

    async def wait(self) -> int:
        """Its exit status, once it ended."""
        return await self._process.wait()

    def kill(self) -> None:
        """SIGKILL, as a crash would look to others."""
        self._signal(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: it keeps its sockets and answers nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    async def stop(self, grace_s: float = CHILD_STOP_S) -> int:
        """SIGTERM, then SIGKILL after `grace_s`; safe to call twice. Returns the exit status."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        try:
            async with asyncio.timeout(grace_s):
                status = await self._process.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            status = await self._process.wait()
        except BaseException:
            self._signal(signal.SIGKILL)
            raise
        if self._reader is not None:
            await asyncio.wait([self._reader], timeout=1.0)
            self._reader.cancel()
        return status

    def _signal(self, number: int) -> None:
        if self._process.returncode is None:
            # Not Process.send_signal: that polls, may reap the child under asyncio's watcher, and
            # its exit status is lost ("Unknown child process").
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    async def _read(self, ready: Callable[[str], bool], told: Callable[[str], None]) -> None:
        stream = self._process.stdout
        assert stream is not None
        while True:
            try:
                data = await stream.readline()
            except ValueError:  # a line above the limit: of no use to anyone
                continue
            if not data:
                break
            line = data.decode("utf-8", "replace").rstrip()
            self._lines.append(line)
            told(line)
            if not self._ready.done() and ready(line):
                self._ready.set_result(line)
        if not self._ready.done():
            status = await self._process.wait()
            self._ready.set_exception(
                Internal(
                    f"{self.name} ended with status {status} before it was ready.",
                    hint=self.log_tail(5),
                    log=self.log_tail(),
                    status=status,
                )
            )


async def start_on_port(
    name: str, port: int, start: Callable[[int], Awaitable[ChildProcess]]
) -> tuple[ChildProcess, int]:
    """Start a server on `port`; with 0, on free ports until one works.

    Raises:
        PortInUse: the asked port is taken (or all tried ones were).
    """
    tried = 0
    while True:
        tried += 1
        chosen = port or free_port()
        try:
            return await start(chosen), chosen
        except Internal as error:
            if "in use" not in str(error.fields.get("log", "")).lower():
                raise
            if port or tried >= PORT_ATTEMPTS:
                raise PortInUse(
                    f"{name} cannot listen on port {chosen}: another program does.",
                    hint="Choose another port, or 0 for a free one.",
                    port=chosen,
                ) from error
