"""The tenants' public keys as a file that may be replaced while a node runs, and its checker."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from segue_contract.errors import InvalidArgument
from segue_contract.identity.keys import KeySet
from segue_contract.identity.principal import Principal
from segue_contract.identity.tokens import TokenChecker
from segue_contract.transport.watched_file import WatchedFile


class _Keys(NamedTuple):
    """`tenants`: those that the file names; of a key that was revoked, too."""

    checker: TokenChecker
    tenants: set[str]


class TenantKeys:
    """Says who bears a token, by the keys that the file holds now, as of `WatchedFile`.

    Raises:
        InvalidArgument: the file cannot be read at the start.
    """

    def __init__(self, path: Path, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._file = WatchedFile(path, _read, "tenant_keys_kept", monotonic)

    def principal(self, token: str, now_s: float, *, late_s: float = 0.0) -> Principal:
        """As `TokenChecker`. Raises Unauthenticated."""
        return self._file.value.checker.principal(token, now_s, late_s=late_s)

    @property
    def tenants(self) -> set[str]:
        """Those that the file names; of a key that was revoked, too: its sessions are there."""
        return self._file.value.tenants

    def knows(self, token: str) -> bool:
        """As `TokenChecker`."""
        return self._file.value.checker.knows(token)

    def key_of(self, token: str) -> str:
        """As `TokenChecker`. Raises Unauthenticated."""
        return self._file.value.checker.key_of(token)

    def void_before(self, key: str) -> float:
        """As `TokenChecker`."""
        return self._file.value.checker.void_before(key)

    def changes(self) -> int:
        """How often the file's keys changed so far."""
        _ = self._file.value
        return self._file.changes


def _read(path: Path) -> _Keys:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"The tenants' keys {path} cannot be read.",
            hint="Give the file of `segue tenant add` as --tenant-keys.",
        ) from error
    keys = KeySet.read(text)
    return _Keys(TokenChecker(keys), {key.tenant for key in keys.keys})
