"""Mosquitto with a configuration of the test's own: access rules, no retained messages, bounds."""

from __future__ import annotations

import asyncio
import os
import pwd
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from segue_contract.servers.broker import find_broker
from segue_contract.servers.process import LOOPBACK, ChildProcess, start_on_port
from tests.support.servers import require_mosquitto

NOBODY_PUBLISHES = "topic read segue/v1/#\n"

_CONFIG = """\
listener {port} {host}
allow_anonymous {anonymous}
set_tcp_nodelay true
persistence false
connection_messages false
log_dest stderr
log_type error
log_type warning
log_type notice
log_type information
user {user}
{more}
"""


@asynccontextmanager
async def mosquitto(more: str = "", *, acl: str = "", anonymous: bool = True) -> AsyncIterator[str]:
    """Its URL. `more`: further lines of mosquitto.conf. `acl`: an access list."""
    require_mosquitto()
    _, program = find_broker("mosquitto")
    with tempfile.TemporaryDirectory(prefix="segue-mosquitto-") as name:
        folder = Path(name)
        user = pwd.getpwuid(os.geteuid()).pw_name
        if acl:
            (folder / "acl").write_text(acl)
            (folder / "acl").chmod(0o600)
            more += f"\nacl_file {folder / 'acl'}"

        async def on_port(port: int) -> ChildProcess:
            config = folder / "mosquitto.conf"
            config.write_text(
                _CONFIG.format(
                    port=port,
                    host=LOOPBACK,
                    user=user,
                    more=more,
                    anonymous="true" if anonymous else "false",
                )
            )
            return await ChildProcess.start(
                "mosquitto",
                [program, "-c", str(config)],
                ready=lambda line: "mosquitto version" in line and "running" in line,
                timeout_s=15.0,
            )

        child, port = await start_on_port("The MQTT broker", 0, on_port)
        try:
            await _answers(port)
            yield f"mqtt://{LOOPBACK}:{port}"
        finally:
            await child.stop()


async def _answers(port: int) -> None:
    async with asyncio.timeout(15.0):
        while True:
            try:
                _, writer = await asyncio.open_connection(LOOPBACK, port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return
