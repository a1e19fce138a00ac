"""A call at some cloud: one that says nothing is not waited for."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from segue_contract.ids import SessionName
from segue_edge.uplink.attempts import at_some_cloud
from segue_edge.uplink.clouds import Cloud, CloudSet
from segue_edge.uplink.pacer import Pacer
from tests.support.scripted_cloud import scripted_cloud
from tests.support.slow_proxy import SlowProxy

TRIP = SessionName("default", "trip")


async def test_a_cloud_that_swallows_what_it_is_asked_costs_a_pause() -> None:
    async with AsyncExitStack() as stack:
        targets, proxies = [], {}
        for _ in range(2):
            cloud = await stack.enter_async_context(scripted_cloud())
            proxy = await stack.enter_async_context(SlowProxy(cloud.server.port))
            targets.append(f"127.0.0.1:{proxy.port}")
            proxies[targets[-1]] = proxy
        clouds = CloudSet(targets, Pacer())
        stack.push_async_callback(clouds.close)
        for known in clouds.clouds.values():
            await known.probe(clouds.pacer)
        first, second = clouds.ranked(TRIP)
        proxies[first.target].stall()
        asked = []

        async def call(cloud: Cloud) -> str:
            asked.append(cloud)
            await cloud.sign_of_life(60.0)
            return cloud.target

        async with asyncio.timeout(30):
            assert await at_some_cloud(clouds, TRIP, call) == second.target
        assert asked == [first, second]
        assert not first.healthy
