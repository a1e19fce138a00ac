"""The fan-out through a broker with TLS and passwords: cloud, device, doctor."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from segue._access import Access
from segue._mqtt import Broker
from segue.local.probes import probe_broker
from segue_cloud.cli import load_settings
from segue_cloud.log.session_log import SessionLog
from segue_cloud.mqtt.publisher import Publisher
from segue_cloud.sessions.port import LogOp
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import InvalidArgument, Unreachable
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.sync import ops
from segue_contract.topics import log_topic
from segue_contract.transport.mqtt import MqttLogin, parse_mqtt_url
from segue_contract.transport.tls import TlsFiles
from tests.support.certificates import Authority
from tests.support.producers import producer
from tests.support.secure_broker import secure_mosquitto

S = SessionName("default", "trip")
DEADLINE_S = 30


class Ear:
    """Takes what comes, and knows whether the broker let it in."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()
        self.link: asyncio.Queue[bool] = asyncio.Queue()

    def on_message(self, topic: str, payload: bytes) -> None:
        self.heard.put_nowait(payload)

    def on_link(self, up: bool) -> None:
        self.link.put_nowait(up)


async def test_entries_reach_a_device_through_tls_and_passwords(
    valkey: Valkey, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    other = Authority(tmp_path, "other")
    login_file = tmp_path / "login"
    login_file.write_text("cloud:hunter2\n")
    users = {"cloud": "hunter2", "device": "swordfish"}
    store = await RedisStore.connect(valkey.url)
    await store.open_session(S)
    async with (
        asyncio.timeout(2 * DEADLINE_S),
        secure_mosquitto(tmp_path, users, authority.issue("broker")) as url,
    ):
        settings = load_settings({"mqtt_login": login_file, "mqtt_ca": authority.file})
        async with (
            Publisher(url, store, login=settings.broker_login) as publisher,
            SessionLog(store, publisher) as log,
        ):
            assert await publisher.wait_connected(DEADLINE_S)
            for_devices = url.replace("://", "://device:swordfish@")
            device, ear = Broker(for_devices, authority.believed), Ear()
            await device.add([log_topic(S)], ear)
            assert await ear.link.get()
            entry = LogOp.of(ops.Set(id="a", name="n", value=b"v"))
            await log.append(S, await producer(log, S, "p", 1), [entry])
            assert b"v" in await ear.heard.get()
            await device.close()

            for refused, tls in (
                (url, authority.believed),  # no login
                (for_devices.replace("swordfish", "wrong"), authority.believed),
                (for_devices, other.believed),
                (for_devices, TlsFiles()),
                (for_devices, TlsFiles(ca=tmp_path / "none")),
            ):
                device, ear = Broker(refused, tls), Ear()
                await device.add([log_topic(S)], ear)
                assert not await ear.link.get()
                await device.close()

            assert (await probe_broker(for_devices, Access(authority.believed))).p50 > 0
            with pytest.raises(Unreachable, match=r"none of the authorities.*127\.0\.0\.1"):
                await probe_broker(for_devices, Access(other.believed))
    await store.close()


async def test_a_client_certificate_for_the_broker(valkey: Valkey, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files = authority.issue("broker")
    store = await RedisStore.connect(valkey.url)
    async with secure_mosquitto(tmp_path, {"cloud": "hunter2"}, files, clients=True) as url:
        node = authority.issue("cloud", name="cloud/main")  # one for hosts alone speaks for nobody
        for tls, taken in ((node, True), (authority.believed, False)):
            login = MqttLogin("cloud", "hunter2", tls)
            async with Publisher(url, store, login=login) as publisher:
                assert await publisher.wait_connected(DEADLINE_S if taken else 1.0) is taken
    await store.close()


def test_what_devices_are_told_of_the_broker() -> None:
    own = "mqtt://127.0.0.1:1883"
    assert load_settings({}).told_mqtt_url(own) == own
    abroad = load_settings({"host": "0.0.0.0"})
    assert abroad.told_mqtt_url(own) == ""
    assert abroad.told_mqtt_url("mqtts://broker.example:8883") == "mqtts://broker.example:8883"
    public = load_settings({"public_mqtt_url": "mqtts://device:pw@broker.example"})
    assert public.told_mqtt_url(own) == "mqtts://device:pw@broker.example"


@pytest.mark.parametrize("own", ["mqtt://127.0.0.1:1883", "mqtts://broker.example:8883"])
def test_known_devices_are_told_of_a_broker_only_by_the_operators_word(
    own: str, tmp_path: Path
) -> None:
    """Whoever reads the broker reads all tenants, unless it checks."""
    keys = {"tenant_keys": tmp_path / "keys"}
    assert load_settings(keys).told_mqtt_url(own) == ""
    assert load_settings({**keys, "host": "0.0.0.0"}).told_mqtt_url(own) == ""
    public = "mqtts://device:pw@broker.example"
    assert load_settings({**keys, "public_mqtt_url": public}).told_mqtt_url(own) == public


def test_the_clouds_login_comes_from_the_address_or_a_file(tmp_path: Path) -> None:
    login = load_settings({"mqtt_url": "mqtts://cloud:hunter2@h"}).broker_login
    assert (login.username, login.password) == ("cloud", "hunter2")
    assert "hunter2" not in repr(login)
    for text in ("", "hunter2", ":hunter2", "a:b\nhunter2"):
        file = tmp_path / "login"
        file.write_text(text)
        with pytest.raises(InvalidArgument) as caught:
            _ = load_settings({"mqtt_login": file}).broker_login
        assert "hunter2" not in str(caught.value)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        _ = load_settings({"mqtt_login": tmp_path / "none"}).broker_login


async def test_a_publisher_tells_its_address_without_the_login(valkey: Valkey) -> None:
    store = await RedisStore.connect(valkey.url)
    publisher = Publisher("mqtts://cloud:hunter2@broker.example", store)
    assert publisher.url == "mqtts://broker.example:8883"
    publisher.move("mqtts://cloud:hunter2@other.example")
    assert publisher.url == parse_mqtt_url("mqtts://other.example").url
    await store.close()
