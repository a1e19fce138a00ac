"""`segue ca`: what it makes is taken by servers, keys are private, and rotation breaks nothing."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

from segue.cli.ca import app
from segue_contract.errors import InvalidArgument, SegueError
from segue_contract.transport.channel import open_channel
from segue_contract.transport.server import start_server
from segue_contract.transport.tls import TlsFiles

HERE = "127.0.0.2"


def ca(*args: str | Path) -> str:
    """Raises what the command raises."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def show(*files: Path) -> Any:
    return json.loads(ca("show", *files, "-o", "json"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ca("init", tmp_path / "ca")
    return tmp_path


def issued(folder: Path, name: str, *args: str | Path) -> TlsFiles:
    ca("issue", name, "--ca", folder / "ca", "--out", folder, *args)
    stem = folder / name.replace("/", "-")
    return TlsFiles(stem.with_suffix(".crt"), stem.with_suffix(".key"), folder / "ca/ca.crt")


async def test_nodes_and_clients_take_what_it_makes(folder: Path) -> None:
    cloud = issued(folder, "cloud/one", "--host", HERE, "--host", "cloud.example")
    edge = issued(folder, "edge/berlin/one", "--host", "localhost")
    node = await start_server(HERE, 0, [], tls=cloud, clients="required")
    try:
        await _serves(node.address, edge)
        assert cloud.certificate is not None
        ca("rotate", cloud.certificate, "--ca", folder / "ca")
        await _serves(node.address, edge)
        # a new authority: believed by all before it signs for anybody
        ca("rotate", "--authority", "--ca", folder / "ca")
        await _serves(node.address, edge)
        assert edge.certificate is not None
        ca("rotate", edge.certificate, "--ca", folder / "ca")
        await _serves(node.address, edge)
        ca("rotate", cloud.certificate, "--ca", folder / "ca")
        await _serves(node.address, edge)
    finally:
        await node.stop(0)


async def _serves(address: str, tls: TlsFiles) -> None:
    async with asyncio.timeout(20), open_channel(address, tls=tls) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_a_rotation_that_was_broken_off_leaves_an_authority_that_signs(folder: Path) -> None:
    """ca.crt has the new one first, and ca.key is still the old one's."""
    key = folder / "ca/ca.key"
    old = key.read_bytes()
    (before,) = show(folder / "ca/ca.crt")
    ca("rotate", "--authority", "--ca", folder / "ca")
    key.write_bytes(old)
    issued(folder, "cloud/one", "--host", HERE)
    ca("rotate", "--authority", "--ca", folder / "ca")
    both = show(folder / "ca/ca.crt")
    assert [one["serial"] for one in both[1:]] == [before["serial"]]
    issued(folder, "cloud/two", "--host", HERE)


def test_keys_are_their_owners_alone(folder: Path) -> None:
    files = issued(folder, "edge/berlin/one", "--host", "localhost")
    assert files.key is not None
    for key in (folder / "ca/ca.key", files.key):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    before = files.key.read_bytes()
    assert files.certificate is not None
    ca("rotate", files.certificate, "--ca", folder / "ca")
    assert files.key.read_bytes() != before
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600


def test_a_key_can_stay_on_its_machine(folder: Path) -> None:
    ca("request", folder / "node")
    assert b"PRIVATE" not in (folder / "node.csr").read_bytes()
    ca("issue", "cloud/one", "--host", HERE, "--csr", folder / "node.csr",
       "--ca", folder / "ca", "--out", folder)  # fmt: skip
    assert not (folder / "cloud-one.key").exists()
    (facts,) = show(folder / "cloud-one.crt")
    assert facts["nodes"] == ["cloud/one"]
    assert facts["hosts"] == [HERE]
    first = facts["serial"]
    ca("rotate", folder / "cloud-one.crt", "--csr", folder / "node.csr", "--ca", folder / "ca")
    (facts,) = show(folder / "cloud-one.crt")
    assert (facts["nodes"], facts["hosts"]) == (["cloud/one"], [HERE])
    assert facts["serial"] != first


@pytest.mark.parametrize(
    ("name", "hosts", "uses"),
    [
        ("operator/ann", (), {"clientAuth"}),
        ("edge/berlin/one", ("localhost",), {"clientAuth", "serverAuth"}),
        ("-", ("broker.example",), {"serverAuth"}),
    ],
)
def test_a_certificate_is_for_what_its_bearer_does(
    folder: Path, name: str, hosts: tuple[str, ...], uses: set[str]
) -> None:
    given = [part for host in hosts for part in ("--host", host)]
    ca("issue", name, "--ca", folder / "ca", "--out", folder, *given)
    (file,) = folder.glob("*.crt")
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    said = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert {use._name for use in said} == uses


def test_what_a_certificate_says_is_shown(folder: Path) -> None:
    files = issued(folder, "edge/berlin/one", "--host", "::1", "--host", "edge.example")
    assert files.certificate is not None
    (facts,) = show(files.certificate)
    assert facts["nodes"] == ["edge/berlin/one"]
    assert sorted(facts["hosts"]) == ["::1", "edge.example"]
    assert not facts["authority"]
    assert "edge/berlin/one" in ca("show", files.certificate)
    ca("rotate", "--authority", "--ca", folder / "ca")
    ca("rotate", "--authority", "--ca", folder / "ca")
    both = show(folder / "ca/ca.crt")
    assert [one["authority"] for one in both] == [True, True]


@pytest.mark.parametrize(
    "args",
    [
        ("edge/a", "--host", "h"),
        ("edge/a/#", "--host", "h"),
        ("device/a", "--host", "h"),
        ("-",),
        ("cloud/a", "--host", "a b"),
        ("cloud/a", "--host", "h:7412"),
        ("cloud/a", "--host", "h", "--days", "3650"),  # longer than the authority's rest
    ],
)
def test_what_cannot_be_certified_is_refused(folder: Path, args: tuple[str, ...]) -> None:
    with pytest.raises(SegueError):
        ca("issue", *args, "--ca", folder / "ca", "--out", folder)
    assert not list(folder.glob("*.crt"))


def test_nothing_is_overwritten_by_mistake(folder: Path) -> None:
    issued(folder, "cloud/one", "--host", HERE)
    for args in (
        ("init", folder / "ca"),
        ("issue", "cloud/one", "--host", HERE, "--ca", folder / "ca", "--out", folder),
    ):
        with pytest.raises(InvalidArgument, match="there already"):
            ca(*args)
    with pytest.raises(InvalidArgument, match="no authority"):
        ca("issue", "cloud/two", "--host", HERE, "--ca", folder / "none", "--out", folder)
    with pytest.raises(InvalidArgument, match="no node's"):
        ca("rotate", folder / "ca/ca.crt", "--ca", folder / "ca")


@pytest.mark.parametrize("name", ["node.key", "none", "ca/ca.crt"])
def test_a_request_that_is_none_is_refused(folder: Path, name: str) -> None:
    ca("request", folder / "node")
    with pytest.raises(InvalidArgument):
        ca("issue", "cloud/one", "--host", HERE, "--csr", folder / name,
           "--ca", folder / "ca", "--out", folder)  # fmt: skip
