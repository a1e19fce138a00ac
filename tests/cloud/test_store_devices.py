"""The devices of a session on a real Valkey: who is remembered."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from segue_cloud.sessions.store import RedisStore
from segue_contract import limits
from segue_contract.errors import UnknownDevice
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey

S = SessionName("default", "trip")


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(valkey.url)
    await store.open_session(S)
    yield store
    await store.close()


async def test_a_device_in_use_outlives_many_that_open_later(store: RedisStore) -> None:
    await store.open_session(S, device="phone")
    await store.open_session(S, device="a-drawer")
    for number in range(limits.MAX_SESSION_DEVICES):
        await store.open_session(S, device=f"d{number:03}")
        await store.check_device(S, "phone")
    with pytest.raises(UnknownDevice):
        await store.check_device(S, "a-drawer")


async def test_a_full_store_still_knows_its_devices(store: RedisStore, valkey: Valkey) -> None:
    await store.open_session(S, device="phone")
    reader, writer = await asyncio.open_connection("127.0.0.1", valkey.port)
    writer.write(b"CONFIG SET maxmemory 1\r\n")
    assert await reader.readline() == b"+OK\r\n"
    writer.close()
    await store.check_device(S, "phone")
