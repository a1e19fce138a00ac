"""Devices at a broker that clouds administer: what each may read, and when that ends. A real
Mosquitto with TLS as `segue broker init` sets it up, two instances on one store."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
import pytest_asyncio
from typer.testing import CliRunner

import segue
from segue._broker_login import BrokerLogin
from segue.cli.broker import app as broker_cli
from segue_cloud.cli import load_settings
from segue_cloud.mqtt.dynsec import DynamicSecurity
from segue_cloud.mqtt.login_pace import LoginPace
from segue_cloud.mqtt.logins import PREFIX
from segue_cloud.sessions.logins import LoginRecord
from segue_cloud.sessions.port import LogOp
from segue_cloud.sessions.store import RedisStore
from segue_contract.errors import PermissionDenied, Revoked, Unreachable
from segue_contract.ids import SessionName
from segue_contract.limits import (
    BROKER_LOGIN_AGAIN_S,
    BROKER_LOGINS,
    BROKER_LOGINS_BURST,
    BROKER_LOGINS_OF_DEVICE,
    BROKER_LOGINS_OF_SESSION,
    BROKER_LOGINS_PER_S,
    EXPIRY_GRACE_S,
)
from segue_contract.servers import Broker, Valkey
from segue_contract.sync.ops import Set, encode_op
from segue_contract.topics import (
    encode_log_message,
    head_topic,
    log_topic,
    seal,
    unseal,
)
from segue_contract.transport.mqtt import MqttLogin
from segue_contract.transport.mqtt_client import MqttClient, PublishRefused
from segue_contract.transport.tls import TlsFiles
from segue_contract.v1 import agent_pb2 as pb
from tests.support.administered_broker import Administered, administered_mosquitto
from tests.support.fake_agent import FakeAgent, FakeLog
from tests.support.followers import following, op
from tests.support.keyed_clouds import Place, keyed_clouds
from tests.support.producers import producer
from tests.support.servers import require_valkey

pytestmark = pytest.mark.asyncio(loop_scope="module")

WAIT_S = 20.0
_CONTROL = "$CONTROL/dynamic-security/v1"
_names = count()


@dataclass
class House:
    broker: Administered
    place: Place
    store_url: str
    at: dict[SessionName, int] = field(default_factory=dict)

    def device(self, name: str = "", tenant: str = "acme", **more: Any) -> tuple[str, str]:
        """Its name, and a token of it."""
        name = name or f"device-{next(_names)}"
        more = {"issued_s": time.time() - 60, "expires_s": time.time() + 600, **more}
        return name, self.place.tokens.device(tenant, name, **more)

    async def opened(
        self, device: tuple[str, str], session: str, *, user: str = "", at: int = 0
    ) -> pb.OpenSessionReply:
        name, token = device
        request = pb.OpenSessionRequest(
            session=session, device=name, wants_login=True, mqtt_user=user
        )
        return await self.place.call(at, token, "OpenSession", request)  # type: ignore[no-any-return]

    async def say(self, session: SessionName, text: str) -> None:
        """Append an entry, which is published."""
        seq = self.at[session] = self.at.get(session, 0) + 1
        log = self.place.clouds[0].log
        entry = LogOp.of(Set(id=f"o{seq}", name="n", value=text.encode()))
        await log.append(session, await producer(log, session, "p", seq), [entry])

    @asynccontextmanager
    async def admin(self) -> AsyncIterator[DynamicSecurity]:
        async with DynamicSecurity(lambda: self.broker.url, self.broker.login) as admin:
            assert await admin.wait_known(), admin.why_not
            yield admin

    async def users(self, admin: DynamicSecurity) -> set[str]:
        (clients,) = await admin.run({"command": "listClients", "count": -1, "offset": 0})
        return {name for name in clients.data["clients"] if name.startswith(PREFIX)}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    require_valkey()
    folder = tmp_path_factory.mktemp("house")
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(administered_mosquitto(folder))
        valkey = await stack.enter_async_context(Valkey.start())
        clouds = keyed_clouds(valkey.url, folder, mqtt_url=broker.url, mqtt_login=broker.login)
        yield House(broker, await stack.enter_async_context(clouds), valkey.url)


@asynccontextmanager
async def connected(
    house: House, opened: pb.OpenSessionReply, *topics: str
) -> AsyncIterator[MqttClient]:
    assert opened.mqtt_url == house.broker.url
    assert opened.needs_login
    async with house.broker.client(opened.mqtt_user, opened.mqtt_password) as client:
        codes = await client.subscribe([(topic, 1) for topic in topics])
        assert not refused(codes)
        yield client


def refused(codes: Sequence[Any]) -> list[int]:
    return [place for place, code in enumerate(codes) if code.value >= 128]


async def next_message(client: MqttClient) -> aiomqtt.Message:
    async with asyncio.timeout(WAIT_S):
        return await anext(aiter(client.messages))


async def end_of(client: MqttClient) -> int:
    """Why the broker ended it, whatever it brought before."""
    try:
        async with asyncio.timeout(WAIT_S):
            async for _ in client.messages:
                pass
    except aiomqtt.MqttError:
        return client.ended_by
    raise AssertionError("it ended without an error")


async def refused_login(client: MqttClient) -> None:
    with pytest.raises(aiomqtt.MqttCodeError):
        async with client:
            pass


async def test_a_device_reads_the_topics_of_its_session_and_nothing_else(house: House) -> None:
    phone = house.device("phone", sessions=("trip",))
    opened = await house.opened(phone, "trip")
    mine, sibling, foreign = (
        SessionName("acme", "trip"),
        SessionName("acme", "other"),
        SessionName("zeta", "trip"),
    )
    await house.opened(house.device(), "other")
    await house.opened(house.device(tenant="zeta"), "trip")
    with pytest.raises(PermissionDenied):
        await house.opened(phone, "other")
    async with connected(house, opened, log_topic(mine)) as client:
        others = [
            *(name(one) for one in (sibling, foreign) for name in (log_topic, head_topic)),
            "segue/v1/acme/trip/+", "segue/v1/acme/trip/#", "segue/v1/acme/+/log", "segue/v1/#",
            "segue/v1/+/trip/log", "+/v1/acme/trip/log", "#", "$SYS/#", "$CONTROL/#",
            f"{_CONTROL}/response", f"$share/g/{log_topic(mine)}", "$share/g/#",
        ]  # fmt: skip
        codes = await client.subscribe([(topic, 1) for topic in others])
        assert refused(codes) == list(range(len(others)))
        for topic in (log_topic(mine), log_topic(foreign), _CONTROL, "anything"):
            with pytest.raises(PublishRefused):
                await client.publish(topic, b"forged", qos=1)
        for session in (foreign, sibling, mine):
            await house.say(session, "said")
        message = await next_message(client)
        assert message.topic.value == log_topic(mine)
        assert b"said" in unseal(opened.live_key, log_topic(mine), message.payload)  # type: ignore[arg-type]


async def test_nobody_else_connects_with_a_device_s_client_id_or_without_a_login(
    house: House,
) -> None:
    name = SessionName("acme", "crowd")
    phone, laptop = [await house.opened(house.device(), "crowd") for _ in range(2)]
    async with connected(house, phone, log_topic(name)) as client:
        for user, password, shown in (
            (laptop.mqtt_user, laptop.mqtt_password, phone.mqtt_user),
            (phone.mqtt_user, phone.mqtt_password, "another"),
            (phone.mqtt_user, laptop.mqtt_password, phone.mqtt_user),
            ("", "", phone.mqtt_user),
        ):
            await refused_login(house.broker.client(user, password, shown))
        for _ in range(5):
            await refused_login(house.broker.client(name=f"random-{next(_names)}"))
        await house.say(name, "still here")
        await next_message(client)
        # the clouds' login has no client id of its own, and takes none of a device's
        async with house.admin() as admin:
            assert {phone.mqtt_user, laptop.mqtt_user} <= await house.users(admin)


@pytest.mark.parametrize("meant", ["ends", "end*", "*"])
async def test_a_revoked_device_is_cut_off(house: House, meant: str) -> None:
    name = SessionName("acme", "ends")
    phone, laptop = house.device(), house.device()
    lost, kept = [await house.opened(device, "ends") for device in (phone, laptop)]
    async with connected(house, lost, log_topic(name)) as client:
        async with connected(house, kept, log_topic(name)) as other:
            request = pb.RevokeRequest(session=meant, revoked=phone[0])
            await house.place.call(1, laptop[1], "Revoke", request)
            began = time.monotonic()
            assert await end_of(client) == 0x98  # administrative action
            print(f"cut off after {time.monotonic() - began:.2f} s")
            await house.say(name, "secret")
            await next_message(other)
        await refused_login(house.broker.client(lost.mqtt_user, lost.mqtt_password))
        with pytest.raises(Revoked):
            await house.opened(phone, "ends", user=lost.mqtt_user)
    # what the back end issues later counts again, under another user
    again = house.device(phone[0], issued_s=time.time() + 60)
    opened = await house.opened(again, "ends")
    assert opened.mqtt_user != lost.mqtt_user
    async with connected(house, opened, log_topic(name)):
        pass


async def test_a_login_ends_with_its_token_unless_that_is_renewed(house: House) -> None:
    house.place.now_s = time.time() - 100  # to the gate the tokens are good
    try:
        ends_s = time.time() - EXPIRY_GRACE_S + 2.0
        short, kept = house.device(expires_s=ends_s), house.device(expires_s=ends_s)
        lost, opened = [await house.opened(device, "short") for device in (short, kept)]
        assert 0 < lost.mqtt_valid_ms <= 2000
        longer = house.device(kept[0])
        async with (
            connected(house, lost, log_topic(SessionName("acme", "short"))) as client,
            connected(house, opened, log_topic(SessionName("acme", "short"))) as other,
        ):
            renewed = await house.opened(longer, "short", user=opened.mqtt_user, at=1)
            assert renewed.mqtt_user == opened.mqtt_user
            assert renewed.mqtt_password == opened.mqtt_password
            assert renewed.mqtt_valid_ms > 60_000
            assert await end_of(client) == 0x98
            await house.say(SessionName("acme", "short"), "on")
            await next_message(other)
        # whose time is over gets none, and asks for another session's in vain
        over = house.device(expires_s=time.time() - EXPIRY_GRACE_S - 1)
        assert not (await house.opened(over, "short")).mqtt_user
        foreign = await house.opened(longer, "long", user=opened.mqtt_user)
        assert foreign.mqtt_user not in ("", opened.mqtt_user)
    finally:
        house.place.now_s = time.time()


async def test_a_revoked_key_ends_the_logins_of_its_tokens(house: House) -> None:
    """All of them; and what is revoked later ends, too."""
    name, devices = SessionName("acme", "keyed"), [house.device() for _ in range(3)]
    *keyed, other = [await house.opened(device, "keyed") for device in devices]
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(connected(house, one, log_topic(name))) for one in keyed
        ]
        last = await stack.enter_async_context(connected(house, other, log_topic(name)))
        house.place.tokens.forget(*(token for _, token in devices[:2]))
        given = house.place.clouds[0].logins
        given._tokens = None  # as if the instance that gave them were gone: the other one ends them
        assert [await end_of(client) for client in clients] == [0x98, 0x98]
        request = pb.RevokeRequest(session="keyed", revoked=devices[2][0])
        await house.place.call(1, house.device()[1], "Revoke", request)
        assert await end_of(last) == 0x98
        given._tokens = house.place.tokens


async def test_what_an_instance_could_not_tell_the_broker_another_does(house: House) -> None:
    """It ended them in the store, and died, or lost the answer or the broker."""
    phone = house.device()
    opened = await house.opened(phone, "lost")
    async with connected(house, opened, log_topic(SessionName("acme", "lost"))) as client:
        record = house.place.clouds[0].logins._record
        gone = await record.void("acme", phone[0], "lost", 2**53)
        assert gone == [opened.mqtt_user]
        assert await end_of(client) == 0x98


async def test_a_device_makes_so_many_logins_and_no_more(house: House) -> None:
    phone = house.device()
    given = [(await house.opened(phone, "again")).mqtt_user for _ in range(40)]
    made = [user for user in given if user]
    assert BROKER_LOGINS_OF_DEVICE <= len(made) < 40
    # the one that it has goes on, and others get theirs
    assert (await house.opened(phone, "again", user=made[-1])).mqtt_user == made[-1]
    house.place.clouds[0].logins._pace = LoginPace()


async def test_the_pace_of_logins() -> None:
    pace = LoginPace()
    made = {"one": 0, "two": 0}
    for tick in range(1000):  # a hundred seconds
        for name in made:
            if pace.allows(("acme", name), tick / 10):
                pace.made(("acme", name), tick / 10)
                made[name] += 1
    each = BROKER_LOGINS_OF_DEVICE + 100 / BROKER_LOGIN_AGAIN_S
    assert list(made.values()) == pytest.approx([each, each], abs=2)
    crowd = 0
    for number in range(3000):
        if pace.allows(("acme", f"d{number}"), 200 + number / 100):
            pace.made(("acme", f"d{number}"), 200 + number / 100)
            crowd += 1
    assert crowd == pytest.approx(BROKER_LOGINS_BURST + 30 * BROKER_LOGINS_PER_S, abs=2)
    assert len(pace._devices) <= BROKER_LOGINS


async def test_what_the_store_has_not_is_removed_from_the_broker(house: House) -> None:
    """An instance died between the two, or the store lost what it had."""
    opened = await house.opened(house.device(), "tidy")
    async with house.admin() as admin:
        orphan = f"{PREFIX}orphan"
        made = await admin.run(
            {"command": "createRole", "rolename": orphan},
            {"command": "createClient", "username": orphan, "password": "x"},
            {"command": "createClient", "username": "somebody-else", "password": "x"},
        )
        assert not any(answer.error for answer in made)
        house.place.clouds[0].logins._untidy.set()  # as when it finds the broker again
        async with asyncio.timeout(WAIT_S):
            while orphan in (users := await house.users(admin)):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.02)
        assert opened.mqtt_user in users
        (roles,) = await admin.run({"command": "listRoles", "count": -1, "offset": 0})
        assert orphan not in roles.data["roles"]
        (deleted,) = await admin.run({"command": "deleteClient", "username": "somebody-else"})
        assert not deleted.error


class Seen:
    def __init__(self, follower: segue.Follower) -> None:
        self.follower = follower
        self.texts: list[bytes] = []
        self.items = 0
        self._changed = asyncio.Event()

    async def run(self) -> None:
        async for item in self.follower:
            self.items += 1
            if isinstance(item, segue.Entry) and isinstance(item.op, Set):
                self.texts.append(item.op.value)
            self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


async def test_a_client_follows_with_its_login_and_gets_another_where_that_ends(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(house.broker.tls.ca))
    name = SessionName("acme", "shown")
    device, token = house.device()
    address = house.place.clouds[0].address
    async with segue.Client(address, device=device, token=token) as client:
        session = await client.session("shown")
        seen = Seen(session.follow())
        async with asyncio.TaskGroup() as group:
            task = group.create_task(seen.run())
            await seen.until(lambda: seen.items > 0)
            assert seen.follower.live == "mqtt"
            await house.say(name, "one")
            await seen.until(lambda: seen.texts == [b"one"])
            assert seen.follower.mqtt_refusal is None
            # somebody with the clouds' own login, or a broker that is not ours to trust
            body = encode_log_message(session.tail.generation, 2, [encode_op(_forged())])
            topic = log_topic(name)
            async with house.broker.cloud() as forger:
                await forger.publish(topic, seal(b"?" * 32, topic, body), qos=1)
            await house.say(name, "two")
            await seen.until(lambda: len(seen.texts) == 2)
            assert seen.follower.unauthentic == 1
            # its login goes: over gRPC until the next one
            logins = house.place.clouds[0].logins
            (user,) = await logins._record.void("acme", device, "shown", 2**53)
            await logins._end([user])
            number = 2
            while seen.follower.mqtt_refusal is None or seen.follower.live == "mqtt":
                number += 1
                await house.say(name, str(number))
                await seen.until(lambda number=number: len(seen.texts) == number)  # type: ignore[misc]
            while seen.follower.live != "mqtt":
                number += 1
                await house.say(name, str(number))
                await seen.until(lambda number=number: len(seen.texts) == number)  # type: ignore[misc]
            assert seen.follower.mqtt_refusal is None
            assert seen.texts == [b"one", b"two", *(b"%d" % n for n in range(3, number + 1))]
            task.cancel()


async def test_clouds_administer_a_broker_again_after_their_links_were_lost(house: House) -> None:
    async with house.admin() as admin:
        (made,) = await admin.run({"command": "createRole", "rolename": "more"})
        assert not made.error
        links = [admin, *(cloud.logins._admin for cloud in house.place.clouds)]
        before = [link._client for link in links]
        with contextlib.suppress(Unreachable):  # whoever is given a role is cut off
            user = house.broker.login.username
            await admin.run({"command": "addClientRole", "username": user, "rolename": "more"})
        async with asyncio.timeout(WAIT_S):
            while not all(  # noqa: ASYNC110 - nobody tells
                link.ready and link._client is not client
                for link, client in zip(links, before, strict=True)
            ):
                await asyncio.sleep(0.02)
        opened = await house.opened(house.device(), "again")
        assert opened.mqtt_user in await house.users(admin)


async def test_a_refused_subscription_is_a_reason_to_follow_over_grpc(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(house.broker.tls.ca))
    fake = FakeLog("trip")
    async with house.admin() as admin:
        reader = {"username": "reader", "password": "swordfish"}
        (made,) = await admin.run({"command": "createClient", **reader})
        assert not made.error
    url = house.broker.url.replace("://", "://reader:swordfish@")
    async with FakeAgent(fake, mqtt_url=url) as agent, following([agent.address]) as seen:
        fake.append(op(1))
        await seen.until_offset(1)
        assert seen.lives[-1] == "grpc"
        assert isinstance(seen.follower.mqtt_refusal, PermissionDenied)
        assert "swordfish" not in str(seen.follower.mqtt_refusal) + caplog.text
    assert [record.levelname for record in caplog.records if record.name == "segue.mqtt"] == [
        "WARNING"
    ]


async def test_a_cloud_that_gives_no_login_now_takes_none_away() -> None:
    replies = [
        pb.OpenSessionReply(mqtt_user="one", mqtt_password="p", mqtt_valid_ms=1000),
        pb.OpenSessionReply(),
        PermissionDenied("No."),
        pb.OpenSessionReply(mqtt_user="two", mqtt_password="q", mqtt_valid_ms=1000),
    ]
    asked: list[str] = []

    async def admit(user: str) -> pb.OpenSessionReply:
        asked.append(user)
        reply = replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    now = 0.0
    own = BrokerLogin(admit, TlsFiles(), lambda: now)
    assert own.login is None
    for user in ("one", "one", "one", "two"):
        login = await own.ask()
        assert login is not None
        assert login.username == user
    assert asked == ["", "one", "one", "one"]
    now = 1.0
    assert own.login is None


def _forged() -> Set:
    return Set(id="forged", name="n", value=b"FORGED")


async def test_logins_are_bounded_and_known_by_whom_they_are_for(house: House) -> None:
    store = await RedisStore.connect(house.store_url)
    async with Valkey.start() as valkey:
        await store.close()
        store = await RedisStore.connect(valkey.url)
        record = LoginRecord(store._wire, most=BROKER_LOGINS_OF_DEVICE + 3)
        users = (f"u{number}" for number in count())

        async def grant(
            session: str, device: str = "phone", asked: str = "", until: int = 10
        ) -> Any:
            name = SessionName("acme", session)
            return await record.grant(name, device, asked, next(users), until, 5, "kid")

        first = [await grant("s0") for _ in range(BROKER_LOGINS_OF_SESSION + 1)]
        assert first[-1] == ("u4", ["u0"])
        assert await grant("s0", asked="u3", until=99) == ("u3", [])
        assert (await grant("s1", asked="u3"))[0] not in ("", "u3")
        assert (await grant("s0", "tablet", asked="u4"))[0] not in ("", "u4")
        for number in range(2, BROKER_LOGINS_OF_DEVICE - BROKER_LOGINS_OF_SESSION + 1):
            assert (await grant(f"s{number}"))[0]
        assert await grant("more") == ("", [])  # of this device
        assert (await grant("more", "laptop"))[0]
        assert (await grant("more", "desk"))[0]
        assert await grant("more", "watch") == ("", [])  # of all
        assert await record.holds("acme", "phone", "u3")
        assert not await record.holds("acme", "laptop", "u3")
        assert len(await record.known()) == BROKER_LOGINS_OF_DEVICE + 3
        assert await record.void("acme", "phone", "s0", 5) == []  # of tokens of before
        assert sorted(await record.void("acme", "phone", "s0", 6)) == ["u1", "u2", "u3", "u4"]
        assert await record.void("acme", "phone", "s0", 6) == []
        assert len(await record.void("acme", "phone", "s1*", 6)) == 11  # s1, s10 to s19
        gone = await record.ended(9, 100)  # again, as nobody said that the broker was told
        assert len(gone) == 1 + 4 + 11
        assert await record.ended(9, 100) == gone
        await record.cleared(gone)
        assert await record.ended(9, 100) == []
        left = await record.kept()
        assert {(one.key, one.issued_ms) for one in left} == {("kid", 5)}
        assert {one.user for one in left} == await record.known()
        gone = await record.ended(10, 5)
        assert len(gone) == 5
        await record.cleared(gone)
        assert len(await record.ended(10, 100)) == BROKER_LOGINS_OF_DEVICE + 3 - 4 - 11 - 5
        assert await record.known() == set()
        await store.close()


async def test_a_broker_that_checks_nothing_gets_no_logins(house: House) -> None:
    """Else devices would be told that they are safe with it."""
    async with (
        Broker.start() as broker,
        DynamicSecurity(lambda: broker.url, MqttLogin()) as admin,
    ):
        assert not await admin.wait_known()
        assert "no dynamic security" in admin.why_not
    access = {"command": "setDefaultACLAccess"}
    async with house.admin() as admin:
        for kind in ("subscribe", "publishClientSend"):
            await admin.run({**access, "acls": [{"acltype": kind, "allow": True}]})
            try:
                async with DynamicSecurity(lambda: house.broker.url, house.broker.login) as other:
                    assert not await other.wait_known()
                    assert kind in other.why_not
            finally:
                await admin.run({**access, "acls": [{"acltype": kind, "allow": False}]})


async def test_what_devices_are_told_of_an_administered_broker(tmp_path: Path) -> None:
    own = "mqtts://broker.example:8883"
    keys = {"tenant_keys": tmp_path / "keys", "host": "0.0.0.0"}
    assert load_settings(keys).told_mqtt_url(own, logins=True) == own
    assert load_settings(keys).told_mqtt_url("mqtt://127.0.0.1", logins=True) == ""
    public = load_settings({**keys, "public_mqtt_url": "mqtts://public.example"})
    assert public.told_mqtt_url(own, logins=True) == "mqtts://public.example"


async def test_a_broker_s_files_are_its_owner_s_and_never_replaced(tmp_path: Path) -> None:
    plugin = ["--plugin", "/usr/lib/plugin.so"]
    made = CliRunner().invoke(broker_cli, ["init", str(tmp_path / "b"), *plugin])
    assert made.exit_code == 0, made.output
    for name in ("mosquitto.conf", "logins.json", "cloud.login"):
        assert (tmp_path / "b" / name).stat().st_mode & 0o777 == 0o600
    password = (tmp_path / "b" / "cloud.login").read_text().strip().partition(":")[2]
    assert len(password) == 43
    assert password not in made.output + (tmp_path / "b" / "logins.json").read_text()
    for arguments, why in (
        (["init", str(tmp_path / "b"), *plugin], "is there already"),
        (["init", str(tmp_path / "c"), "--host", "0.0.0.0", *plugin], "needs TLS"),
        (["init", str(tmp_path / "c"), "--tls-cert", "x.crt", *plugin], "one is missing"),
    ):
        refusal = CliRunner().invoke(broker_cli, arguments)
        assert why in str(refusal.exception)
    assert not (tmp_path / "c").exists()
