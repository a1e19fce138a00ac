"""Fixtures of the cloud's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import segue
from segue_cloud.sessions.store import RedisStore
from segue_contract.chat import ChatTokenizer
from segue_contract.servers import Valkey
from tests.support.cloud_rpc import CloudRpc, cloud_rpc
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tokenizers import tokenizer_of


@pytest.fixture(scope="session")
def tokenizer(model_dir: Path) -> ChatTokenizer:
    """The default model's. Loading it takes longer than many tests that use it."""
    return tokenizer_of(model_dir)


@pytest.fixture
def words(tokenizer: ChatTokenizer) -> list[int]:
    """Token ids of a short reply."""
    return tokenizer.encode("The sea is wide and the night is long.")


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[RedisStore]:
    store = await RedisStore.connect(valkey.url)
    yield store
    await store.close()


@pytest.fixture
async def cloud(
    valkey: Valkey, model_dir: Path, tokenizer: ChatTokenizer
) -> AsyncIterator[CloudRpc]:
    engine = ScriptedEngine(range(100, 110))
    async with cloud_rpc(valkey.url, model_dir, engine, tokenizer=tokenizer) as running:
        yield running


@pytest.fixture
async def client(cloud: CloudRpc) -> AsyncIterator[segue.Client]:
    async with segue.Client(cloud.address, device="phone") as client:
        yield client
