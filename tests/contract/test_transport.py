"""Addresses: what is listened on, what is refused and why, and no password in what is printed."""

from __future__ import annotations

import asyncio
import socket
import traceback
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from segue_cloud.sessions.wire import Wire
from segue_contract.errors import (
    Internal,
    InvalidArgument,
    NotLoopback,
    Overloaded,
    PortInUse,
    SegueError,
    Unreachable,
)
from segue_contract.transport.channel import open_channel
from segue_contract.transport.mqtt import (
    MqttLogin,
    canonical_mqtt_url,
    connect_options,
    parse_mqtt_url,
)
from segue_contract.transport.server import start_server
from segue_contract.transport.status import ERROR_KEY, error_from_rpc
from segue_contract.urls import without_password
from segue_contract.v1 import agent_pb2 as pb
from segue_contract.v1 import agent_pb2_grpc
from tests.support.slow_proxy import SlowProxy


def _needs_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 loopback here: {error}")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]"])
async def test_a_server_is_reached_at_the_address_it_names(host: str) -> None:
    if ":" in host:
        _needs_ipv6()
    running = await start_server(host, 0, [])
    try:
        async with grpc.aio.insecure_channel(running.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    finally:
        await running.stop(0)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_taken_port_is_told_from_an_address_that_is_not_there(host: str) -> None:
    if ":" in host:
        _needs_ipv6()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as taken:
        taken.bind((host, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)):
            await start_server(host, port, [])


async def test_an_address_that_cannot_be_bound_is_no_taken_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A loopback address that no interface has: IPv4's are all bindable on Linux, and of IPv6's
    # only ::1 passes the check, so there is none.
    monkeypatch.setattr("segue_contract.transport.server.check_listener", lambda host, **_: host)
    with pytest.raises(Internal, match=r"listen on 192\.0\.2\.1:7411"):
        await start_server("192.0.2.1", 7411, [])


async def test_a_far_server_is_reached() -> None:
    # Longer on the way than any pause between two attempts to connect, which begin at 0.1 s.
    running = await start_server("127.0.0.1", 0, [])
    port = int(running.address.rpartition(":")[2])
    try:
        async with (
            SlowProxy(port, delay=lambda: 0.4) as proxy,
            open_channel(f"127.0.0.1:{proxy.port}") as channel,
        ):
            health = health_pb2_grpc.HealthStub(channel)
            reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert proxy.accepted == 1
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    finally:
        await running.stop(0)


class Broken(agent_pb2_grpc.AgentServicer):
    """Of another call that was cancelled a handler knows by a CancelledError."""

    async def Read(self, request: pb.ReadRequest, context: Any) -> pb.ReadReply:
        raise asyncio.CancelledError

    async def Attach(self, request: pb.AttachRequest, context: Any) -> AsyncIterator[Any]:
        yield pb.AttachEvent()
        raise asyncio.CancelledError


async def test_every_call_ends_with_a_status() -> None:
    server = await start_server(
        "127.0.0.1",
        0,
        [("segue.v1.Agent", lambda s: agent_pb2_grpc.add_AgentServicer_to_server(Broken(), s))],
    )
    channel = open_channel(server.address)
    agent: Any = agent_pb2_grpc.AgentStub(channel)
    try:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await agent.Read(pb.ReadRequest(session="trip"), timeout=5)
        assert type(error_from_rpc(caught.value)) is Unreachable
        assert "cancelled" in str(caught.value.details())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in agent.Attach(pb.AttachRequest(session="trip"), timeout=5):
                pass
        assert type(error_from_rpc(caught.value)) is Unreachable
    finally:
        await channel.close()
        await server.stop(0)


async def test_other_hosts_are_refused() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(NotLoopback):
            await start_server(host, 0, [])


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://user:pw@h:1/0", "redis://h:1/0"),
        ("redis://user:p@w@h", "redis://h"),
        ("redis://user:p/w@h", "redis://h"),
        ("redis://user:p?w@h", "redis://..."),
        ("redis://h/0?password=pw", "redis://h/0"),
        ("redis://h/0?password=p@w", "redis://..."),
        ("user:pw@h", "h"),
    ],
)
def test_what_is_shown_of_an_address(url: str, shown: str) -> None:
    assert without_password(url) == shown


@pytest.mark.parametrize("url", ["rediss//u:hunter2@h", "redis://u:hunter2@h:x", "u:hunter2@h",
                                 "redis://u:hunter2/x@h"])  # fmt: skip
def test_a_bad_store_address_shows_no_password(url: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Wire(url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_bad_store_address_without_password_says_why() -> None:
    with pytest.raises(InvalidArgument, match=r"'http://h' is no Redis address: .*redis://"):
        Wire("http://h")


@pytest.mark.parametrize("url", ["http://u:hunter2@h", "mqtt://u:hunter2@h:x", "mqtt://u:hunter2@"])
def test_a_bad_broker_address_shows_no_password(url: str) -> None:
    with pytest.raises(InvalidArgument, match="no broker address") as caught:
        parse_mqtt_url(url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_broker_address_with_a_login() -> None:
    server = parse_mqtt_url("mqtts://u%40x:hunter2%2F@h")
    assert (server.username, server.password) == ("u@x", "hunter2/")
    assert "hunter2" not in repr(server)
    assert server.url == canonical_mqtt_url("mqtts://h:8883") == "mqtts://h:8883"


def test_a_password_does_not_travel_unencrypted() -> None:
    with pytest.raises(InvalidArgument, match="unencrypted") as caught:
        connect_options(parse_mqtt_url("mqtt://u:hunter2@broker.example"), MqttLogin())
    assert "hunter2" not in str(caught.value)
    options = connect_options(parse_mqtt_url("mqtt://127.0.0.1"), MqttLogin("u", "hunter2"))
    assert options == {"username": "u", "password": "hunter2"}


def test_broker_addresses() -> None:
    assert parse_mqtt_url("mqtt://h").address == ("h", 1883)
    assert parse_mqtt_url("mqtt://[::1]:7").address == ("::1", 7)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("CLIENT: Sent message larger than max (9 vs. 8)", InvalidArgument),
        ("SERVER: Received message larger than max (9 vs. 8)", InvalidArgument),
        ("SERVER: Sent message larger than max (9 vs. 8)", Internal),
        ("Too many pings", Overloaded),
    ],
)
def test_a_message_beyond_grpcs_bound_is_no_lack_of_room(said: str, kind: type[SegueError]) -> None:
    none = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, none, none, details=said)
    assert type(error_from_rpc(error)) is kind


@pytest.mark.parametrize(
    "said",
    [
        "Internal error from Core",  # a write that was under way as the stream broke
        "Received RST_STREAM with error code 2",
    ],
)
def test_a_stream_that_broke_is_a_peer_out_of_reach(said: str) -> None:
    none = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, none, none, details=said)
    assert type(error_from_rpc(error)) is Unreachable


def test_an_internal_error_of_a_node_stays_one() -> None:
    own = grpc.aio.Metadata((ERROR_KEY, Internal("A fault.").to_bytes()))
    error = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, grpc.aio.Metadata(), own, details="x")
    assert type(error_from_rpc(error)) is Internal
