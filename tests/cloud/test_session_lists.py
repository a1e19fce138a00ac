"""What lists of sessions tell a caller who may see some of them."""

from __future__ import annotations

from pathlib import Path

from segue_cloud.sessions.keys import index_key
from segue_cloud.sessions.store import RedisStore
from segue_contract.ids import SessionName
from segue_contract.limits import LIST_LOOKED
from segue_contract.servers import Valkey
from segue_contract.v1 import agent_pb2 as pb
from tests.support.keyed_clouds import Place, keyed_clouds


async def pages(here: Place, token: str, size: int) -> list[pb.ListSessionsReply]:
    found: list[pb.ListSessionsReply] = []
    after = ""
    while not found or after:
        request = pb.ListSessionsRequest(max_sessions=size, after=after)
        found.append(await here.call(0, token, "ListSessions", request))
        after = found[-1].next
    return found


async def test_a_page_ends_at_no_session_that_the_caller_may_not_see(
    valkey: Valkey, tmp_path: Path
) -> None:
    async with keyed_clouds(valkey.url, tmp_path, clouds=1) as here:
        (cloud,) = here.clouds
        names = ["bob.1", "ann.1", "bob.2", "bob.3", "ann.2", "bob.4", "ann.3", "bob.5"]
        for name in names:
            await cloud.log.open_session(SessionName("acme", name), device="phone")
        ann = here.token("phone", sessions=("ann.*",))
        for size in (1, 2, 3, 10):
            told = await pages(here, ann, size)
            assert sorted(one.session for page in told for one in page.sessions) == [
                "ann.1",
                "ann.2",
                "ann.3",
            ]
            assert all("bob" not in page.next for page in told)
        nobody = here.token("phone", sessions=("eve.*",))
        assert [(len(page.sessions), page.next) for page in await pages(here, nobody, 1)] == [
            (0, "")
        ]
        revoke = pb.RevokeRequest(session="ann.2", revoked="phone")
        await here.call(0, here.token("laptop"), "Revoke", revoke)
        (page,) = await pages(here, ann, 10)
        assert sorted(one.session for one in page.sessions) == ["ann.1", "ann.3"]


async def test_a_long_list_is_looked_at_in_parts(valkey: Valkey) -> None:
    store = await RedisStore.connect(valkey.url)
    mine = SessionName("acme", "ann")
    await store.open_session(mine)
    others: list[str | int] = []
    for number in range(2 * LIST_LOOKED):  # of one time each half
        others += [4_000_000_000_000 + number % 2, f"bob.{number}"]
    await store._wire.call(("ZADD", index_key("acme"), *others))
    places, found, after = [], list[str](), ""
    while not places or after:
        page, after = await store.keeper.list_sessions("acme", 1, after, lambda name: name == "ann")
        places.append(after)
        found += [one.session for one in page]
    assert found == ["ann"]
    assert 2 <= len(places) <= 4
    assert not any("bob" in place for place in places)
    await store.close()
