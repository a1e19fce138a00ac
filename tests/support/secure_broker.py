"""Mosquitto with TLS and passwords."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from segue_contract.transport.tls import TlsFiles
from tests.support.brokers import mosquitto


@asynccontextmanager
async def secure_mosquitto(
    folder: Path, users: Mapping[str, str], tls: TlsFiles | None, *, clients: bool = False
) -> AsyncIterator[str]:
    """Its URL, without a login. `clients`: it wants client certificates, too."""
    passwords = folder / "passwords"
    passwords.write_text("".join(f"{user}:{_hashed(word)}\n" for user, word in users.items()))
    passwords.chmod(0o600)
    more = f"password_file {passwords}\n"
    if tls is not None:
        more += f"certfile {tls.certificate}\nkeyfile {tls.key}\ncafile {tls.ca}\n"
    if clients:
        more += "require_certificate true\n"
    async with mosquitto(more, anonymous=False) as url:
        yield url.replace("mqtt://", "mqtts://") if tls is not None else url


def _hashed(password: str) -> str:
    """As mosquitto_passwd writes it: PBKDF2 of SHA-512, 101 rounds."""
    salt = os.urandom(12)
    key = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, 101)
    return f"$7$101${base64.b64encode(salt).decode()}${base64.b64encode(key).decode()}"
