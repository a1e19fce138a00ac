"""A certificate authority for tests, and files as a node has them."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from segue.local.authority import issue, new_authority
from segue_contract.transport.tls import TlsFiles


class Authority:
    """Writes what it issues into `folder`."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._root = new_authority(name, datetime.now(UTC))
        self._folder = folder
        self.file = folder / f"{name}.crt"
        self.file.write_bytes(self._root.certificate)

    def issue(
        self,
        file: str,
        *hosts: str,
        name: str = "",
        days: int = 1,
        now: datetime | None = None,
    ) -> TlsFiles:
        """`file`.crt and `file`.key; what was there is replaced, one after the other."""
        made = issue(self._root, name, hosts or ("127.0.0.1",), now or datetime.now(UTC), days=days)
        chain, key = self._folder / f"{file}.crt", self._folder / f"{file}.key"
        replace(chain, made.certificate)
        replace(key, made.key)
        return TlsFiles(chain, key, self.file)

    @property
    def believed(self) -> TlsFiles:
        """What a client without a certificate of its own has."""
        return TlsFiles(ca=self.file)


def replace(path: Path, data: bytes) -> None:
    """As those do who rotate certificates: the file is there whole, the old one or the new."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    os.replace(new, path)
