"""The devices of the sync suite: a process of its own, so that its work delays nobody's clock.

    python -m tests.bench.suites._sync_devices MODE URL NAME DEVICES FRAMES

Prints "ready" when every device listens, and at the end one line of JSON: for each device the
CLOCK_MONOTONIC nanosecond at which it had applied frame 0, 1, 2, ...
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time

import aiomqtt
import redis.asyncio as redis

from segue_contract.ids import SessionName
from segue_contract.sync import ops
from segue_contract.sync.replica import Applied, Replica
from segue_contract.topics import TAG_BYTES, decode_log_message, log_topic
from segue_contract.transport.mqtt import mqtt_socket_options, parse_mqtt_url

TIMEOUT_S = 120


async def segue_device(url: str, session: str, frames: int, ready: asyncio.Event) -> list[int]:
    """One device over MQTT, with a replica that folds every entry."""
    host, port = parse_mqtt_url(url).address
    replica = Replica()
    times: list[int] = []
    async with aiomqtt.Client(
        host,
        port,
        protocol=aiomqtt.ProtocolVersion.V5,
        socket_options=mqtt_socket_options(),
    ) as client:
        await client.subscribe(log_topic(SessionName("default", session)), qos=1)
        ready.set()
        async for message in client.messages:
            assert isinstance(message.payload, bytes)
            batch = decode_log_message(message.payload[TAG_BYTES:])
            for offset, data in enumerate(batch.ops, batch.first_offset):
                op = ops.decode_op(data)
                assert replica.apply_op(batch.generation, offset, op) is Applied.APPLIED
                if isinstance(op, ops.Frame):
                    times.append(time.monotonic_ns())
            if len(times) >= frames:
                return times
    return times


async def pubsub_device(url: str, name: str, frames: int, ready: asyncio.Event) -> list[int]:
    """The peer: Redis pub/sub, which keeps nothing for who is away."""
    times: list[int] = []
    async with redis.from_url(url) as client, client.pubsub() as listener:
        await listener.subscribe(name)
        async for message in listener.listen():
            if message["type"] == "subscribe":
                ready.set()
                continue
            times.append(time.monotonic_ns())
            if len(times) >= frames:
                return times
    return times


async def xread_device(url: str, name: str, frames: int, ready: asyncio.Event) -> list[int]:
    """The other peer: each device blocks on the stream itself."""
    times: list[int] = []
    last: bytes | str = "0"
    async with redis.from_url(url) as client:
        await client.ping()
        ready.set()
        while len(times) < frames:
            for _, entries in await client.xread({name: last}, block=1000) or []:
                now = time.monotonic_ns()
                times.extend(now for _ in entries)
                last = entries[-1][0]
    return times


async def main(mode: str, url: str, name: str, devices: int, frames: int) -> None:
    run = {"segue": segue_device, "pubsub": pubsub_device, "xread": xread_device}[mode]
    listening = [asyncio.Event() for _ in range(devices)]
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(url, name, frames, ready)) for ready in listening]
        for ready in listening:
            await ready.wait()
        gc.collect()
        gc.freeze()
        print("ready", flush=True)
    print(json.dumps([task.result() for task in tasks]), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])))
