"""The ledger on disk: one JSON line per turn, appended off the event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from segue_contract.errors import InvalidArgument

log = structlog.get_logger("segue.ledger")


class LedgerFile:
    """Appends to `path`, or nowhere. A disk that fails costs the entry, never the turn."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = asyncio.Lock()
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("ab").close()
            except OSError as error:
                raise InvalidArgument(
                    f"The ledger file {path} cannot be written: {error.strerror}.",
                    hint="Choose another --ledger file.",
                ) from error

    async def append(self, line: bytes) -> None:
        if self._path is None:
            return
        async with self._lock:
            try:
                await asyncio.to_thread(self._write, line)
            except OSError as error:
                log.warning("ledger_not_written", file=str(self._path), error=str(error))

    def _write(self, line: bytes) -> None:
        assert self._path is not None
        with self._path.open("ab") as file:
            file.write(line)
