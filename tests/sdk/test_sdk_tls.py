"""A client over TLS: what turns it on, what it says where it fails, and a node's new authority."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import segue
from segue._access import read_access
from segue._contexts import Contexts
from segue._nodes import Nodes
from segue._settings import Settings, find_settings
from segue.errors import InvalidArgument, Unreachable
from segue_contract.v1 import agent_pb2 as pb
from tests.support.certificates import Authority, replace
from tests.support.fake_agent import FakeAgent, FakeLog


def _settings(env: dict[str, str]) -> Settings:
    return find_settings(env, Contexts)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def node(authority: Authority) -> AsyncIterator[FakeAgent]:
    agent = FakeAgent(FakeLog("trip"))
    agent.tls = authority.issue("node")
    async with asyncio.timeout(60), agent:
        yield agent


async def test_the_authority_comes_from_an_argument_or_the_environment(
    node: FakeAgent, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with segue.Client(node.address, tls_ca=authority.file, token="a.b.c") as client:
        assert (await client.session("trip")).name == "trip"
    monkeypatch.setenv("SEGUE_CA", str(authority.file))
    async with segue.Client([node.address]) as client:
        assert (await client.session("trip")).name == "trip"
    with pytest.raises(Unreachable, match="may want TLS"):
        async with segue.Client(node.address, tls_ca=""):
            pass


async def test_why_a_node_is_not_believed(node: FakeAgent, tmp_path: Path) -> None:
    other = Authority(tmp_path, "other")
    with pytest.raises(Unreachable, match="none of the authorities") as caught:
        async with segue.Client(node.address, tls_ca=other.file):
            pass
    assert node.address in caught.value.message
    with pytest.raises(InvalidArgument, match="cannot be read"):
        async with segue.Client(node.address, tls_ca=tmp_path / "none"):
            pass
    node.tls = None
    await node.kill()
    await node.start()
    with pytest.raises(Unreachable, match="does not speak TLS"):
        async with segue.Client(node.address, tls_ca=other.file):
            pass


async def test_a_client_that_runs_takes_a_new_authority(
    node: FakeAgent, authority: Authority, tmp_path: Path
) -> None:
    later = Authority(tmp_path, "later")
    async with segue.Client(node.address, tls_ca=authority.file) as client:
        await client.session("trip")
        await node.kill()
        node.tls = later.issue("node")
        replace(authority.file, later.file.read_bytes())
        await node.start()
        assert (await client.session("trip")).name == "trip"


async def test_certificates_that_are_half_replaced_are_read_again(
    node: FakeAgent, authority: Authority
) -> None:
    good = authority.file.read_bytes()
    nodes = Nodes([node.address], access=read_access(_settings({}), tls_ca=authority.file))
    request = pb.OpenSessionRequest(session="trip", device="phone")
    try:
        await nodes.unary("OpenSession", request)
        (one,) = nodes.order()
        await node.kill()
        with pytest.raises(Unreachable):
            await nodes.unary("OpenSession", request)
        await node.start()
        replace(authority.file, b"no PEM")
        with pytest.raises(Unreachable, match="certificate"):
            await nodes.unary("OpenSession", request)
        await nodes.silent(one)
        reviving = one.reviving
        assert reviving is not None
        await asyncio.wait({reviving}, timeout=0.1)
        assert not reviving.done()
        replace(authority.file, good)
        await reviving
        assert one.reviving is None
        await nodes.unary("OpenSession", request)
    finally:
        await nodes.close()


def test_a_token_is_not_sent_in_the_open() -> None:
    with pytest.raises(InvalidArgument, match="unencrypted"):
        segue.Client("192.0.2.1:7411", token="a.b.c")
    with pytest.raises(InvalidArgument, match="unencrypted"):
        segue.Client(["127.0.0.1:7411", "cloud.example:7412"], token=lambda: "a.b.c")


def test_arguments_come_before_the_environment() -> None:
    env = {"SEGUE_TOKEN": "of-env", "SEGUE_CA": "env.crt"}
    access = read_access(_settings(env))
    assert access.tls is not None
    assert access.tls.ca == Path("env.crt")
    assert access.token is not None
    assert access.token() == "of-env"
    access = read_access(_settings(env), token=lambda: "given", tls_ca="")
    assert access.tls is None
    assert access.token is not None
    assert access.token() == "given"
    assert read_access(_settings(env), token="").token is None
    shown = {"SEGUE_CERT": "a.crt", "SEGUE_KEY": "a.key"}
    with pytest.raises(InvalidArgument, match="TLS is off"):
        read_access(_settings(shown))
    assert read_access(_settings(shown), tls_ca="").tls is None
    with pytest.raises(InvalidArgument, match="its key"):
        read_access(_settings({}), tls_cert="a.crt")
