"""The edge node: everything is put together here, and only here.

model, cache, compute thread ─┐
clouds (channels, probes) ────┼─► TurnRun ─► TurnRegistry ─► Agent service ─► gRPC server
histories, outbox, warmer ────┘
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Protocol

import structlog

from segue_contract.chat import ChatTokenizer
from segue_contract.cpus import available_cpus
from segue_contract.errors import SessionDeleted
from segue_contract.ids import DEFAULT_TENANT, new_id
from segue_contract.kv.layout import BLOCK_TOKENS
from segue_contract.limits import MIB, EdgeTurnLimits
from segue_contract.model.gate import bytes_per_token
from segue_contract.model.manifest import Manifest
from segue_contract.sync.ops import Sampling
from segue_contract.telemetry import EVENT_PROVIDER
from segue_contract.transport.gate import Gate, Tokens
from segue_contract.transport.server import RunningServer, check_listener, start_server
from segue_contract.transport.stalls import StallMonitor
from segue_contract.transport.tenant_keys import TenantKeys
from segue_contract.v1 import agent_pb2_grpc
from segue_edge.api.agent import AgentService
from segue_edge.compute import ComputeThread, Priority
from segue_edge.config import EdgeConfig
from segue_edge.planner.estimators import EdgeSpeeds
from segue_edge.planner.plan import parse_force
from segue_edge.prefill.prefix_cache import PrefixCache
from segue_edge.prefill.providers import Device
from segue_edge.prefill.runtime import EdgeModel
from segue_edge.turns.asked import Asked
from segue_edge.turns.closing import TurnClosing
from segue_edge.turns.cloud.begin import TurnOpening
from segue_edge.turns.compute.model_port import EdgeModelPort
from segue_edge.turns.compute.prefill_job import DecodeJob, NoCache, PrefillJob
from segue_edge.turns.compute.tools import EdgeTools
from segue_edge.turns.compute.warm import Warmer
from segue_edge.turns.history import HistoryCache
from segue_edge.turns.ledger_file import LedgerFile
from segue_edge.turns.offline.deliver import Delivery
from segue_edge.turns.offline.journal import Journal
from segue_edge.turns.offline.outbox import Outbox
from segue_edge.turns.offline.turn import OfflineTurn
from segue_edge.turns.planning import TurnPlanner
from segue_edge.turns.registry import TurnRegistry
from segue_edge.turns.run import TurnRun
from segue_edge.uplink.clouds import CloudSet
from segue_edge.uplink.pacer import Pacer
from segue_edge.uplink.revoked import following_revoked
from segue_edge.uplink.sender import encode_with

log = structlog.get_logger("segue.edge")

# After turns and followers have ended: for answers on their way out.
_LAST_CALLS_S = 0.5

AGENT = "segue.v1.Agent"


class NodeModel(EdgeModelPort, Protocol):
    """A turn's model that also says what it is."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def device(self) -> Device: ...

    @property
    def recipe_name(self) -> str: ...


Load = Callable[[EdgeConfig], tuple[NodeModel, ChatTokenizer]]


class EdgeNode:
    """`async with EdgeNode(config) as node`: serves until the block is left.

    Attributes (once entered): `server`, `tools`, `clouds`, `outbox`, `warmer`, `registry`,
    `instance`, `provider`, `start_s`.
    """

    def __init__(
        self,
        config: EdgeConfig,
        load: Load | None = None,
        limits: EdgeTurnLimits = EdgeTurnLimits(),
        tokens: Tokens | None = None,
    ) -> None:
        """`tokens`: says who bears one; without it everybody on this machine is served."""
        self.config = config
        self._load = load or load_model
        self._limits = limits
        self._tokens = tokens
        self.instance = new_id("edge-", os.urandom)
        self.provider = ""
        self.start_s = 0.0
        self.tools: EdgeTools
        self.clouds: CloudSet
        self.outbox: Outbox
        self.warmer: Warmer
        self.registry: TurnRegistry
        self.histories: HistoryCache
        self._gate: Gate
        self.server: RunningServer
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> EdgeNode:
        begun = time.monotonic()
        config = self.config
        if config.tenant_keys is not None:
            self._tokens = TenantKeys(config.tenant_keys)
        check_listener(
            config.host,
            tls=config.listener_tls,
            authenticated=self._tokens is not None,
        )
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        self.start_s = time.monotonic() - begun
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        config = self.config
        self.histories = HistoryCache()
        gate = self._gate = Gate(DEFAULT_TENANT, self._tokens)
        clouds = self.clouds = CloudSet(
            config.cloud,
            Pacer(config.link_bytes_per_s),
            config.channel_tls,
            keyed=self._tokens is not None,
            public_url=config.public_url,
            revoked=gate.revoke,
            home_of=self.histories.home,
        )
        self._stack.push_async_callback(clouds.close)
        clouds.start()  # while the model loads
        if self._tokens is not None:
            await self._stack.enter_async_context(following_revoked(clouds, gate))
        model, tokenizer = await asyncio.to_thread(self._load, config)
        manifest = model.manifest
        self.provider = model.device.name
        self._say_provider(model)
        compute = ComputeThread()
        compute.start()
        self._stack.push_async_callback(compute.close)
        stalls = StallMonitor(compute.running, "edge")
        self._stack.push_async_callback(stalls.close)
        encoder = ThreadPoolExecutor(1, "segue-encode")
        self._stack.callback(encoder.shutdown, wait=False, cancel_futures=True)
        cache = PrefixCache(config.cache_mb * MIB)
        recipe = model.recipe.digest
        speeds = EdgeSpeeds(bytes_per_token(model.recipe.codec, manifest.geometry.kv))
        await _measure_speeds(model, compute, speeds, manifest)
        stalls.start()
        await clouds.probed()
        clouds.expect(manifest.weights_digest)
        self.tools = EdgeTools(
            model=model,
            manifest=manifest,
            recipe=recipe,
            tokenizer=tokenizer,
            cache=cache,
            compute=compute,
            encoder=encoder,
            encode=encode_with(model.recipe.codec),
            speeds=speeds,
            stalls=stalls,
        )
        self.warmer = Warmer(model, cache, compute, recipe)
        self.warmer.start()
        self._stack.push_async_callback(self.warmer.close)
        await self._serve()

    async def _serve(self) -> None:
        tools, clouds = self.tools, self.clouds
        histories = self.histories
        delivery = Delivery(clouds, histories, tools.recipe, self._on_delivered)
        path = self.config.outbox_path
        journal = await asyncio.to_thread(Journal, path) if path is not None else None
        outbox = self.outbox = Outbox(delivery.deliver, journal, self._on_refused)
        self._stack.push_async_callback(outbox.close)
        context = tools.manifest.geometry.context
        opening = TurnOpening(clouds, histories, tools.tokenizer, outbox, context=context)
        planner = TurnPlanner(tools, histories, self.instance, parse_force(self.config.plan))
        ledger = LedgerFile(self.config.ledger)
        closing = TurnClosing(histories, tools.speeds, self.warmer, ledger)

        def make_run(asked: Asked) -> TurnRun:
            return TurnRun(
                asked,
                opening=opening,
                planner=planner,
                tools=tools,
                clouds=clouds,
                histories=histories,
                outbox=outbox,
                closing=closing,
                limits=self._limits,
            )

        self.registry = TurnRegistry(
            make_run,
            outbox,
            retry_after_s=self._retry_after_s,
            on_busy=self.warmer.busy,
            on_idle=self.warmer.idle,
            max_turns=self.config.max_turns,
        )
        outbox.start(clouds.wait_for_return)
        service = AgentService(
            self.registry,
            clouds,
            histories,
            outbox,
            instance=self.instance,
            model=tools.manifest.name,
            context=context,
        )
        self.server = await start_server(
            self.config.host,
            self.config.port,
            [
                (
                    AGENT,
                    lambda server: agent_pb2_grpc.add_AgentServicer_to_server(service, server),  # type: ignore[no-untyped-call]
                )
            ],
            tls=self.config.listener_tls,
            clients=self.config.tls_clients,
            health=self.config.health,
            gate=self._gate,
        )
        self._stack.push_async_callback(self._stop_serving, service)

    async def _stop_serving(self, service: AgentService) -> None:
        """Turns get half of the grace period; then nobody is waited for."""
        await self.server.set_serving(False)
        service.close()
        await self.registry.close()
        await self.server.stop(_LAST_CALLS_S)

    def _on_delivered(self, offline: OfflineTurn, as_shown: bool) -> None:
        """The log has a turn that was served offline: whoever asks for it reads it there."""
        self.registry.forget(offline.asked.key)

    def _on_refused(self, offline: OfflineTurn) -> None:
        """The log will never have it: it is told from the outbox, and in no prompt to come."""
        asked = offline.asked
        if isinstance(offline.refused, SessionDeleted):
            self.histories.forget(asked.session)
        else:
            self.histories.of(asked.session).delivered(asked.turn, as_shown=False)
        self.registry.forget(asked.key)

    def _retry_after_s(self) -> float:
        """Until the prompts that wait are prefilled, at least a moment."""
        rate = self.tools.speeds.prefill_tokens_per_s.value
        return max(0.2, self.tools.compute.load().prefill_tokens / rate)

    def _say_provider(self, model: NodeModel) -> None:
        log.info(
            EVENT_PROVIDER,
            device=model.device.name,
            providers=list(model.device.providers),
            recipe=model.recipe_name,
            threads=self.config.threads or available_cpus(),
        )


def load_model(config: EdgeConfig) -> tuple[NodeModel, ChatTokenizer]:
    """The built model of the configuration. Raises ModelMissing or ModelMismatch."""
    directory = config.model_directory
    model = EdgeModel.load(directory, threads=config.threads, providers=config.providers)
    model.check_runs()
    return model, ChatTokenizer.load(directory, model.manifest)


async def _measure_speeds(
    model: NodeModel, compute: ComputeThread, speeds: EdgeSpeeds, manifest: Manifest
) -> None:
    """A short prefill and three decoded tokens: warms the runtime and gives the planner priors."""
    tokens = [manifest.end_tokens[0]] * (2 * BLOCK_TOKENS)
    for _ in range(2):
        job = PrefillJob(model, NoCache(), tokens, [], sampling=Sampling(), room=8)
        prefill = await compute.submit(job, Priority.PREFILL)
    for count, seconds in prefill.rates:
        if count >= BLOCK_TOKENS:
            speeds.prefill_tokens_per_s.set_prior(count / seconds)
    for index in (1, 2, 3):
        step = DecodeJob(model, prefill.kv, tokens[0], Sampling(), index)
        _, seconds = await compute.submit(step, Priority.DECODE)
        speeds.decode_step_s.set_prior(seconds)
