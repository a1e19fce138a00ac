"""A conversation that outgrows the context, over two edges and a cloud: one prompt for all."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.sync.context import seen
from tests.support.cloud_rpc import cloud_rpc
from tests.support.edge_node import Device, device_of, edge_node
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiny_edge import CONTEXT, MANIFEST, tiny_tokenizer

TURNS = 24
MAX_TOKENS = 60


async def test_edges_and_cloud_forget_the_same_turns_and_no_turn_is_too_long(
    valkey: Valkey, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    engine = ScriptedEngine([*b"All of it is as you say, and more of the sea."])
    session = SessionName("default", "trip")
    cuts = []
    async with (
        cloud_rpc(valkey.url, tmp_path, engine, manifest=MANIFEST, tokenizer=tokenizer) as cloud,
        edge_node(cloud.address) as first,
        edge_node(cloud.address) as second,
        device_of(first) as phone,
        device_of(second) as laptop,
    ):
        alone = Device(cloud.address)
        for device in (phone, laptop, alone):
            await device.open()
        for number in range(TURNS):
            # An edge that knows the conversation, and one that has missed some.
            device = (phone, phone, laptop, alone, alone, laptop)[number % 6]
            plan = "" if device is alone else "text"
            told = await device.run(
                f"t{number}", f"{number} " + "x" * 400, max_tokens=MAX_TOKENS, plan=plan
            )
            assert told.ended.reason == "stop", told.ended.error_message
            *earlier, turn = (await cloud.log.state(session)).turns
            kept = seen(earlier, turn.turn, turn.context_from)
            prompt = engine.turns[-1].prompt
            assert list(prompt) == tokenizer.encode_conversation(kept, turn.prompt)
            assert told.ended.usage.prompt_tokens == len(prompt)
            assert len(prompt) + MAX_TOKENS <= CONTEXT
            cuts.append(turn.context_from)
        await alone.close()
    print("cuts", cuts)
    moves = sum(before != after for before, after in pairwise(cuts))
    assert 3 <= moves <= TURNS / 3
