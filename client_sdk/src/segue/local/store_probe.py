"""Links to a session store for `segue doctor`, which has no Redis client: a little RESP."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import parse_qs, unquote, urlsplit

from segue_contract.errors import Unreachable
from segue_contract.store_url import Address, StoreKind, StoreUrl, parse_store_url

# Far more than any answer to what is asked here.
_LINE_BYTES = 1 << 16
_ITEMS = 1 << 15
_DEPTH = 6


class RespError(str):
    """An error that the server answered with."""


Reply = str | int | None | list["Reply"]


class StoreLink:
    """One connection; each `ask` waits for its answer. Deadlines are the caller's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, *command: str) -> Reply:
        """Raises Unreachable where the answer is none of a Redis, OSError where none came."""
        parts = [part.encode() for part in command]
        self._writer.write(
            b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(p), p) for p in parts)
        )
        try:
            return await self._reply(_DEPTH)
        except (ValueError, asyncio.IncompleteReadError):  # a line without end, too
            raise Unreachable("It does not answer as Redis does.") from None

    async def sign_in(self, username: str, password: str) -> None:
        """Raises Unreachable where the server does not take them."""
        if password:
            answer = await self.ask("AUTH", *([username] if username else []), password)
            if isinstance(answer, RespError):
                raise Unreachable(
                    f"It refuses this user and password ({answer.partition(' ')[0]}).",
                    hint="Write them as redis://user:password@host, percent-encoded.",
                )

    async def _reply(self, depth: int) -> Reply:
        line = await self._reader.readuntil(b"\r\n")
        kind, text = line[:1], line[1:-2].decode("utf-8", "replace")
        if kind == b"+":
            return text
        if kind == b"-":
            return RespError(text)
        number = int(text)
        if kind == b":":
            return number
        if kind == b"$" and number <= _LINE_BYTES:
            if number < 0:
                return None
            return (await self._reader.readexactly(number + 2))[:-2].decode("utf-8", "replace")
        if kind == b"*" and number <= _ITEMS and depth:
            return None if number < 0 else [await self._reply(depth - 1) for _ in range(number)]
        raise ValueError(line)


@asynccontextmanager
async def answering_stores(url: str) -> AsyncIterator[list[StoreLink]]:
    """Links to the server, to the primary that the Sentinels name, or to each of a Cluster's.

    Raises:
        Unreachable: none is known there.
        InvalidArgument: `url` is no store's.
        OSError: nobody answers.
    """
    where = parse_store_url(url)
    async with AsyncExitStack() as stack:

        async def link(address: Address | None) -> StoreLink:
            one = await stack.enter_async_context(_open(where, address))
            await one.sign_in(where.username, where.password)
            return one

        if where.kind is StoreKind.ONE:
            yield [await link(where.seeds[0] if where.seeds else None)]
        elif where.kind is StoreKind.SENTINEL:
            yield [await link(await _named_primary(where))]
        else:
            yield [await link(one) for one in await _cluster_primaries(where)]


@asynccontextmanager
async def _open(where: StoreUrl, address: Address | None) -> AsyncIterator[StoreLink]:
    parts = urlsplit(where.plain)
    if address is None:
        reader, writer = await asyncio.open_unix_connection(unquote(parts.path))
    else:
        secure = _tls(parts.query) if parts.scheme == "rediss" else None
        reader, writer = await asyncio.open_connection(*address, ssl=secure, limit=_LINE_BYTES)
    try:
        yield StoreLink(reader, writer)
    finally:
        writer.close()


def _tls(query: str) -> ssl.SSLContext:
    asked = parse_qs(query)
    context = ssl.create_default_context(cafile=asked.get("ssl_ca_certs", [None])[0])
    certificate = asked.get("ssl_certfile", [None])[0]
    if certificate is not None:
        context.load_cert_chain(certificate, asked.get("ssl_keyfile", [None])[0])
    if asked.get("ssl_cert_reqs") == ["none"]:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def _named_primary(where: StoreUrl) -> Address:
    """As the first Sentinel that knows it says."""
    reasons = []
    for seed in where.seeds:
        try:
            async with _open(where, seed) as sentinel:
                await sentinel.sign_in(where.sentinel_username, where.sentinel_password)
                found = await sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", where.service)
        except (OSError, Unreachable) as error:
            reasons.append(f"{seed[0]}:{seed[1]}: {error}")
            continue
        if isinstance(found, list) and len(found) == 2:
            return str(found[0]), int(str(found[1]))
        reasons.append(f"{seed[0]}:{seed[1]}: {found or 'it watches none of that name'}")
    raise Unreachable(
        f"No Sentinel names a primary {where.service!r} ({'; '.join(reasons)}).",
        hint="Write redis+sentinel://host:port,host:port/NAME with the name that they watch.",
    )


async def _cluster_primaries(where: StoreUrl) -> list[Address]:
    """Of all slots, as the first node that answers knows them."""
    reasons = []
    for seed in where.seeds:
        try:
            async with _open(where, seed) as node:
                await node.sign_in(where.username, where.password)
                slots = await node.ask("CLUSTER", "SLOTS")
        except (OSError, Unreachable) as error:
            reasons.append(f"{seed[0]}:{seed[1]}: {error}")
            continue
        found = _primaries(slots, seed[0]) if isinstance(slots, list) else set()
        if found:
            return sorted(found)
        reasons.append(f"{seed[0]}:{seed[1]}: {slots or 'no slot has a node'}")
    raise Unreachable(
        f"No Cluster answers there ({'; '.join(reasons)}).",
        hint="Leave out cluster=1 for a server that is no member of a Cluster.",
    )


def _primaries(slots: list[Reply], asked: str) -> set[Address]:
    """A node that does not know its own address is the one that was asked."""
    found = set()
    for one in slots:
        match one:
            case [int(), int(), [host, int(port), *_], *_]:
                found.add((str(host or asked), port))
    return found
