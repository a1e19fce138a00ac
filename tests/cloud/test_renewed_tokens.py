"""A client whose app renews its token: what goes on at several nodes, and what broke meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import segue
from segue._access import Access
from segue._nodes import Nodes
from segue.errors import Unauthenticated
from segue_contract.limits import EXPIRY_GRACE_S
from segue_contract.servers import Valkey
from segue_contract.sync.ops import Set, encode_op
from segue_contract.v1 import agent_pb2 as pb
from tests.support.keyed_clouds import WAIT_S, Place, end_of, keyed_clouds, opened
from tests.support.scripted_engine import ScriptedEngine


async def set_value(here: Place, token: str) -> None:
    """An entry that followers see."""
    request = pb.OpenSessionRequest(session="trip", device="laptop", producer="q")
    epoch = (await here.call(0, token, "OpenSession", request)).epoch
    op = encode_op(Set(id="b", device="laptop", name="b", value=b""))
    append = pb.AppendRequest(
        session="trip", device="laptop", producer="q", epoch=epoch, first_seq=1, ops=[op]
    )
    await here.call(0, token, "Append", append)


async def test_a_token_is_renewed_at_every_node_that_is_connected(
    valkey: Valkey, tmp_path: Path
) -> None:
    """The stream runs at the second one; the first one answers again, and is asked first."""
    async with keyed_clouds(valkey.url, tmp_path) as here:
        ends_s = here.now_s + 100
        shown = here.token("phone", expires_s=ends_s)
        await opened(here, shown, "phone")
        access = Access(token=lambda: shown, renews=True)
        nodes = Nodes([cloud.address for cloud in here.clouds], access=access)
        _, second = nodes.order()
        stub = await nodes.stub(second)
        stream = stub.Attach(pb.AttachRequest(session="trip", device="phone"))
        assert (await stream.read()).WhichOneof("kind") == "snapshot"
        tablet = here.token("tablet", expires_s=ends_s)
        await opened(here, tablet, "tablet")
        other = await here.attach(1, tablet, "tablet")
        await nodes.connect()
        shown = here.token("phone", expires_s=ends_s + 1000)
        await nodes.everywhere("Renew", pb.RenewRequest())
        here.now_s = ends_s + EXPIRY_GRACE_S + 1
        assert type(await end_of(other)) is Unauthenticated  # by then its gate has looked
        await set_value(here, here.token("laptop"))
        async with asyncio.timeout(WAIT_S):
            while (await stream.read()).WhichOneof("kind") != "entries":
                pass
        stream.cancel()
        await nodes.close()


@pytest.mark.parametrize("renews", [True, False])
async def test_a_follower_and_a_turn_show_the_next_token_where_one_ran_out(
    renews: bool, valkey: Valkey, tmp_path: Path
) -> None:
    engine = ScriptedEngine([*b"words"], free=False)
    async with keyed_clouds(valkey.url, tmp_path, engine, clouds=1) as here:
        ends_s = here.now_s + 100
        laptop = here.token("laptop")
        shown = [here.token("phone", expires_s=ends_s)]
        given: Any = (lambda: shown[0]) if renews else shown[0]
        async with segue.Client(here.clouds[0].address, device="phone", token=given) as client:
            session = await client.session("trip")
            async with session.run("Hi", turn="t1", max_tokens=5) as turn:
                items = aiter(session.follow())
                await anext(items)
                shown[0] = here.token("phone", expires_s=ends_s + 1000)
                here.now_s = ends_s + EXPIRY_GRACE_S + 1

                async def ends() -> str:
                    return (await turn.result()).text

                async def follows() -> None:
                    async for item in items:
                        if isinstance(item, segue.Entry) and isinstance(item.op, Set):
                            return

                engine.allow(100)
                if renews:
                    assert await asyncio.wait_for(ends(), WAIT_S) == "words"
                    await set_value(here, laptop)
                    await asyncio.wait_for(follows(), WAIT_S)
                else:
                    with pytest.raises(Unauthenticated):
                        await asyncio.wait_for(follows(), WAIT_S)
