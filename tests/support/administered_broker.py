"""A Mosquitto with TLS as `segue broker init` sets it up, and who tries things at it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from segue.cli.broker import app
from segue_contract.servers.broker import find_broker
from segue_contract.servers.process import LOOPBACK, ChildProcess, start_on_port
from segue_contract.transport.mqtt import (
    MqttLogin,
    connect_options,
    parse_mqtt_url,
    read_mqtt_login,
)
from segue_contract.transport.mqtt_client import MqttClient
from segue_contract.transport.tls import TlsFiles
from tests.support.certificates import Authority
from tests.support.servers import require_mosquitto


@dataclass
class Administered:
    url: str
    tls: TlsFiles  # whom its clients believe
    login: MqttLogin  # the clouds'
    process: ChildProcess

    def client(self, user: str = "", password: str = "", name: str = "", **more: Any) -> MqttClient:
        server = parse_mqtt_url(self.url)
        login = MqttLogin(user, password, self.tls)
        options = {**connect_options(server, login), "timeout": 10.0, **more}
        return MqttClient(*server.address, identifier=name or user or None, **options)

    def cloud(self) -> MqttClient:
        """As whoever has the clouds' login."""
        return self.client(self.login.username, self.login.password, "somebody")


@asynccontextmanager
async def administered_mosquitto(folder: Path) -> AsyncIterator[Administered]:
    require_mosquitto()
    authority = Authority(folder)
    files = authority.issue("broker")
    _, program = find_broker("mosquitto")
    made: list[Path] = []

    async def on_port(port: int) -> ChildProcess:
        place = folder / f"broker-{port}"
        tls = ["--tls-cert", str(files.certificate), "--tls-key", str(files.key)]
        result = CliRunner().invoke(app, ["init", str(place), "--port", str(port), *tls])
        assert result.exit_code == 0, result.output
        made.append(place)
        config = place / "mosquitto.conf"
        # As root it would change its user, who may not read this folder.
        config.write_text(config.read_text() + "user root\nlog_dest stderr\nlog_type all\n")
        return await ChildProcess.start(
            "mosquitto",
            [program, "-c", str(config)],
            ready=lambda line: "mosquitto version" in line and "running" in line,
            timeout_s=15.0,
        )

    child, port = await start_on_port("The MQTT broker", 0, on_port)
    try:
        await _answers(port, authority.file)
        login = read_mqtt_login(made[-1] / "cloud.login", authority.believed)
        yield Administered(f"mqtts://{LOOPBACK}:{port}", authority.believed, login, child)
    finally:
        await child.stop()


async def _answers(port: int, ca: Path) -> None:
    context = ssl.create_default_context(cafile=str(ca))
    async with asyncio.timeout(15.0):
        while True:
            try:
                _, writer = await asyncio.open_connection(LOOPBACK, port, ssl=context)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                return
