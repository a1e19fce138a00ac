"""Why a TLS connection fails: a second handshake, with Python's TLS, which says what it saw."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from segue.local.authority import Facts, facts_of
from segue_contract.transport.tls import TlsFiles, client_context
from segue_contract.transport.tls_reasons import Reason, explain

TIMEOUT_S = 3.0
# A server that refuses our certificate says so after its handshake; another may say nothing.
_REFUSAL_S = 0.5

_SPEAKS_TLS = Reason(
    "It speaks TLS, and no authority is given here.",
    "Give the certificate of its authority: --tls-ca FILE (SEGUE_CA).",
)
_WANTS_CLIENT = Reason(
    "It ends the connection after the handshake: it wants a client certificate that it believes.",
    "Give --tls-cert and --tls-key (SEGUE_CERT, SEGUE_KEY), issued by its authority.",
)


@dataclass(frozen=True, slots=True)
class TlsSeen:
    """`certificate` None: none was shown. `reason` None: nothing is wrong with TLS."""

    certificate: Facts | None
    reason: Reason | None


async def look_at_tls(
    host: str, port: int, files: TlsFiles | None, *, grpc: bool = False
) -> TlsSeen:
    """What `host` shows at `port`, and what is wrong with it for a client that has `files`.

    `files` None: a client without TLS.

    Raises:
        OSError: nobody answers there, or too late.
        InvalidArgument: the files cannot be used.
    """
    async with asyncio.timeout(TIMEOUT_S):
        anybody = ssl.create_default_context() if files is None else client_context(files)
        anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
        try:
            async with _connected(host, port, anybody, grpc) as (reader, writer):
                shown = _certificate(writer)
                refused = await _refused(reader)
        except ssl.SSLError as error:
            wrong = (
                None if files is None else explain(str(error)) or explain("wrong version number")
            )
            return TlsSeen(None, wrong)
        if files is None:
            return TlsSeen(shown, _SPEAKS_TLS)
        try:
            async with _connected(host, port, client_context(files), grpc):
                pass
        except ssl.SSLError as error:
            known = explain(str(error))
            return TlsSeen(shown, known or Reason(f"TLS fails: {error.reason}.", ""))
        return TlsSeen(shown, _WANTS_CLIENT if refused else None)


@asynccontextmanager
async def _connected(
    host: str, port: int, context: ssl.SSLContext, grpc: bool
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    if grpc:
        context.set_alpn_protocols(["h2"])
    try:
        reader, writer = await asyncio.open_connection(
            host, port, ssl=context, server_hostname=host.strip("[]")
        )
    except ConnectionResetError:
        # answered a ClientHello by closing: whatever it speaks, it is not TLS
        raise ssl.SSLError(1, "wrong version number") from None
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def _certificate(writer: asyncio.StreamWriter) -> Facts | None:
    secure = writer.get_extra_info("ssl_object")
    data = secure.getpeercert(binary_form=True) if secure is not None else None
    with contextlib.suppress(ValueError):
        return facts_of(data) if data else None
    return None


async def _refused(reader: asyncio.StreamReader) -> bool:
    """Whether it ends the connection at once."""
    try:
        async with asyncio.timeout(_REFUSAL_S):
            return not await reader.read(1)
    except TimeoutError:
        return False
    except (ssl.SSLError, ConnectionError):
        return True
