"""Two machines, a hostile network between them: processes with TLS, certificates and tokens."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

import segue
from segue.cli.ca import app as ca_app
from segue.errors import Unauthenticated, Unreachable
from segue.events import Ended
from segue.local.parts import Program, module_command
from segue_contract.identity.keys import IssuerKey, KeySet
from segue_contract.servers.ports import free_port
from tests.support.machines import Machine, other_machine
from tests.support.servers import require_broker, require_valkey


def ca(*args: str | Path) -> None:
    result = CliRunner().invoke(ca_app, [str(arg) for arg in args])
    assert result.exit_code == 0, result.exception


def certificates(folder: Path, machine: Machine) -> None:
    ca("init", folder / "ca")
    common = ("--ca", folder / "ca", "--out", folder)
    ca("issue", "cloud/one", "--host", machine.address, *common)
    ca("issue", "edge/here/one", "--host", machine.ours, *common)


def program(name: str, command: list[str], folder: Path) -> Program:
    ours = ("SEGUE_REDIS_URL", "SEGUE_MQTT_URL", "SEGUE_CLOUD_", "SEGUE_EDGE_")
    env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return Program(name, command, log=folder / f"{name}.log", env=env)


def tls(folder: Path, stem: str) -> list[str]:
    files = {"--tls-cert": f"{stem}.crt", "--tls-key": f"{stem}.key", "--tls-ca": "ca/ca.crt"}
    flags = [part for flag, file in files.items() for part in (flag, str(folder / file))]
    return [*flags, "--tenant-keys", str(folder / "keys.json")]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_session_between_two_machines(tmp_path: Path, model_dir: Path) -> None:
    require_valkey()
    require_broker()
    key = IssuerKey.new("acme", os.urandom)
    (tmp_path / "keys.json").write_text(KeySet().with_key(key.public(0)).text())
    with other_machine() as machine:
        certificates(tmp_path, machine)
        ports = [free_port() for _ in range(3)]
        cloud = program(
            "cloud",
            machine.command(
                module_command(
                    "segue", "cloud", "--host", "0.0.0.0", "--port", str(ports[0]),
                    "--node-port", str(ports[1]), "--model", str(model_dir),
                    *tls(tmp_path, "cloud-one"),
                )
            ),
            tmp_path,
        )  # fmt: skip
        edge = program(
            "edge",
            module_command(
                "segue", "edge", "--host", machine.ours, "--port", str(ports[2]),
                "--cloud", f"{machine.address}:{ports[1]}", "--model", str(model_dir),
                "--outbox", str(tmp_path / "outbox"), *tls(tmp_path, "edge-here-one"),
            ),
            tmp_path,
        )  # fmt: skip
        at_edge, at_cloud = f"{machine.ours}:{ports[2]}", f"{machine.address}:{ports[0]}"
        authority = tmp_path / "ca/ca.crt"
        token = segue.tokens.issue(
            device="phone", sessions=["trip"], rights=["read", "send"], api_key=key.text()
        )
        try:
            async with asyncio.timeout(240):
                await asyncio.gather(cloud.start(), edge.start())
                for address in (at_edge, at_cloud):
                    async with segue.Client(
                        address, device="phone", token=token, tls_ca=authority
                    ) as client:
                        session = await client.session("trip")
                        async with session.run("Say hello.", max_tokens=8) as turn:
                            ended = [one async for one in turn if isinstance(one, Ended)]
                        assert ended[-1].durable, "the cloud has it"
                    with pytest.raises(Unauthenticated):
                        async with segue.Client(
                            address, device="phone", tls_ca=authority
                        ) as client:
                            await client.session("trip")
                    with pytest.raises(Unreachable, match="TLS"):
                        async with segue.Client(address, device="phone"):
                            pass
        finally:
            await asyncio.gather(edge.stop(), cloud.stop())
        assert token not in (tmp_path / "edge.log").read_text()
        assert token not in (tmp_path / "cloud.log").read_text()
