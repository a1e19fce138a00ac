"""Whose KV a turn may use: other tenants' never, an edge's only where it is believed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segue_cloud.engine.block_pool import BlockPool
from segue_cloud.engine.domains import OPEN, named
from segue_cloud.engine.placement import Recipes
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.scheduler import Scheduler, SchedulerLimits
from segue_cloud.tenants.trust import EVERYBODY, EdgeTrust
from segue_contract.kv.layout import block_ids
from segue_contract.limits import KV_CHECKS_TRUSTED, KV_REFUSED_S

EDGE = "edge-recipe"
PROMPT = tuple(range(1, 260))
IDS = block_ids(EDGE, PROMPT)
ONE, TWO = "edge/here/one", "edge/there/two"


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class House:
    """A scheduler whose turns come from tenants and edges, as `EdgeTrust` sees them."""

    scheduler: Scheduler
    trust: EdgeTrust
    clock: Clock
    count: int = 0

    def run(self, tenant: str, edge: str = "", prompt: tuple[int, ...] = PROMPT) -> int:
        """Prompt tokens that the turn found in the cache."""
        self.count += 1
        turn = EngineTurn(
            f"t{self.count}", prompt, max_tokens=2, domains=self.trust.domains(tenant, edge)
        )
        self.scheduler.add(turn)
        cached = 0
        while not self.scheduler.idle:
            step = self.scheduler.schedule()
            for _, output in self.scheduler.postprocess(step, [7] * len(step.sampling)):
                assert output is not None
                cached = max(cached, output.cached_tokens)
        self.scheduler.check_integrity()
        return cached

    def ship(self, tenant: str, edge: str, blocks: int) -> None:
        domain = self.trust.shipped_into(tenant, edge)
        for block in IDS[:blocks]:
            name = named(domain, block)
            if self.scheduler.pool.resolve(name) is None:
                pages = self.scheduler.pool.allocate(4)
                assert pages is not None
                self.scheduler.pool.enter(name, pages, refs=0, kept_as=name)

    def has(self, tenant: str, edge: str = "") -> int:
        return self.scheduler.pool.count_prefix(IDS, self.trust.domains(tenant, edge))


def house(*, keyed: bool = True, chance: float = 0.0, pages: int = 1000) -> House:
    clock = Clock()
    trust = EdgeTrust(keyed=keyed, chance=lambda: chance, monotonic=clock)
    recipes = Recipes("own-recipe", EDGE)
    return House(Scheduler(BlockPool(pages), recipes, SchedulerLimits()), trust, clock)


def test_what_one_tenant_computed_no_other_finds() -> None:
    here = house()
    assert here.run("acme") == 0
    assert here.run("other") == 0
    assert here.run("acme") == 256
    assert here.run("acme", ONE) == 256, "its own, through whichever edge"
    assert (here.has("acme"), here.has("acme", ONE), here.has("third")) == (4, 4, 0)


def test_what_an_edge_shipped_is_for_that_edge_and_tenant_alone() -> None:
    here = house()
    here.ship("acme", ONE, 2)
    assert (here.has("acme", ONE), here.has("acme", TWO), here.has("acme")) == (2, 0, 0)
    assert here.has("other", ONE) == 0
    assert here.run("acme", ONE) == 128
    # Blocks 3 and 4 were computed after those of the edge: they carry its numbers.
    assert (here.has("acme", ONE), here.has("acme", TWO), here.has("acme")) == (4, 0, 0)
    assert here.run("acme", TWO) == 0
    assert here.run("acme") == 256, "now the tenant's own"
    assert here.run("acme", ONE) == 256


def test_an_edge_that_was_right_serves_its_tenant_and_one_that_was_wrong_nobody() -> None:
    here = house()
    here.ship("acme", ONE, 2)
    for _ in range(KV_CHECKS_TRUSTED):
        assert not here.trust.trusts(ONE)
        here.trust.found(ONE, right=True)
    assert here.trust.trusts(ONE)
    here.ship("acme", ONE, 3)
    assert (here.has("acme", ONE), here.has("acme", TWO), here.has("acme")) == (3, 3, 3)
    assert here.has("other", ONE) == 0
    assert here.run("acme", TWO) == 192
    here.trust.found(ONE, right=False)
    assert [here.has("acme", edge) for edge in (ONE, TWO, "")] == [0, 0, 0]
    assert here.run("acme") == 0
    assert not here.trust.trusts(ONE)
    assert here.trust.refuses(ONE)
    assert not here.trust.refuses(TWO)
    here.clock.now_s += KV_REFUSED_S
    assert not here.trust.refuses(ONE)
    assert here.trust.checks == {"right": KV_CHECKS_TRUSTED, "wrong": 1}


def test_where_nobody_is_told_apart_everything_is_as_it_was() -> None:
    here = house(keyed=False)
    assert here.trust.domains("default", "") == EVERYBODY == (OPEN,)
    here.ship("default", "", 2)
    assert here.run("default") == 128
    assert here.scheduler.pool.count_prefix(IDS) == 4
    assert not here.trust.picks("")
    here.trust.found("", right=False)
    assert not here.trust.refuses("")


@pytest.mark.parametrize(("chance", "picked"), [(0.0, True), (0.01, True), (0.02, False)])
def test_fewer_blocks_are_checked_as_trust_grows(chance: float, picked: bool) -> None:
    here = house(chance=chance)
    assert here.trust.picks(ONE) is picked
    for _ in range(KV_CHECKS_TRUSTED):
        here.trust.found(ONE, right=True)
    assert here.trust.picks(ONE) is (chance == 0.0)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["run", "ship", "right", "wrong"]),
            st.sampled_from(["acme", "other"]),
            st.sampled_from(["", ONE, TWO]),
            st.integers(1, 4),
        ),
        max_size=30,
    ),
    st.sampled_from([24, 40, 1000]),
)
def test_whatever_happens_nobody_finds_what_only_others_made(
    steps: list[tuple[str, str, str, int]], pages: int
) -> None:
    """A tenant that never sent the prompt finds none of it, and the plain domain has only what the
    engine computed from nothing or what trusted edges shipped."""
    here = house(pages=pages)
    came: set[tuple[str, str]] = set()
    trusted = False
    for what, tenant, edge, count in steps:
        if what == "run":
            found = here.run(tenant, edge)
            known = {(tenant, ""), (tenant, edge)}
            if trusted:
                known |= {(tenant, ONE), (tenant, TWO)}
            assert not found or came & known, "it found what others made"
            came.add((tenant, edge))
            # What was computed without an edge's blocks is the tenant's.
            if not found:
                came.add((tenant, ""))
        elif what == "ship" and edge:
            here.ship(tenant, edge, count)
            came.add((tenant, edge))
        elif what == "right" and edge:
            for _ in range(KV_CHECKS_TRUSTED):
                here.trust.found(edge, right=True)
            trusted = True
        elif what == "wrong" and edge:
            here.trust.found(edge, right=False)
        assert here.has("third") == here.has("third", ONE) == 0
