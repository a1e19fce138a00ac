"""Which cloud a session's turn goes to: its own order, bounded loads, and where its KV lies."""

from __future__ import annotations

import asyncio
import math
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue_contract.errors import Overloaded
from segue_contract.ids import SessionName
from segue_contract.plan import decode_plan
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.uplink.clouds import CloudSet, Home
from segue_edge.uplink.pacer import Pacer
from segue_edge.uplink.rendezvous import BOUND, Standing, rank
from tests.support.edge_node import device_of, edge_node
from tests.support.scripted_cloud import Script, scripted_cloud

TRIP, OTHER = SessionName("default", "trip"), SessionName("default", "other")
TARGETS = [f"10.0.0.{n}:7412" for n in range(1, 6)]
IDLE = {target: Standing(places=8) for target in TARGETS}

names = st.text(min_size=1, max_size=20)
targets = st.sampled_from(TARGETS)
standings = st.fixed_dictionaries(
    {
        target: st.builds(
            Standing,
            healthy=st.booleans(),
            full=st.booleans(),
            turns=st.integers(0, 300),
            places=st.sampled_from([0, 1, 8, 256]),
            wait_s=st.floats(0, 20),
            again_s=st.floats(0, 20),
        )
        for target in TARGETS
    }
)


# -- the rule -----------------------------------------------------------------------------------


@given(names, standings, st.sampled_from([*TARGETS, ""]))
def test_all_are_ranked_and_those_that_take_turns_come_first(
    session: str, clouds: dict[str, Standing], home: str
) -> None:
    ranked = rank(session, clouds, home)
    assert sorted(ranked) == sorted(TARGETS)
    kinds = [(clouds[name].healthy, clouds[name].open) for name in ranked]
    assert kinds == sorted(kinds, reverse=True)


@given(names, st.sets(targets, min_size=1, max_size=4))
def test_a_lost_cloud_moves_only_its_own_sessions(session: str, lost: set[str]) -> None:
    before = rank(session, IDLE)
    left = {target: one for target, one in IDLE.items() if target not in lost}
    assert rank(session, left) == [target for target in before if target not in lost]


def test_sessions_spread_over_the_clouds() -> None:
    firsts = [rank(f"session-{n}", IDLE)[0] for n in range(500)]
    assert min(firsts.count(target) for target in TARGETS) > 50


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=5),
    st.integers(1, 200),
    st.integers(0, 10**9),
)
def test_no_cloud_gets_more_than_the_bound(places: list[int], count: int, first: int) -> None:
    clouds = {f"c{n}": Standing(places=size) for n, size in enumerate(places)}
    for placed in range(1, count + 1):
        chosen = rank(f"s{first + placed}", clouds)[0]
        clouds[chosen] = replace(clouds[chosen], turns=clouds[chosen].turns + 1)
        share = clouds[chosen].places / sum(places)
        assert clouds[chosen].turns <= math.ceil(BOUND * placed * share)
    assert sum(one.turns for one in clouds.values()) == count


loads = st.lists(st.integers(0, 40), min_size=5, max_size=5)


@given(names, loads, targets, st.integers(1, 40))
def test_more_load_at_one_cloud_moves_only_its_sessions_or_brings_some_back(
    session: str, turns: list[int], grown: str, more: int
) -> None:
    own = rank(session, IDLE)
    counts = zip(TARGETS, turns, strict=True)
    before = {name: Standing(places=8, turns=count) for name, count in counts}
    after = {**before, grown: replace(before[grown], turns=before[grown].turns + more)}
    old, new = rank(session, before)[0], rank(session, after)[0]
    assert new == old or old == grown or own.index(new) < own.index(old)


def test_an_idle_cloud_is_passed_over_for_no_reason_but_its_wait() -> None:
    first, second, *_ = rank("trip", IDLE)
    assert rank("trip", {**IDLE, first: Standing(places=8, wait_s=0.4)})[0] == first
    assert rank("trip", {**IDLE, first: Standing(places=8, wait_s=0.6)})[0] == second
    assert rank("trip", {name: Standing(places=8, wait_s=9.0) for name in TARGETS})[0] == first


def test_a_cloud_that_does_not_say_what_it_holds_is_taken_as_it_comes() -> None:
    first, *_ = rank("trip", IDLE)
    told = {name: Standing(places=8, turns=8) for name in TARGETS}
    assert rank("trip", {**told, first: Standing()})[0] == first


# -- where the KV lies --------------------------------------------------------------------------


@given(names, targets, loads)
def test_load_alone_moves_no_session_from_its_kv(session: str, home: str, turns: list[int]) -> None:
    counts = zip(TARGETS, turns, strict=True)
    clouds = {name: Standing(places=8, turns=count, again_s=0.1) for name, count in counts}
    assert rank(session, clouds, home)[0] == home


@given(names, targets, st.floats(0, 10), st.floats(0, 10), st.floats(0, 10))
def test_a_wait_longer_than_computing_again_does(
    session: str, home: str, wait_s: float, elsewhere_s: float, again_s: float
) -> None:
    clouds = {name: Standing(places=8, wait_s=elsewhere_s, again_s=again_s) for name in TARGETS}
    clouds[home] = Standing(places=8, wait_s=wait_s)
    stays = rank(session, clouds, home)[0] == home
    if wait_s <= elsewhere_s + again_s:
        assert stays
    elif wait_s > elsewhere_s + again_s + 0.5:
        assert not stays


# -- wired to real figures ----------------------------------------------------------------------


async def _until(call: Any, kind: str) -> pb.TurnEvent:
    """The next event of that kind; a busy machine sends heartbeats before it."""
    while True:
        event: pb.TurnEvent = await call.read()
        if event.WhichOneof("kind") == kind:
            return event


async def _went_to(call: Any) -> str:
    """The instance that served the turn of this stream."""
    return decode_plan((await _until(call, "ended")).ended.plan).instance


async def test_sessions_that_all_hash_to_one_cloud_go_both_ways_once_it_is_loaded() -> None:
    async with AsyncExitStack() as stack:
        both = [
            await stack.enter_async_context(scripted_cloud(name, script=Script(places=16)))
            for name in ("cloud-a", "cloud-b")
        ]
        node = await stack.enter_async_context(edge_node(*(one.address for one in both)))
        device = await stack.enter_async_context(device_of(node))
        for cloud in both:
            cloud.script.decode.clear()
        a, b = both
        many = (f"session-{n}" for n in range(200))
        hot = [
            name
            for name in many
            if node.clouds.best(SessionName("default", name)).target == a.address
        ][:20]

        async with asyncio.timeout(100):
            calls = [device.stream(f"{one}.1", session=one, plan="text") for one in hot]
            for call in calls:
                await _until(call, "started")
            assert b.held >= 7
            assert a.held <= math.ceil(BOUND * 20 / 2)
            for cloud in both:
                cloud.script.decode.set()
            went = [await _went_to(call) for call in calls]
            # The load is gone; each stays where its KV is, also where its own order says otherwise.
            for known in node.clouds.clouds.values():
                await known.probe(Pacer())
            again = [device.stream(f"{one}.2", session=one, plan="text") for one in hot]
            assert [await _went_to(call) for call in again] == went


async def test_a_session_leaves_its_kv_for_a_shorter_wait_and_the_plan_has_the_queue() -> None:
    async with (
        scripted_cloud("cloud-a") as a,
        scripted_cloud("cloud-b") as b,
        edge_node(a.address, b.address) as node,
        device_of(node) as device,
    ):
        first = (await device.run("t1", plan="text")).plan.instance
        here, other = (a, b) if first == a.name else (b, a)
        here.script.queue_s, other.script.queue_s = 30.0, 0.25
        for cloud in node.clouds.clouds.values():
            await cloud.probe(Pacer())
        told = await device.run("t2", plan="text")
        assert told.plan.instance == other.name
        assert told.plan.inputs["cloud_queue_s"] == 0.25


async def test_pages_in_use_count_as_turns_and_a_refusal_is_kept_in_mind() -> None:
    async with scripted_cloud(script=Script(places=8)) as far:
        clouds = CloudSet([far.address], Pacer())
        cloud = clouds.clouds[far.address]
        try:
            await cloud.probe(Pacer())
            assert cloud.standing(TRIP, Home()) == Standing(places=8)
            far.script.pages_used = 0.7
            await cloud.probe(Pacer())
            assert cloud.standing(TRIP, Home()).turns == 6
            with cloud.asking(TRIP), cloud.asking(TRIP):
                assert cloud.standing(TRIP, Home()).turns == 6
                assert cloud.standing(OTHER, Home()).turns == 7
            cloud.refused(Overloaded("Full.", retry_after_s=5.0))
            assert cloud.standing(TRIP, Home()).full
            assert cloud.standing(TRIP, Home()).wait_s == pytest.approx(5.0, abs=1.0)
        finally:
            await clouds.close()
