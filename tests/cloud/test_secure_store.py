"""A store with TLS, an ACL's user and client certificates: cloud and doctor."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from segue.local.probes import probe_store
from segue_cloud.cli import load_settings
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import InvalidArgument, StoreUnavailable, Unreachable
from segue_contract.ids import SessionName
from segue_contract.servers.process import LOOPBACK, ChildProcess, start_on_port
from segue_contract.store_url import with_tls_files
from segue_contract.transport.tls import TlsFiles
from tests.support.certificates import Authority

S = SessionName("default", "trip")


@asynccontextmanager
async def secure_store(folder: Path, tls: TlsFiles, *, clients: bool) -> AsyncIterator[str]:
    """Its URL, with user and password."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        pytest.skip("no Redis or Valkey with TLS on this machine")

    async def on_port(port: int) -> ChildProcess:
        return await ChildProcess.start(
            "store",
            [
                program, "--port", "0", "--tls-port", str(port), "--bind", LOOPBACK,
                "--dir", str(folder), "--save", "",
                "--tls-cert-file", str(tls.certificate), "--tls-key-file", str(tls.key),
                "--tls-ca-cert-file", str(tls.ca),
                "--tls-auth-clients", "yes" if clients else "no",
                "--user", "default", "off",
                "--user", "cloud", "on", ">hunter2", "~*", "&*", "+@all",
            ],
            ready=lambda line: "eady to accept connections" in line,
            timeout_s=20.0,
        )  # fmt: skip

    child, port = await start_on_port("The store", 0, on_port)
    try:
        yield f"rediss://cloud:hunter2@{LOOPBACK}:{port}"
    finally:
        await child.stop()


async def opened(url: str) -> bool:
    store = await RedisStore.connect(url)
    try:
        return (await store.open_session(S)).created
    finally:
        await store.close()


async def test_a_cloud_and_the_doctor_reach_a_store_with_tls(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    async with secure_store(tmp_path, authority.issue("store"), clients=False) as url:
        settings = load_settings({"redis_url": url, "redis_ca": authority.file})
        assert await opened(settings.store_url)
        assert (await probe_store(settings.store_url)).p50 > 0
        for ca in (other.file, None):
            wrong = load_settings({"redis_url": url, "redis_ca": ca}).store_url
            with pytest.raises((StoreUnavailable, Unreachable)) as caught:
                await opened(wrong)
            assert "hunter2" not in str(caught.value)
            with pytest.raises(Unreachable, match="none of the authorities"):
                await probe_store(wrong)
        with pytest.raises((StoreUnavailable, InvalidArgument)) as refused:
            await opened(settings.store_url.replace("hunter2", "swordfish"))
        assert "swordfish" not in str(refused.value)


async def test_a_client_certificate_for_the_store(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    mine = authority.issue("cloud", name="cloud/one")
    async with secure_store(tmp_path, authority.issue("store"), clients=True) as url:
        settings = load_settings(
            {"redis_url": url, "tls_cert": mine.certificate, "tls_key": mine.key,
             "tls_ca": mine.ca}
        )  # fmt: skip
        assert await opened(settings.store_url)
        assert (await probe_store(settings.store_url)).p50 > 0
        with pytest.raises(Unreachable):
            await probe_store(with_tls_files(url, ca=str(authority.file)))


def test_certificates_go_into_addresses_with_tls_alone() -> None:
    assert with_tls_files("redis://h", ca="ca.crt") == "redis://h"
    assert with_tls_files("unix:///s", ca="ca.crt") == "unix:///s"
    assert with_tls_files("", ca="ca.crt") == ""
    assert with_tls_files("rediss://h", ca="a b.crt") == "rediss://h?ssl_ca_certs=a+b.crt"
    named = "rediss+sentinel://h/n?ssl_ca_certs=own.crt"
    assert with_tls_files(named, ca="ca.crt") == named
    assert (
        with_tls_files(named, certificate="c", key="k") == f"{named}&ssl_certfile=c&ssl_keyfile=k"
    )
