"""Is it there, and how fast does it answer: a node, a store, a broker. Times in seconds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass

import aiomqtt

from segue._access import Access
from segue.local.authority import Facts
from segue.local.store_probe import RespError, answering_stores
from segue.local.tls_probe import TlsSeen, look_at_tls
from segue_contract.errors import SegueError, Unreachable
from segue_contract.ids import new_id
from segue_contract.topics import BROKER_KEY, ROOT
from segue_contract.transport.mqtt import MqttLogin, connect_options, parse_mqtt_url
from segue_contract.transport.mqtt_client import MqttClient, PublishRefused
from segue_contract.transport.status import concerns_tls, error_from_rpc
from segue_contract.transport.tls import TlsFiles
from segue_contract.transport.tls_reasons import explain
from segue_contract.transport.together import end

ROUNDS = 20
TIMEOUT_S = 3.0
# As close together as tokens: what Nagle's algorithm and delayed acknowledgements would hold back.
_MQTT_GAP_S = 0.004
_HEALTH_METHOD = "/grpc.health.v1.Health/Check"
_REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")  # names: gRPC is loaded only to ask
_HEALTHY = b"\x08\x01"  # HealthCheckResponse{status: SERVING}


@dataclass(frozen=True)
class RoundTrips:
    """Round trips of one probe, in seconds, sorted."""

    seconds: tuple[float, ...]

    @property
    def p50(self) -> float:
        return self.seconds[len(self.seconds) // 2]

    @property
    def worst(self) -> float:
        return self.seconds[-1]


async def probe_node(target: str, access: Access = Access()) -> RoundTrips:
    """Round trips of the gRPC health service of an edge node or a cloud.

    Raises:
        Unreachable: nobody answers, or it says that it does not serve.
        Unauthenticated, PermissionDenied: it wants a token, or another one.
        InvalidArgument: `target` is no address.
    """
    import grpc

    channel = access.channel(target)
    times: list[float] = []
    try:
        check = channel.unary_unary(_HEALTH_METHOD, None, None)
        for _ in range(ROUNDS + 1):
            began = time.monotonic()
            answer = await check(b"", timeout=TIMEOUT_S, wait_for_ready=False)
            times.append(time.monotonic() - began)
            if answer != _HEALTHY:
                raise Unreachable(f"{target} answers and does not serve (it is stopping).")
    except grpc.aio.AioRpcError as error:
        if concerns_tls(error.details() or ""):
            raise await _tls_trouble(target, access) from None
        if error.code().name in _REFUSED:
            raise error_from_rpc(error) from None
        raise Unreachable(f"Nothing serves at {target} ({error.code().name.lower()}).") from None
    finally:
        await channel.close(None)
    return RoundTrips(tuple(sorted(times[1:])))  # the first one also connected


async def certificate_of(target: str, access: Access) -> Facts | None:
    """What the node at `target` shows; None where it cannot be seen."""
    host, _, port = target.rpartition(":")
    try:
        return (await look_at_tls(host, int(port), access.tls, grpc=True)).certificate
    except (OSError, SegueError):
        return None


async def _tls_trouble(target: str, access: Access) -> Unreachable:
    """Why no connection to a node came about, as a second attempt sees it."""
    host, _, port = target.rpartition(":")
    try:
        seen = await look_at_tls(host, int(port), access.tls, grpc=True)
    except OSError as error:
        return Unreachable(f"Nothing serves at {target} ({error}).")
    return _trouble(seen, f"It ends each connection to {target} at once.")


def _trouble(seen: TlsSeen, otherwise: str) -> Unreachable:
    if seen.reason is None:
        return Unreachable(otherwise)
    message = seen.reason.message
    if seen.certificate is not None:
        shown = seen.certificate
        names = ", ".join((*shown.nodes, *shown.hosts)) or "nobody"
        message += f" (It shows one for {names}, by {shown.issuer or 'itself'},"
        message += f" {shown.begins:%Y-%m-%d} to {shown.ends:%Y-%m-%d}.)"
    return Unreachable(message, hint=seen.reason.hint)


async def probe_store(url: str) -> RoundTrips:
    """Round trips of PING to a Redis or Valkey: the one, the Sentinels' primary, all of a Cluster.

    Raises:
        Unreachable: nobody answers there, or it answers something else.
        InvalidArgument: `url` is no redis:// address.
    """
    times: list[float] = []
    try:
        async with asyncio.timeout(TIMEOUT_S), answering_stores(url) as stores:
            for store in stores:
                for _ in range(ROUNDS):
                    began = time.monotonic()
                    answer = await store.ask("PING")
                    times.append(time.monotonic() - began)
                    if answer != "PONG" and not isinstance(answer, RespError):
                        raise Unreachable("It does not answer as Redis does.")
                policy = await store.ask("CONFIG", "GET", "maxmemory-policy")
                if isinstance(policy, list) and policy[1:] not in ([], ["noeviction"]):
                    raise Unreachable(
                        "The store throws keys away when it is full "
                        f"(maxmemory-policy {policy[1]}).",
                        hint="Set maxmemory-policy to noeviction; a cloud refuses it otherwise.",
                    )
    except (OSError, TimeoutError) as error:
        raise _no_store(error) from None
    return RoundTrips(tuple(sorted(times)))


def _no_store(error: OSError | TimeoutError) -> Unreachable:
    reason = explain(str(error))
    if reason is not None:
        hint = "Give the store's authority: --redis-ca FILE of a cloud, --tls-ca FILE here."
        untrusted = "none of the authorities" in reason.message
        return Unreachable(reason.message, hint=hint if untrusted else reason.hint)
    return Unreachable(f"Nothing answers there ({str(error) or 'too late'}).")


async def broker_of(redis_url: str) -> str:
    """The broker that the clouds of this store publish through; "" where none is kept.

    Raises:
        Unreachable: the store does not answer.
    """
    try:
        async with asyncio.timeout(TIMEOUT_S), answering_stores(redis_url) as stores:
            for store in stores:  # of a Cluster one has it, the others refuse
                url = await store.ask("HGET", BROKER_KEY, "url")
                if isinstance(url, str) and not isinstance(url, RespError):
                    return url
    except (OSError, TimeoutError) as error:
        raise _no_store(error) from None
    return ""


async def probe_broker(url: str, access: Access = Access()) -> RoundTrips:
    """Times from publish to receipt of small messages 4 ms apart, through an MQTT 5 broker.

    Raises:
        Unreachable: nobody answers there in time.
        InvalidArgument: `url` is no mqtt:// address.
    """
    server = parse_mqtt_url(url)
    tls = access.tls or TlsFiles()
    topic = f"{ROOT}/doctor/{new_id('d', os.urandom)}"
    try:
        async with asyncio.timeout(TIMEOUT_S):
            async with MqttClient(
                *server.address, **connect_options(server, MqttLogin(tls=tls))
            ) as client:
                await client.subscribe(topic)
                await client.publish(topic, b"", qos=1)  # with an answer: a refusal is told
                return RoundTrips(tuple(sorted(await _echoes(client, topic))))
    except PublishRefused as refusal:
        raise Unreachable(
            f"The broker answers and refuses what is published ({refusal}).",
            hint="Its access rules must allow segue/# to the clouds.",
        ) from None
    except (aiomqtt.MqttError, OSError, TimeoutError) as error:
        with contextlib.suppress(OSError):
            if server.secure:
                seen = await look_at_tls(*server.address, tls)
                if seen.reason is not None:
                    raise _trouble(seen, "") from None
        raise Unreachable(f"No MQTT 5 broker answers there ({str(error) or 'too late'}).") from None


async def _echoes(client: aiomqtt.Client, topic: str) -> list[float]:
    sent: list[float] = []
    times: list[float] = []

    async def publish() -> None:
        for number in range(ROUNDS):
            sent.append(time.monotonic())
            await client.publish(topic, number.to_bytes(2, "big"))
            await asyncio.sleep(_MQTT_GAP_S)

    publishing = asyncio.create_task(publish(), name="doctor publishes")
    try:
        async for message in client.messages:
            if not message.payload:
                continue
            number = int.from_bytes(bytes(message.payload), "big")
            times.append(time.monotonic() - sent[number])
            if len(times) == ROUNDS:
                break
    finally:
        await end(publishing)
    return times
