"""The composition root of `segue cloud`: what is made, in which order, and who gets it."""

from __future__ import annotations

import asyncio
import importlib
import os
import random
import threading
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import structlog

from segue_cloud.config import CloudSettings
from segue_cloud.engine.port import Engine
from segue_cloud.log.keeping import expiring
from segue_cloud.log.session_log import SessionLog
from segue_cloud.metrics import CloudMetrics
from segue_cloud.mqtt.dynsec import DynamicSecurity
from segue_cloud.mqtt.logins import BrokerLogins
from segue_cloud.mqtt.one_broker import OneBroker
from segue_cloud.mqtt.publisher import Publisher
from segue_cloud.rpc.agent import AgentService, Identity
from segue_cloud.rpc.decode import DecodeService
from segue_cloud.rpc.directory import EdgeDirectory
from segue_cloud.rpc.facts import FactsSource
from segue_cloud.rpc.live import LiveView
from segue_cloud.rpc.revoking import following_revocations
from segue_cloud.sessions.store import RedisStore
from segue_cloud.tenants.quotas_file import quotas_of
from segue_cloud.tenants.trust import EdgeTrust
from segue_cloud.tenants.usage import TenantUsage
from segue_cloud.turns.manager import TurnManager
from segue_cloud.turns.owner import OwnerDeps
from segue_cloud.turns.recovery import recovering
from segue_cloud.turns.spot_checks import SpotChecks
from segue_contract.chat import ChatTokenizer
from segue_contract.errors import EngineGone, SegueError
from segue_contract.ids import new_id
from segue_contract.limits import SHUTDOWN_GRACE_S
from segue_contract.model.home import model_directory
from segue_contract.model.manifest import Manifest, read_manifest
from segue_contract.servers import Broker, Valkey
from segue_contract.telemetry import EVENT_READY
from segue_contract.transport.gate import Gate
from segue_contract.transport.logs import set_up_logs, without_password
from segue_contract.transport.mqtt import parse_mqtt_url
from segue_contract.transport.process import keep_loaded, stop_requested
from segue_contract.transport.server import RunningServer, check_listener, start_server
from segue_contract.transport.tenant_keys import TenantKeys
from segue_contract.transport.together import end
from segue_contract.v1 import agent_pb2_grpc, decode_pb2_grpc

log = structlog.get_logger("segue.cloud")


@dataclass
class Cloud:
    """Everything that runs; `run_cloud` makes and unmakes it."""

    server: RunningServer
    manager: TurnManager
    engine: Engine
    instance: str
    model: str
    redis_url: str
    mqtt_url: str
    mqtt_devices: str  # how they follow over MQTT: with "logins" of their own, as "shared" by all,
    # or "none"


async def serve(settings: CloudSettings) -> None:
    """Run until SIGINT or SIGTERM; prints the ready line on stdout."""
    began = time.monotonic()
    set_up_logs(settings.log_level)
    async with AsyncExitStack() as stack:
        stop = stack.enter_context(stop_requested())
        starting = asyncio.ensure_future(run_cloud(settings, stack))
        stopping = asyncio.ensure_future(stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            await end(starting)
            return
        cloud = starting.result()
        keep_loaded()
        _print_ready(cloud, time.monotonic() - began)
        dying = asyncio.ensure_future(cloud.engine.died.wait())
        await asyncio.wait({stopping, dying}, return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        log.info("stopping", running_turns=cloud.manager.running)
        if cloud.engine.died.is_set():
            _end_after(4 * SHUTDOWN_GRACE_S)
            raise EngineGone(
                "The engine died; this instance ends, so that turns go to others.",
                hint="Its log says why. Start it again.",
            )


def _end_after(seconds: float) -> None:
    """End the process then, whatever it waits for: Python joins the threads of its pools, and one
    of a dead engine's may never return."""
    last = threading.Timer(seconds, os._exit, (1,))
    last.daemon = True
    last.start()


async def run_cloud(settings: CloudSettings, stack: AsyncExitStack) -> Cloud:
    """Start everything onto `stack`, which stops it in reverse order.

    Raises:
        NotLoopback, PortInUse, ModelError, StoreUnavailable, MissingExtra, OtherBroker.
    """
    tokens = TenantKeys(settings.tenant_keys) if settings.tenant_keys is not None else None
    check_listener(
        settings.host,
        tls=settings.listener_tls,
        authenticated=tokens is not None,
    )
    gate = Gate(settings.tenant, tokens)
    quotas = quotas_of(settings.quotas, keyed=tokens is not None)
    usage = TenantUsage(quotas, time.monotonic)
    trust = EdgeTrust(
        keyed=tokens is not None, chance=random.SystemRandom().random, monotonic=time.monotonic
    )
    login = settings.broker_login
    if settings.public_mqtt_url:
        parse_mqtt_url(settings.public_mqtt_url)
    directory = model_directory(settings.model)
    manifest = read_manifest(directory)
    instance = settings.instance or new_id("cloud-", os.urandom)
    loading = asyncio.ensure_future(_load_engine(settings, directory, manifest))
    try:
        redis_url = settings.store_url or await _embedded_store(stack)
        store = await RedisStore.connect(redis_url)
        stack.push_async_callback(store.close)
        broker = OneBroker(store.broker_record(), instance, lambda: _embedded_broker(stack))
        publisher = Publisher(await broker.settle(settings.mqtt_url), store, login=login)
        broker.moved = publisher.move
        await stack.enter_async_context(broker)
        await stack.enter_async_context(publisher)
        session_log = await stack.enter_async_context(SessionLog(store, publisher))

        def tenants() -> set[str]:
            return {settings.tenant} | (tokens.tenants if tokens is not None else set())

        if settings.session_ttl:
            await stack.enter_async_context(
                expiring(session_log.keeping, tenants, settings.session_ttl * 86400.0)
            )
        tokenizer = ChatTokenizer.load(directory, manifest)
        engine = await loading
    except BaseException:
        await end(loading)
        raise
    stack.push_async_callback(engine.close)
    deps = OwnerDeps(
        log=session_log,
        engine=engine,
        tokenizer=tokenizer,
        end_tokens=frozenset(manifest.end_tokens),
        max_context=manifest.geometry.context,
        vocab=manifest.geometry.vocab,
        now_ms=lambda: time.time_ns() // 1_000_000,
        monotonic=time.monotonic,
        weight=usage.weight,
        domains=trust.domains,
    )
    running = store.running_turns(manifest.name)
    manager = TurnManager(
        deps,
        running,
        model=manifest.name,
        weights=manifest.weights_digest,
        max_turns=settings.max_turns,
        usage=usage,
    )
    await stack.enter_async_context(recovering(manager, running))
    edges = EdgeDirectory()
    logins = await _device_logins(stack, settings, store, publisher, gate, tokens)

    def told_url() -> str:
        return settings.told_mqtt_url(publisher.url, logins=logins is not None and logins.ready)

    agent = AgentService(
        Identity(instance, manifest.name, manifest.geometry.context),
        manager,
        session_log,
        publishing=lambda: publisher.publishing,
        live=LiveView(session_log, told_url, publisher.keys.of, logins),
        usage=usage,
        edges=edges,
    )
    facts = FactsSource(
        engine, manager, manifest, instance, authenticates=gate.authenticates, refuses=trust.refuses
    )
    checks = await stack.enter_async_context(SpotChecks(engine, trust, usage.weight))
    decode = DecodeService(manager, session_log, engine, manifest, facts, edges, trust, checks)
    if tokens is not None:
        await stack.enter_async_context(following_revocations(session_log, gate))
    if settings.metrics_port:
        metrics = CloudMetrics(engine, manager, lambda: store.replica_waits, trust.checks)
        await stack.enter_async_context(metrics.listening(settings.metrics_port))
    server = await _serve(settings, agent, decode, gate)
    stack.push_async_callback(server.stop)
    stack.push_async_callback(manager.close)  # first: the streams of turns that move end by it
    with_logins = logins is not None and logins.ready
    devices = ("logins" if with_logins else "shared") if told_url() else "none"
    return Cloud(
        server, manager, engine, instance, manifest.name, redis_url, publisher.url, devices
    )


async def _device_logins(
    stack: AsyncExitStack,
    settings: CloudSettings,
    store: RedisStore,
    publisher: Publisher,
    gate: Gate,
    tokens: TenantKeys | None,
) -> BrokerLogins | None:
    """Where devices are known, and our login of the broker may administer it: one for each of them.
    None: the operator wants it otherwise, or there is no such login."""
    login = settings.broker_login
    public = settings.public_mqtt_url
    shows = login.username or login.tls.certificate is not None
    if tokens is None or not shows or (public and parse_mqtt_url(public).username):
        return None
    admin = await stack.enter_async_context(DynamicSecurity(lambda: publisher.url, login))
    logins = BrokerLogins(store.login_record(), admin, publisher.keys, gate, tokens)
    await stack.enter_async_context(logins)
    await admin.wait_known()
    return logins


async def _serve(
    settings: CloudSettings, agent: AgentService, decode: DecodeService, gate: Gate
) -> RunningServer:
    return await start_server(
        settings.host,
        settings.port,
        [
            (
                "segue.v1.Agent",
                lambda s: agent_pb2_grpc.add_AgentServicer_to_server(agent, s),  # type: ignore[no-untyped-call]
            ),
            (
                "segue.v1.Decode",
                lambda s: decode_pb2_grpc.add_DecodeServicer_to_server(decode, s),  # type: ignore[no-untyped-call]
            ),
        ],
        tls=settings.listener_tls,
        clients=settings.tls_clients,
        node_port=settings.node_port,
        health=settings.health,
        gate=gate,
    )


async def _load_engine(settings: CloudSettings, directory: Path, manifest: Manifest) -> Engine:
    # Importing torch takes seconds on a busy machine: in a thread, so that nothing else times out.
    await asyncio.to_thread(importlib.import_module, "segue_cloud.engine.torch_engine")
    from segue_cloud.engine.devices import choose_device
    from segue_cloud.engine.torch_engine import EngineOptions, TorchEngine

    options = EngineOptions(
        dtype=settings.dtype,
        device=choose_device(settings.device),
        threads=settings.threads or None,
        pool_bytes=settings.pool_mb << 20 or None,
        max_turns=settings.max_turns,
        host_bytes=None if settings.host_mb is None else settings.host_mb << 20,
        window=settings.window,
        sinks=settings.sinks,
        tensor_parallel=settings.tensor_parallel,
    )
    try:
        return await TorchEngine.load(directory, manifest, options)
    except SegueError:
        raise
    except Exception:
        if settings.device != "auto" or options.device == "cpu":
            raise
        # A driver, a library or a kernel that does not fit this card; the CPU can still serve.
        log.exception("card_failed", hint="Going on with the CPU; --device cuda would insist.")
        return await TorchEngine.load(directory, manifest, replace(options, device="cpu"))


async def _embedded_store(stack: AsyncExitStack) -> str:
    valkey = await stack.enter_async_context(Valkey.start())
    log.info("embedded_store", url=valkey.url)
    return valkey.url


async def _embedded_broker(stack: AsyncExitStack) -> str:
    broker = await stack.enter_async_context(Broker.start())
    log.info("embedded_broker", url=broker.url, kind=broker.kind)
    return broker.url


def _print_ready(cloud: Cloud, seconds: float) -> None:
    ready = {
        "event": EVENT_READY,
        "role": "cloud",
        "host": cloud.server.host,
        "port": cloud.server.port,
        "instance": cloud.instance,
        "model": cloud.model,
        "tls": cloud.server.tls,
        "redis_url": without_password(cloud.redis_url),
        "mqtt_url": without_password(cloud.mqtt_url),
        "mqtt_devices": cloud.mqtt_devices,
        "seconds": round(seconds, 3),
    }
    if cloud.server.node_port is not None:
        ready["node_port"] = cloud.server.node_port
    if cloud.server.health_port is not None:
        ready["health_port"] = cloud.server.health_port
    os.write(1, msgspec.json.encode(ready) + b"\n")
    log.info(EVENT_READY, address=cloud.server.address, seconds=ready["seconds"])
