"""What `segue doctor` says of a node that TLS keeps it from."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from segue._access import Access
from segue.cli.doctor import _certificate
from segue.local.inspect import State
from segue.local.probes import probe_node
from segue_contract.errors import Unreachable
from segue_contract.transport.server import start_server
from segue_contract.transport.tls import TlsFiles
from tests.support.certificates import Authority

HERE = "127.0.0.2"


async def told(access: Access, tls: TlsFiles | None, **more: Any) -> str:
    """The message and hint of a probe that must fail."""
    node = await start_server(HERE, 0, [], tls=tls, **more)
    try:
        with pytest.raises(Unreachable) as caught:
            await probe_node(node.address, access)
    finally:
        await node.stop(0)
    return json.dumps([caught.value.message, caught.value.hint])


async def test_each_reason_is_named(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    believed = Access(authority.believed)
    good = authority.issue("node", HERE, name="cloud/one")
    assert "speaks TLS" in await told(Access(), good)
    untrusted = await told(Access(other.believed), good)
    assert "none of the authorities" in untrusted
    assert "cloud/one, 127.0.0.2, by CN=ca" in untrusted
    assert "does not speak TLS" in await told(believed, None)
    assert "client certificate" in await told(believed, good, clients="required")
    stranger = other.issue("stranger")
    stranger = TlsFiles(stranger.certificate, stranger.key, authority.file)
    assert "client certificate" in await told(Access(stranger), good, clients="required")
    assert "other names" in await told(believed, authority.issue("else", "example.org"))
    past = datetime.now(UTC) - timedelta(days=3)
    assert "expired" in await told(believed, authority.issue("old", HERE, now=past))


async def test_a_certificate_that_ends_soon_is_remarked(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    believed = Access(authority.believed)
    node = await start_server(HERE, 0, [], tls=authority.issue("node", HERE, days=60))
    try:
        assert (await probe_node(node.address, believed)).p50 > 0
        check = await _certificate(node.address, believed)
        assert check is not None
        assert check.state is State.OK
        authority.issue("node", HERE, days=3)
        check = await _certificate(node.address, believed)
        assert check is not None
        assert check.state is State.NOTE
        assert "segue ca rotate" in check.advice
    finally:
        await node.stop(0)
