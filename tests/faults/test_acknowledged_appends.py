"""What a device was told is in the log is there, once: the real SDK, cloud and store."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

from segue_contract.servers import Valkey
from tests.support.acknowledged import append_under_faults
from tests.support.cloud_rpc import cloud_rpc
from tests.support.scripted_engine import ScriptedEngine

CALLS = 720
ACKNOWLEDGED = 10_000  # ops at least; `scripts/bench sessions` makes as many calls


async def test_no_acknowledged_append_is_missing_or_doubled(
    valkey: Valkey, model_dir: Path
) -> None:
    """(No clock has a part in it.)"""
    seed = int(os.environ.get("SEGUE_SEED") or int.from_bytes(os.urandom(4), "big"))
    print("SEGUE_SEED =", seed)
    async with cloud_rpc(valkey.url, model_dir, ScriptedEngine([]), folds=False) as cloud:
        found = await append_under_faults(cloud.address, "trip", CALLS, Random(seed))
    assert (found.missing, found.doubled, found.moved) == ([], [], [])
    assert found.acknowledged >= ACKNOWLEDGED
