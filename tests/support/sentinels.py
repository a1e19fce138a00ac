"""A primary, its replica, and three Sentinels that watch them: real processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis.asyncio as redis

from segue_contract.servers import Valkey
from segue_contract.servers.lifetime import LocalServer
from segue_contract.servers.process import LOOPBACK, ChildProcess, start_on_port
from segue_contract.servers.valkey import find_valkey

NAME = "segue"
DOWN_AFTER_MS = 500
FAILOVER_TIMEOUT_MS = 1500  # the next fail-over waits for twice as long since the last one began
WAIT_S = 40.0
_POLL_S = 0.05


class Sentinel(LocalServer):
    """Watches the primary at `primary_port`; two of three must find it dead."""

    def __init__(
        self, folder: Path, primary_port: int, *, password: str = "", primary_password: str = ""
    ) -> None:
        super().__init__(0)
        self._folder = folder
        self._primary_port = primary_port
        self._password = password
        self._primary_password = primary_password

    async def _begin(self) -> None:
        self.kind, program = find_valkey()
        self._folder.mkdir()

        async def on_port(port: int) -> ChildProcess:
            config = self._folder / "sentinel.conf"
            lines = [
                f"port {port}",
                f"bind {LOOPBACK}",
                f"dir {self._folder}",
                f"sentinel monitor {NAME} {LOOPBACK} {self._primary_port} 2",
                f"sentinel down-after-milliseconds {NAME} {DOWN_AFTER_MS}",
                f"sentinel failover-timeout {NAME} {FAILOVER_TIMEOUT_MS}",
            ]
            if self._primary_password:
                lines.append(f"sentinel auth-pass {NAME} {self._primary_password}")
            if self._password:
                lines.append(f"requirepass {self._password}")
            config.write_text("\n".join(lines) + "\n")
            return await ChildProcess.start(
                "sentinel",
                [program, str(config), "--sentinel"],
                ready=lambda line: "Sentinel ID is" in line,
            )

        self._child, self.port = await start_on_port("Sentinel", 0, on_port)


@dataclass
class Watched:
    """`servers` change roles: `primary()` is the one that the Sentinels name now."""

    servers: list[Valkey]
    sentinels: list[Sentinel] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"redis+sentinel://{self.places}/{NAME}"

    @property
    def places(self) -> str:
        return ",".join(f"{LOOPBACK}:{one.port}" for one in self.sentinels)

    async def primary(self) -> Valkey:
        """As the first Sentinel knows it."""
        async with self._client(self.sentinels[0]) as client:
            found = await client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", NAME)
        return next(one for one in self.servers if one.port == int(found[1]))

    async def failed_over_from(self, old: Valkey) -> Valkey:
        """The new primary, once a Sentinel names it."""
        async with asyncio.timeout(WAIT_S):
            while (new := await self.primary()) is old:  # noqa: ASYNC110 another process's state
                await asyncio.sleep(_POLL_S)
        return new

    async def mend(self, old: Valkey) -> None:
        """`old` is a replica of the primary again, and the Sentinels would promote it."""
        new = await self.primary()
        async with asyncio.timeout(WAIT_S), redis.from_url(old.url) as client:
            while True:
                try:
                    await client.execute_command("REPLICAOF", LOOPBACK, new.port)
                    break
                except redis.ConnectionError:  # it starts, or wakes up
                    await asyncio.sleep(_POLL_S)
            await self.in_step(new)
        await self.watched()

    async def in_step(self, primary: Valkey) -> None:
        """Until the replica has acknowledged a write."""
        async with asyncio.timeout(WAIT_S), redis.from_url(primary.url) as client:
            acknowledged = 0
            while not acknowledged:
                await client.set("in-step", 1)
                acknowledged = int(await client.execute_command("WAIT", 1, 200))

    async def watched(self) -> None:
        """Until each Sentinel knows the others, and a replica that it would promote."""
        async with asyncio.timeout(WAIT_S):
            for one in self.sentinels:
                async with self._client(one) as client:
                    while not await self._all_known(client):  # noqa: ASYNC110 likewise
                        await asyncio.sleep(_POLL_S)

    async def _all_known(self, client: redis.Redis) -> bool:
        others = await client.execute_command("SENTINEL SENTINELS", NAME)
        replicas = await client.execute_command("SENTINEL REPLICAS", NAME)
        usable = [
            one
            for one in map(_fields, replicas)
            if one[b"flags"] == b"slave" and one[b"master-link-status"] == b"ok"
        ]
        return len(others) == len(self.sentinels) - 1 and len(usable) == 1

    def _client(self, sentinel: Sentinel) -> redis.Redis:
        client = redis.Redis(host=LOOPBACK, port=sentinel.port, protocol=2)
        client.response_callbacks.clear()  # replies as they come, whichever version of redis-py
        return client


def _fields(reply: list[bytes]) -> dict[bytes, bytes]:
    """Of one entry of SENTINEL REPLICAS: names and values in turn."""
    return dict(zip(reply[::2], reply[1::2], strict=True))


@asynccontextmanager
async def watched_pair(folder: Path) -> AsyncIterator[Watched]:
    """A primary and a replica in step, and three Sentinels that know all of it."""
    async with AsyncExitStack() as stack:
        start = stack.enter_async_context
        options = ("--repl-diskless-sync-delay", "0", "--repl-timeout", "5")
        primary = await start(Valkey.start(options=options))
        replica = await start(
            Valkey.start(options=(*options, "--replicaof", f"{LOOPBACK} {primary.port}"))
        )
        group = Watched([primary, replica])
        await group.in_step(primary)
        for number in range(3):
            group.sentinels.append(
                await start(Sentinel(folder / f"sentinel-{number}", primary.port))
            )
        await group.watched()
        yield group
