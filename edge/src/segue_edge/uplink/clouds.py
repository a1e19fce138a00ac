"""The cloud instances this node may use: channels, health, measured link and speeds."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grpc
import structlog

from segue_contract.errors import DeadlineExceeded, ModelMismatch, SegueError, Unreachable
from segue_contract.ids import SessionName
from segue_contract.limits import (
    KV_DRAIN_S,
    PROBE_INTERVAL_S,
    PROBE_TIMEOUT_S,
    RECONNECT_WAIT_S,
    RPC_TIMEOUT_S,
)
from segue_contract.transport.channel import check_target, open_channel
from segue_contract.transport.status import error_from_rpc
from segue_contract.transport.tls import TlsFiles
from segue_contract.transport.together import end
from segue_contract.v1 import agent_pb2_grpc, decode_pb2_grpc
from segue_contract.v1 import decode_pb2 as dpb
from segue_edge.planner.estimators import CloudView
from segue_edge.uplink.goodput_probe import next_payload, sending_s
from segue_edge.uplink.pacer import Pacer
from segue_edge.uplink.rendezvous import Standing, rank

log = structlog.get_logger("segue.uplink")

_RECONNECT_MS = 250  # half of RECONNECT_WAIT_S: gRPC varies its pauses by a fifth


Revoke = Callable[[str, str, str, float], None]


class Home(NamedTuple):
    """The cloud instance that has a session's KV, of so many tokens; "": none is known."""

    instance: str = ""
    tokens: int = 0


class Cloud:
    """One instance: its channel, its stubs, and what is known of it.

    Attributes:
        view: estimates for the planner.
        expected_weights: the digest of this edge's model; "" before it is loaded.
        alone: no other one is configured.
        keyed: this edge's callers show tokens, and the cloud has to check them as well.
        public_url: where devices reach this edge; "": the cloud is to tell nobody.
        revoked: told of what is revoked, as `Gate.revoke`.
        backlog_bytes: KV of running turns that this node has yet to send there.
    """

    def __init__(self, target: str, tls: TlsFiles | None = None) -> None:
        self.target = check_target(target)
        self.channel: grpc.aio.Channel
        self.agent: Any
        self.decode: Any
        self._tls = tls
        self._connect()
        self.view = CloudView()
        self.healthy = True  # until a call says otherwise: the first turn should try
        self.instance = ""
        self.recipes: frozenset[str] = frozenset()
        self.weights_digest = ""
        self.expected_weights = ""
        self.alone = True
        self.keyed = False
        self.public_url = ""
        self.revoked: Revoke = lambda *_: None
        self._revoked_of = ""  # the place up to which it was told, and in whose count
        self._revoked_after = 0
        self.backlog_bytes = 0
        self._taken = 0  # of `_places`, when it said so last
        self._places = 0
        self._asking: Counter[SessionName] = Counter()
        self._full_until = 0.0  # monotonic
        self._drained_at = 0.0  # monotonic: when what was sent last has left the buffers

    def _connect(self) -> None:
        """A channel with the certificates that the files hold now."""
        self._certificates = self._tls.stamp() if self._tls is not None else ()
        self.channel = open_channel(self.target, reconnect_ms=_RECONNECT_MS, tls=self._tls)
        self.agent = agent_pb2_grpc.AgentStub(self.channel)  # type: ignore[no-untyped-call]
        self.decode = decode_pb2_grpc.DecodeStub(self.channel)  # type: ignore[no-untyped-call]

    async def renew(self) -> None:
        """Where the link is lost and the certificates changed since: a new channel with them."""
        if self._tls is None or self._tls.stamp() == self._certificates:
            return
        if self.channel.get_state() is grpc.ChannelConnectivity.READY:
            return
        old = self.channel
        try:
            self._connect()
        except SegueError as error:
            log.error("certificate_kept", cloud=self.target, error=str(error))
            return
        await old.close(None)

    def take_facts(self, facts: dpb.CloudFacts) -> None:
        """What the cloud says of itself, with every Begin, Opened and Probe.

        Raises:
            Unreachable: it serves other weights, so that token ids mean something else there; or
                it does not know its callers, and this edge does.
        """
        self.instance = facts.instance
        self.weights_digest = facts.weights_digest
        if self.serves_others:
            raise self.refuse_weights()
        if self.keyed and not facts.authenticates:
            raise self._refuse(
                f"The cloud at {self.target} serves whoever comes: it would take the tenants of "
                "this edge's callers for one.",
                "Start it with --tenant-keys, too.",
            )
        self.healthy = not (facts.stalled or facts.leaving)
        self.recipes = frozenset(facts.recipes)
        self._places = facts.places
        kv_used = 1 - facts.free_pages / facts.total_pages if facts.total_pages else 0.0
        self._taken = max(facts.held_turns, math.ceil(kv_used * facts.places))
        self.view.observe_facts(
            queue_s=facts.queue_s,
            prefill_tokens_per_s=facts.prefill_tokens_per_s,
            decode_step_s=facts.decode_step_s,
        )

    @property
    def serves_others(self) -> bool:
        """It said what it serves, and that is not this edge's model."""
        known = bool(self.weights_digest and self.expected_weights)
        return known and self.weights_digest != self.expected_weights

    def refuse_weights(self) -> Unreachable:
        """Other weights are found: no turn goes there until a probe finds the right ones."""
        return self._refuse(
            f"The cloud at {self.target} serves other weights than this edge's model.",
            "Give both the same --model.",
        )

    def _refuse(self, why: str, hint: str) -> Unreachable:
        error = Unreachable(why, hint=hint, cloud=self.target)
        if self.healthy:
            log.error("cloud_refused", cloud=self.target, error=str(error))
        self.healthy = False
        return error

    @contextlib.contextmanager
    def shipping(self, size: int) -> Iterator[None]:
        """While inside, about `size` bytes of KV are on their way up."""
        self.backlog_bytes += size
        try:
            yield
        finally:
            self.backlog_bytes -= size
            # Twice what it should take: buffers on the way may hold KV of an earlier turn, too.
            lasts_s = min(2 * size / self.view.goodput.bytes_per_s, KV_DRAIN_S)
            self._drained_at = max(self._drained_at, time.monotonic() + lasts_s)

    @property
    def carries_kv(self) -> bool:
        """KV is under way, or still in the buffers: whatever else is asked waits behind it."""
        return self.backlog_bytes > 0 or time.monotonic() < self._drained_at

    def refused(self, error: SegueError) -> None:
        """It has no room for now: until it should have some, others come before it."""
        wait_s = error.fields.get("retry_after_s", 0.0)
        if isinstance(wait_s, int | float) and wait_s > 0:
            self._full_until = max(self._full_until, time.monotonic() + min(wait_s, RPC_TIMEOUT_S))

    @contextlib.contextmanager
    def asking(self, session: SessionName) -> Iterator[None]:
        """While inside, a turn is about to begin there that its own counts do not have yet."""
        self._asking[session] += 1
        try:
            yield
        finally:
            self._asking[session] -= 1
            if not self._asking[session]:
                del self._asking[session]

    def standing(self, session: SessionName, home: Home) -> Standing:
        """As a turn of `session` sees it, whose KV lies at `home`."""
        others = len(self._asking) - (session in self._asking)
        refused_s = max(0.0, self._full_until - time.monotonic())
        return Standing(
            healthy=self.healthy,
            full=refused_s > 0,
            turns=self._taken + others,
            places=self._places,
            wait_s=self.view.queue_s + refused_s,
            # An edge that ships its own KV may be quicker than that.
            again_s=home.tokens / self.view.prefill_tokens_per_s.value,
        )

    def failed(self, error: SegueError) -> None:
        """A call did not reach it."""
        if self.healthy:
            log.warning("cloud_unreachable", cloud=self.target, error=str(error))
        self.healthy = False

    async def probe(self, pacer: Pacer, *, goodput: bool = False) -> None:
        """Measure the round trip, and what the link carries where `goodput`.

        Raises:
            Unreachable, DeadlineExceeded: no answer within `PROBE_TIMEOUT_S`.
        """
        await self._round_trip()
        if goodput:
            await self._round_trip()  # the first one may include connecting
            await self._measure_goodput(pacer)

    async def _round_trip(self) -> None:
        started = time.monotonic()
        reply = await self._probe_call(b"")
        self.view.rtt_s.observe(time.monotonic() - started)
        self.take_facts(reply.facts)

    async def _measure_goodput(self, pacer: Pacer) -> None:
        rtt_s = self.view.rtt_s.value
        sent, seconds = 0, 0.0  # of the last probe
        while size := next_payload(sent, seconds, rtt_s):
            began = time.monotonic()
            await pacer.pass_through(size)
            try:
                # Random bytes: a link that compresses must not look faster than it is.
                await self._probe_call(os.urandom(size))
            except DeadlineExceeded:
                # The round trip before was answered: the link is slow, not lost, and no faster than
                # this probe, which did not end in time.
                elapsed_s = time.monotonic() - began
                if not sent or size / elapsed_s < sent / seconds:
                    sent, seconds = size, elapsed_s
                break
            sent, seconds = size, sending_s(time.monotonic() - began, rtt_s)
        self.view.goodput.observe(sent, seconds, app_limited=False)

    async def reach(self) -> None:
        """Before a call to an instance that was gone: wait shortly for it to be back.

        Raises:
            Unreachable: it is not.
        """
        if self.healthy:
            return
        await self.renew()
        try:
            # To connect takes two round trips, to ask one.
            patience_s = RECONNECT_WAIT_S + 3 * self.view.rtt_s.value
            reply = await self._probe_call(b"", patience_s, wait_for_ready=True)
        except SegueError as error:
            raise Unreachable(
                f"The cloud at {self.target} cannot be reached.",
                hint="Check that it runs and the address is right (`segue doctor`).",
                cloud=self.target,
            ) from error
        self.take_facts(reply.facts)

    async def sign_of_life(self, timeout_s: float) -> None:
        """Return where it answers anything; while KV is under way an answer may be late.

        Raises:
            Unreachable, DeadlineExceeded: it does not within `timeout_s`.
        """
        if not self.carries_kv:
            await self._probe_call(b"", timeout_s)

    async def _probe_call(
        self, payload: bytes, timeout_s: float = PROBE_TIMEOUT_S, *, wait_for_ready: bool = False
    ) -> dpb.ProbeReply:
        try:
            reply: dpb.ProbeReply = await self.decode.Probe(
                dpb.ProbeRequest(
                    payload=payload,
                    revoked_of=self._revoked_of,
                    revoked_after=self._revoked_after,
                    public_url=self.public_url,
                ),
                timeout=timeout_s,
                wait_for_ready=wait_for_ready,
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        self._take_revoked(reply)
        return reply

    def _take_revoked(self, reply: dpb.ProbeReply) -> None:
        """Nothing of a cloud that does not know its callers is taken: see `take_facts`."""
        if not (self.keyed and reply.facts.authenticates):
            return
        if reply.revoked_of != self._revoked_of:
            self._revoked_of, self._revoked_after = reply.revoked_of, 0
        for mark in reply.revoked:
            self.revoked(mark.tenant, mark.sessions, mark.device, mark.before_ms / 1000)
            self._revoked_after = max(self._revoked_after, mark.place)

    async def ask_revoked(self) -> None:
        """Hear what was revoked since the last probe. Raises SegueError: no answer."""
        await self._probe_call(b"")

    async def close(self) -> None:
        await self.channel.close(None)


class CloudSet:
    """All configured clouds. `start` probes them at a pace from then on; `close` stops that.

    Args:
        public_url: where devices reach this edge; "": clouds are to tell nobody.
        keyed: callers show tokens, so that only clouds which check them are used.
        revoked: told of what clouds say is revoked.
        home_of: where a session's KV lies.
    """

    def __init__(
        self,
        targets: Sequence[str],
        pacer: Pacer,
        tls: TlsFiles | None = None,
        *,
        keyed: bool = False,
        public_url: str = "",
        revoked: Revoke = lambda *_: None,
        home_of: Callable[[SessionName], Home] = lambda _: Home(),
    ) -> None:
        self.clouds = {target: Cloud(target, tls) for target in targets}
        for cloud in self.clouds.values():
            cloud.alone, cloud.keyed = len(self.clouds) == 1, keyed
            cloud.revoked, cloud.public_url = revoked, public_url
        self.pacer = pacer
        self._home_of = home_of
        self._prober: asyncio.Task[None] | None = None
        self._asked = asyncio.Event()
        self._returned = asyncio.Event()

    def start(self) -> None:
        """Begin to probe; `probed` waits for the first answers."""
        self._prober = asyncio.create_task(self._probe_forever(), name="cloud probes")

    async def probed(self) -> None:
        """Return when every cloud was asked once."""
        await self._asked.wait()

    def expect(self, weights_digest: str) -> None:
        """From now on use only clouds that serve these weights.

        Raises:
            ModelMismatch: every cloud that said what it serves has others: an operator's mistake.
        """
        for cloud in self.clouds.values():
            cloud.expected_weights = weights_digest
        others = [cloud for cloud in self.clouds.values() if cloud.serves_others]
        for cloud in others:
            cloud.refuse_weights()
        if others and not self.any_healthy:
            raise ModelMismatch(
                f"The cloud at {others[0].target} serves other weights than this edge's model.",
                hint="Give both the same --model.",
                cloud=others[0].target,
            )

    def ranked(self, session: SessionName) -> list[Cloud]:
        """All clouds, the best for this session first; see `rendezvous.rank`."""
        home = self._home_of(session)
        known = {name: cloud.standing(session, home) for name, cloud in self.clouds.items()}
        at = (name for name, cloud in self.clouds.items() if cloud.instance == home.instance)
        order = rank(str(session), known, next(at, "") if home.instance else "")
        return [self.clouds[name] for name in order]

    def best(self, session: SessionName) -> Cloud:
        """Raises Unreachable where none is configured."""
        ranked = self.ranked(session)
        if not ranked:
            raise Unreachable(
                "This edge has no cloud.", hint="Start it with --cloud HOST:PORT.", cloud=""
            )
        return ranked[0]

    @property
    def any_healthy(self) -> bool:
        return any(cloud.healthy for cloud in self.clouds.values())

    async def wait_for_return(self) -> None:
        """Return when a cloud that was out of reach answers again."""
        await self._returned.wait()
        self._returned.clear()

    async def _probe_forever(self) -> None:
        await asyncio.gather(*(self._try_probe(c, first=True) for c in self.clouds.values()))
        self._asked.set()
        while True:
            await asyncio.sleep(PROBE_INTERVAL_S if self.any_healthy else PROBE_INTERVAL_S / 10)
            await asyncio.gather(*(self._try_probe(c, first=False) for c in self.clouds.values()))

    async def _try_probe(self, cloud: Cloud, *, first: bool) -> None:
        was_healthy = cloud.healthy
        try:
            await cloud.probe(self.pacer, goodput=cloud.view.goodput.confidence == 0)
        except SegueError as error:
            if not (isinstance(error, DeadlineExceeded) and cloud.carries_kv):
                cloud.failed(error)
                await cloud.renew()
            return
        if cloud.healthy and not was_healthy:
            log.info("cloud_reachable", cloud=cloud.target, instance=cloud.instance)
        if (cloud.healthy and not was_healthy) or first:
            self._returned.set()

    async def close(self) -> None:
        try:
            if self._prober is not None:
                await end(self._prober)
        finally:
            await asyncio.gather(*(cloud.close() for cloud in self.clouds.values()))
