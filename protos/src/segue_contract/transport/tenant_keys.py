"""The tenants' public keys as a file that may be replaced while a node runs, and its checker."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import structlog

from segue_contract.errors import InvalidArgument, SegueError
from segue_contract.identity.keys import KeySet
from segue_contract.identity.principal import Principal
from segue_contract.identity.tokens import TokenChecker
from segue_contract.limits import GATE_LOOK_S

log = structlog.get_logger("segue.keys")


class TenantKeys:
    """Says who bears a token, by the keys that the file holds now; the last good ones where it
    cannot be read. It is looked at once in `GATE_LOOK_S`.

    Raises:
        InvalidArgument: the file cannot be read at the start.
    """

    def __init__(self, path: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._monotonic = monotonic
        self._stamp = self._stat()
        self._checker = self._read()
        self._looked_s = monotonic()
        self._changes = 0

    def principal(self, token: str, now_s: float, *, late_s: float = 0.0) -> Principal:
        """As `TokenChecker`. Raises Unauthenticated."""
        self.changes()
        return self._checker.principal(token, now_s, late_s=late_s)

    @property
    def tenants(self) -> set[str]:
        """Those that the file names; of a key that was revoked, too: its sessions are there."""
        self.changes()
        return self._tenants

    def knows(self, token: str) -> bool:
        """As `TokenChecker`."""
        return self._checker.knows(token)

    def key_of(self, token: str) -> str:
        """As `TokenChecker`. Raises Unauthenticated."""
        return self._checker.key_of(token)

    def void_before(self, key: str) -> float:
        """As `TokenChecker`."""
        self.changes()
        return self._checker.void_before(key)

    def changes(self) -> int:
        """How often the file's keys changed so far."""
        if self._monotonic() - self._looked_s >= GATE_LOOK_S:
            self._look()
        return self._changes

    def _look(self) -> None:
        self._looked_s = self._monotonic()
        stamp = self._stat()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._checker = self._read()
            self._changes += 1
        except SegueError as error:
            log.error("tenant_keys_kept", file=str(self._path), error=str(error),
                      hint="The last good ones are used until the file is right.")  # fmt: skip

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_size, found.st_ino)

    def _read(self) -> TokenChecker:
        try:
            text = self._path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument(
                f"The tenants' keys {self._path} cannot be read.",
                hint="Give the file of `segue tenant add` as --tenant-keys.",
            ) from error
        keys = KeySet.read(text)
        self._tenants = {key.tenant for key in keys.keys}
        return TokenChecker(keys)
