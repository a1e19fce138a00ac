"""The store tells what changed: followers hear of other instances' entries, tails cost nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import cast

import pytest

from segue_cloud.hub.feed import Followed, TailFeed
from segue_cloud.log.session_log import SessionLog
from segue_cloud.sessions.news import Beat, TailTold, Watched
from segue_cloud.sessions.port import LogOp, Reading
from segue_cloud.sessions.store import RedisStore
from segue_cloud.sessions.wire import Wire
from segue_contract.errors import StoreUnavailable
from segue_contract.ids import SessionName
from segue_contract.servers import Valkey
from segue_contract.sync import ops
from segue_contract.sync.state import Cursor
from tests.support.producers import producer
from tests.support.slow_proxy import SlowProxy

S, NOWHERE = SessionName("default", "trip"), SessionName("default", "nowhere")
DEADLINE_S = 20


def op(text: str) -> LogOp:
    return LogOp.of(ops.Set(id=text, name="last", value=text.encode()))


@pytest.fixture
async def proxy(valkey: Valkey) -> AsyncIterator[SlowProxy]:
    async with SlowProxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
async def elsewhere(valkey: Valkey) -> AsyncIterator[SessionLog]:
    """Another instance on the same store."""
    store = await RedisStore.connect(valkey.url)
    async with SessionLog(store) as log:
        await log.open_session(S)
        yield log
    await store.close()


@pytest.fixture
async def log(proxy: SlowProxy) -> AsyncIterator[SessionLog]:
    store = await RedisStore.connect(proxy.redis_url)
    async with SessionLog(store) as log:
        yield log
        log.check_integrity()
    await store.close()


async def append(log: SessionLog, number: int) -> Cursor:
    result = await log.append(S, await producer(log, S, "other", number), [op(f"o{number}")])
    return Cursor(result.generation, result.tail)


async def commands(valkey: Valkey, name: str) -> int:
    wire = Wire(valkey.url)
    try:
        ((text),) = await wire.call(("INFO", "commandstats"))
    finally:
        await wire.close()
    for line in text.decode().splitlines():
        if line.startswith(f"cmdstat_{name}:calls="):
            return int(line.split("=")[1].split(",")[0])
    return 0


async def until_fresh(log: SessionLog, sessions: list[SessionName]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await log.tails(sessions)
        while not log.tails_fresh:  # noqa: ASYNC110 - what is waited for is in a server
            await asyncio.sleep(0.02)
        await log.tails(sessions)


async def tails(log: SessionLog, *sessions: SessionName) -> list[Cursor | None]:
    return [tail and tail.cursor for tail in await log.tails(sessions)]


async def until_known(log: SessionLog, tail: Cursor) -> None:
    while await tails(log, S) != [tail]:  # noqa: ASYNC110 - what is waited for is in a server
        await asyncio.sleep(0.005)


async def test_tails_that_are_asked_for_again_cost_the_store_nothing(
    log: SessionLog, elsewhere: SessionLog, valkey: Valkey
) -> None:
    tail = await append(elsewhere, 1)
    await until_fresh(log, [S])
    async with asyncio.timeout(DEADLINE_S):
        while True:  # until the look-up of the watched session is over
            before = await commands(valkey, "hmget")
            assert await tails(log, S) == [tail]
            if await commands(valkey, "hmget") == before:
                break
    for number in (2, 3):
        tail = await append(elsewhere, number)
        async with asyncio.timeout(DEADLINE_S):
            await until_known(log, tail)
    assert await tails(log, S, NOWHERE) == [tail, None]


@pytest.mark.parametrize("how", ["cut", "silent", "nobody may publish"])
async def test_what_others_append_is_seen_whatever_becomes_of_the_news(
    log: SessionLog, elsewhere: SessionLog, valkey: Valkey, proxy: SlowProxy, how: str
) -> None:
    async with AsyncExitStack() as stack:
        following = await stack.enter_async_context(log.follow(S))
        await stack.enter_async_context(asyncio.timeout(DEADLINE_S))
        await anext(following)
        await append(elsewhere, 1)
        assert (await anext(following)).entries[-1].cursor.offset == 1
        await until_fresh(log, [S])
        if how == "cut":
            proxy.cut()
        elif how == "silent":
            proxy.stall()
        else:
            wire = Wire(valkey.url)
            stack.push_async_callback(wire.close)
            await wire.call(("ACL", "SETUSER", "default", "resetchannels"))
            stack.push_async_callback(wire.call, ("ACL", "SETUSER", "default", "allchannels"))
        await append(elsewhere, 2)
        if how == "silent":
            proxy.cut()  # what was on its way is gone
            proxy.flow()
        assert (await anext(following)).entries[-1].cursor.offset == 2
        tail = await append(elsewhere, 3)
        await until_known(log, tail)


class BreakingLink:
    """Fails when told to, as a link to a store that is closed."""

    def __init__(self) -> None:
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.listening = asyncio.Event()

    async def watch(self, sessions: Sequence[SessionName]) -> None: ...

    async def forget(self, sessions: Sequence[SessionName]) -> None: ...

    async def beat(self, number: int) -> None: ...

    async def next(self) -> TailTold | Watched | Beat:
        self.listening.set()
        await self.broken
        raise AssertionError("the link does not break without an error")


async def test_a_feed_closes_although_its_link_breaks_just_then() -> None:
    link = BreakingLink()

    class Store:
        @asynccontextmanager
        async def changes(self, name: str) -> AsyncIterator[BreakingLink]:
            yield link

        async def tails(self, sessions: Sequence[SessionName]) -> list[None]:
            return [None] * len(sessions)

    feed = TailFeed(cast(Reading, Store()), cast(Followed, None))
    async with asyncio.timeout(DEADLINE_S):
        async with feed:
            feed.hold(S)
            await link.listening.wait()
            link.broken.set_exception(StoreUnavailable("closed"))
            # The group has heard of the error, and its tasks are not all gone yet.
            while not any(task.cancelling() for task in asyncio.all_tasks()):  # noqa: ASYNC110
                await asyncio.sleep(0)
