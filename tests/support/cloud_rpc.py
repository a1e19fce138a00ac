"""A cloud as edges and devices reach it: real store, real gRPC, a scripted engine."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segue_cloud.log.session_log import SessionLog
from segue_cloud.mqtt.dynsec import DynamicSecurity
from segue_cloud.mqtt.logins import BrokerLogins
from segue_cloud.mqtt.publisher import Publisher
from segue_cloud.rpc.agent import AgentService, Identity
from segue_cloud.rpc.decode import DecodeService
from segue_cloud.rpc.directory import EdgeDirectory
from segue_cloud.rpc.facts import FactsSource
from segue_cloud.rpc.live import LiveView
from segue_cloud.rpc.revoking import following_revocations
from segue_cloud.sessions.store import RedisStore
from segue_cloud.tenants.trust import EVERYBODY, EdgeTrust
from segue_cloud.tenants.usage import TenantUsage
from segue_cloud.turns.manager import TurnManager
from segue_cloud.turns.owner import OwnerDeps
from segue_cloud.turns.spot_checks import SpotChecks
from segue_contract.chat import ChatTokenizer
from segue_contract.limits import COMPACT_AFTER_BYTES, COMPACT_AFTER_ENTRIES, TurnLimits
from segue_contract.model.manifest import Manifest, read_manifest
from segue_contract.transport.channel import open_channel
from segue_contract.transport.gate import Gate
from segue_contract.transport.mqtt import MqttLogin
from segue_contract.transport.server import start_server
from segue_contract.v1 import agent_pb2_grpc, decode_pb2_grpc
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tokenizers import tokenizer_of


@dataclass
class CloudRpc:
    address: str
    agent: agent_pb2_grpc.AgentStub
    decode: decode_pb2_grpc.DecodeStub
    manager: TurnManager
    log: SessionLog
    engine: ScriptedEngine
    manifest: Manifest
    tokenizer: ChatTokenizer
    logins: BrokerLogins | None = None


@asynccontextmanager
async def cloud_rpc(
    url: str,
    model_dir: Path,
    engine: ScriptedEngine,
    *,
    max_turns: int = 8,
    manifest: Manifest | None = None,
    tokenizer: ChatTokenizer | None = None,
    mqtt_url: str = "",
    mqtt_login: MqttLogin = MqttLogin(),
    limits: TurnLimits = TurnLimits(),
    folds: bool = True,
    gate: Gate | None = None,
    usage: TenantUsage | None = None,
    trust: EdgeTrust | None = None,
    **listener: Any,
) -> AsyncIterator[CloudRpc]:
    """`manifest`, `tokenizer`: in place of those that lie in `model_dir`. `mqtt_url`: of a broker
    that devices follow over. `mqtt_login`: of an administered one, beside a gate. `folds`: False
    keeps every entry of a log.
    `listener`: of its server (TLS)."""
    manifest = manifest or read_manifest(model_dir)
    tokenizer = tokenizer or tokenizer_of(model_dir)
    store = await RedisStore.connect(url)
    async with AsyncExitStack() as stack:
        publisher = None
        after, size = (COMPACT_AFTER_ENTRIES, COMPACT_AFTER_BYTES) if folds else (2**53, 2**53)
        if mqtt_url:
            publisher = await stack.enter_async_context(
                Publisher(mqtt_url, store, login=mqtt_login)
            )
        log = await stack.enter_async_context(
            SessionLog(store, publisher, compact_after=after, compact_bytes=size)
        )
        if gate is not None:
            await stack.enter_async_context(following_revocations(log, gate))
        context = manifest.geometry.context
        deps = OwnerDeps(
            log=log,
            engine=engine,
            tokenizer=tokenizer,
            end_tokens=frozenset(manifest.end_tokens),
            max_context=context,
            vocab=manifest.geometry.vocab,
            now_ms=lambda: time.time_ns() // 1_000_000,
            monotonic=time.monotonic,
            limits=limits,
            domains=trust.domains if trust else lambda tenant, edge: EVERYBODY,
        )
        manager = TurnManager(
            deps, store.running_turns(manifest.name), model=manifest.name, max_turns=max_turns,
            usage=usage,
        )  # fmt: skip
        edges = EdgeDirectory()
        live = logins = None
        if publisher is not None:
            told = lambda: mqtt_url  # noqa: E731
            if gate is not None and mqtt_login.username:
                admin = await stack.enter_async_context(DynamicSecurity(told, mqtt_login))
                tokens = gate._tokens
                record = store.login_record()
                logins = BrokerLogins(record, admin, publisher.keys, gate, tokens)
                await stack.enter_async_context(logins)
                assert await admin.wait_known(), admin.why_not
            live = LiveView(log, told, publisher.keys.of, logins)
        agent = AgentService(
            Identity("cloud-1", manifest.name, context),
            manager,
            log,
            publishing=lambda: publisher is None or publisher.publishing,
            edges=edges,
            usage=usage,
            live=live,
        )
        facts = FactsSource(
            engine,
            manager,
            manifest,
            "cloud-1",
            authenticates=gate is not None and gate.authenticates,
            refuses=trust.refuses if trust else lambda edge: False,
        )
        checks = None
        if trust is not None:
            checks = await stack.enter_async_context(SpotChecks(engine, trust, deps.weight))
        decode = DecodeService(manager, log, engine, manifest, facts, edges, trust, checks)
        server = await start_server(
            "127.0.0.1",
            0,
            [
                ("segue.v1.Agent", lambda s: agent_pb2_grpc.add_AgentServicer_to_server(agent, s)),
                (
                    "segue.v1.Decode",
                    lambda s: decode_pb2_grpc.add_DecodeServicer_to_server(decode, s),
                ),
            ],
            gate=gate,
            **listener,
        )
        channel = open_channel(server.address)
        try:
            yield CloudRpc(
                server.address,
                agent_pb2_grpc.AgentStub(channel),
                decode_pb2_grpc.DecodeStub(channel),
                manager,
                log,
                engine,
                manifest,
                tokenizer,
                logins,
            )
        finally:
            await channel.close()
            await server.stop(0)
            await manager.close()
            await store.close()
