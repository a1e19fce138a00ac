"""The uplink's small parts: how fast, what a stream does when it breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue_contract.errors import BadBlock, InvalidArgument, Unreachable
from segue_contract.ids import SessionName
from segue_contract.kv.layout import block_ids
from segue_contract.limits import (
    KV_PART_BYTES,
    PROBE_FIRST_BYTES,
    PROBE_PAYLOAD_BYTES,
    UPLINK_QUEUE_BLOCKS,
)
from segue_contract.transport.server import start_server
from segue_contract.v1 import decode_pb2 as dpb
from segue_contract.v1 import decode_pb2_grpc
from segue_edge.uplink.clouds import Cloud, CloudSet
from segue_edge.uplink.goodput_probe import next_payload, sending_s
from segue_edge.uplink.pacer import Pacer, TokenBucket
from segue_edge.uplink.sender import KvSender, encode_with
from segue_edge.uplink.stream import TurnStream
from tests.support.scripted_cloud import scripted_cloud
from tests.support.slow_proxy import SlowProxy
from tests.support.tiny_edge import RECIPE, block_of


def test_a_node_without_clouds_says_so() -> None:
    with pytest.raises(Unreachable, match="no cloud"):
        CloudSet([], Pacer()).best(SessionName("default", "trip"))


@pytest.mark.parametrize("target", ["nowhere", "host:", ":1", "host:99999", "host:x"])
async def test_a_bad_address_is_refused(target: str) -> None:
    with pytest.raises(InvalidArgument, match="no address"):
        Cloud(target)


# -- how fast -----------------------------------------------------------------------------------


def test_a_bucket_lets_bytes_leave_at_its_rate() -> None:
    bucket = TokenBucket(1000.0)
    assert bucket.reserve(100, now=10.0) == pytest.approx(0.1, abs=0.003)
    assert bucket.reserve(100, now=10.0) == pytest.approx(0.2, abs=0.003)
    assert bucket.reserve(100, now=20.0) == pytest.approx(0.1, abs=0.003)


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0, 0.5)), min_size=1, max_size=50))
def test_a_bucket_never_carries_more_than_its_rate(sends: list[tuple[int, float]]) -> None:
    bucket, now, sent, left_at = TokenBucket(10_000.0), 100.0, 0, 100.0
    for size, pause in sends:
        now += pause
        left_at = now + bucket.reserve(size, now)
        sent += size
    assert sent <= 10_000.0 * (left_at - 100.0 + 0.002) * (1 + 1e-9) + 1e-6


@given(st.floats(1e3, 1e10), st.floats(1e-4, 1.0), st.floats(0.0, 0.5))
def test_a_goodput_probe_ends_and_wastes_little(rate: float, rtt_s: float, noise: float) -> None:
    sent, seconds, total = 0, 0.0, 0.0
    for _ in range(5):
        size = next_payload(sent, seconds, rtt_s)
        if not size:
            break
        assert sent < size <= PROBE_PAYLOAD_BYTES
        sent, seconds = size, sending_s(size / rate + rtt_s * (1 + noise), rtt_s)
        total += seconds
    else:
        pytest.fail("it goes on and on")
    # Not far below what the link carries, and never above by more than round trips vary.
    assert sent / seconds <= 1.001 * rate
    if rate <= PROBE_PAYLOAD_BYTES / (4 * rtt_s * (1 + noise)):
        assert total <= max(0.2, 4 * rtt_s) * 6 or sent == PROBE_FIRST_BYTES


def test_a_probe_that_took_no_time_claims_no_endless_link() -> None:
    assert sending_s(0.29, 0.3) == pytest.approx(0.075)
    assert sending_s(0.0, 0.0) > 0


async def test_a_thin_link_is_measured_and_not_taken_for_a_lost_one() -> None:
    async with scripted_cloud() as far:
        port = int(far.address.rpartition(":")[2])
        async with SlowProxy(port, bytes_per_s=40_000) as proxy:
            cloud = Cloud(f"127.0.0.1:{proxy.port}")
            try:
                await cloud.probe(Pacer(), goodput=True)
                assert cloud.healthy
                assert cloud.view.goodput.confidence > 0
                assert cloud.view.goodput.bytes_per_s < 2 * PROBE_FIRST_BYTES
            finally:
                await cloud.close()


async def test_an_answer_that_waits_behind_kv_is_late_not_lost() -> None:
    async with scripted_cloud() as far, SlowProxy(int(far.address.rpartition(":")[2])) as proxy:
        target = f"127.0.0.1:{proxy.port}"
        clouds = CloudSet([target], Pacer())
        cloud = clouds.clouds[target]
        try:
            await clouds._try_probe(cloud, first=True)
            assert cloud.healthy
            proxy.stall()
            with cloud.shipping(1):
                await clouds._try_probe(cloud, first=False)
                assert cloud.healthy
            await clouds._try_probe(cloud, first=False)
            assert not cloud.healthy
        finally:
            proxy.flow()
            await clouds.close()


async def test_without_a_rate_nothing_waits() -> None:
    async with asyncio.timeout(1):
        await Pacer().pass_through(10**12)


# -- the stream ---------------------------------------------------------------------------------


class Listener(decode_pb2_grpc.DecodeServicer):
    """Keeps what comes; reads on only while `reading` is set; hangs up when told."""

    def __init__(self) -> None:
        self.got: list[dpb.RunRequest] = []
        self.reading = asyncio.Event()
        self.hang_up = asyncio.Event()
        self.more = asyncio.Event()

    async def Run(
        self, request_iterator: AsyncIterator[dpb.RunRequest], context: Any
    ) -> AsyncIterator[dpb.RunReply]:
        reader = asyncio.create_task(self._read(request_iterator))
        yield dpb.RunReply(opened=dpb.Opened(epoch=1))
        await self.hang_up.wait()
        reader.cancel()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "the link broke")

    async def _read(self, requests: AsyncIterator[dpb.RunRequest]) -> None:
        await self.reading.wait()
        iterator = aiter(requests)  # gRPC complains of one that is made and never used
        while True:
            await self.reading.wait()
            self.got.append(await anext(iterator))
            self.more.set()

    async def wait_for(self, kind: str) -> None:
        while not any(request.WhichOneof("kind") == kind for request in self.got):
            self.more.clear()
            await asyncio.wait_for(self.more.wait(), 10)


@pytest.fixture
async def listener() -> AsyncIterator[tuple[Listener, Cloud]]:
    service = Listener()
    server = await start_server(
        "127.0.0.1",
        0,
        [("segue.v1.Decode", lambda s: decode_pb2_grpc.add_DecodeServicer_to_server(service, s))],
    )
    cloud = Cloud(server.address)
    try:
        yield service, cloud
    finally:
        service.hang_up.set()
        await cloud.close()
        await server.stop(0)


async def test_control_messages_overtake_kv(listener: tuple[Listener, Cloud]) -> None:
    service, cloud = listener
    async with TurnStream(
        cloud, dpb.TurnSpec(session="trip", device="phone", turn="t"), Pacer()
    ) as stream:
        sending = asyncio.create_task(stream.send_kv(bytes(40 * KV_PART_BYTES)))
        service.reading.set()
        await service.wait_for("kv")
        stream.control(dpb.RunRequest(hand_over=dpb.HandOver(next_index=1)))
        await sending
        await service.wait_for("hand_over")
        kinds = [request.WhichOneof("kind") for request in service.got]
    assert kinds[0] == "open"
    assert kinds.index("hand_over") < len(kinds) - 1, "it waited behind all KV"
    assert stream.sent_kv_bytes == 40 * KV_PART_BYTES


async def test_a_broken_stream_fails_everybody_who_waits(
    listener: tuple[Listener, Cloud],
) -> None:
    service, cloud = listener
    async with TurnStream(
        cloud, dpb.TurnSpec(session="trip", device="phone", turn="t"), Pacer()
    ) as stream:
        sending = asyncio.create_task(stream.send_kv(bytes(400 * KV_PART_BYTES)))
        replies = stream.replies()
        assert (await anext(replies)).opened.epoch == 1
        service.hang_up.set()
        with pytest.raises(Unreachable):
            await asyncio.wait_for(anext(replies), 10)
        with pytest.raises(Unreachable):
            await asyncio.wait_for(sending, 10)
        with pytest.raises(Unreachable):
            stream.control(dpb.RunRequest(hand_over=dpb.HandOver(next_index=1)))


async def test_a_slow_link_holds_back_the_encoder_not_the_prefill(
    listener: tuple[Listener, Cloud],
) -> None:
    _, cloud = listener  # which reads nothing
    encoded: list[bytes] = []

    def encode(index: int, block: Any) -> bytes:
        encoded.append(block.id)
        return bytes(64 * KV_PART_BYTES)

    tokens = list(range(64)) * 40
    ids = block_ids(RECIPE.digest, tokens)
    with ThreadPoolExecutor(1) as pool:
        sender = KvSender(RECIPE.digest, ids, pool, encode)
        for index in range(len(ids)):
            sender.offer(index, *block_of(tokens[:64]))  # never blocks
        async with TurnStream(
            cloud, dpb.TurnSpec(session="trip", device="phone", turn="t"), Pacer()
        ) as stream:
            running = asyncio.create_task(sender.run(stream, 0))
            done, _ = await asyncio.wait({running}, timeout=0.5)
            assert not done
            assert len(encoded) <= UPLINK_QUEUE_BLOCKS + 3
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


async def test_a_block_that_cannot_be_encoded_ends_the_sender(
    listener: tuple[Listener, Cloud],
) -> None:
    service, cloud = listener
    service.reading.set()
    tokens = list(range(64)) * 2
    ids = block_ids(RECIPE.digest, tokens)
    k, v = block_of(tokens[:64])
    with ThreadPoolExecutor(1) as pool:
        sender = KvSender(RECIPE.digest, ids, pool, encode_with(RECIPE.codec))
        sender.offer(0, k, v)
        sender.offer(1, k * float("nan"), v)
        async with TurnStream(
            cloud, dpb.TurnSpec(session="trip", device="phone", turn="t"), Pacer()
        ) as stream:
            with pytest.raises(BadBlock):
                await asyncio.wait_for(sender.run(stream, 0), 10)
