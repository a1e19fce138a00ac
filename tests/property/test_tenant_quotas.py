"""Rates and places of tenants under any load, on a simulated clock."""

from __future__ import annotations

import copy
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segue_cloud.tenants.quotas_file import quotas_of, read_quotas
from segue_cloud.tenants.usage import TenantUsage, unlimited
from segue_cloud.turns.places import Places
from segue_contract.bucket import Bucket
from segue_contract.errors import InvalidArgument, QuotaExceeded
from segue_contract.ids import SessionName, TurnName
from segue_contract.limits import PLACE_CLAIM_S, TenantQuotas


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@given(
    st.lists(st.tuples(st.floats(0.0, 20.0), st.floats(0.01, 50.0)), max_size=60),
    st.floats(0.1, 10.0),
)
def test_a_rate_holds_over_any_time_but_for_what_was_saved(
    asks: list[tuple[float, float]], rate: float
) -> None:
    bucket = Bucket(rate, 10.0, 0.0)
    now_s = taken = most = 0.0
    for pause_s, amount in asks:
        now_s += pause_s
        wait_s = bucket.wait_s(amount, now_s)
        later = copy.copy(bucket)
        assert later.wait_s(amount, now_s + wait_s + 1e-6) == 0.0, "the wait was too short"
        if not wait_s:
            bucket.take(amount, now_s)
            taken, most = taken + amount, max(most, amount)
    assert taken <= rate * (10.0 + now_s) + most + 1e-6


def test_what_may_be_saved_up_changes_with_the_file() -> None:
    bucket = Bucket(math.inf, 10.0, 0.0)
    bucket.take(1e9, 0.0)
    bucket.change(1.0, 10.0, 5.0)
    assert bucket.wait_s(10.0, 5.0) == 0.0
    bucket.take(10.0, 5.0)
    bucket.change(2.0, 10.0, 5.0)
    assert bucket.wait_s(1.0, 5.0) == 0.0, "ten of twenty are used"
    assert bucket.wait_s(20.0, 5.0) == pytest.approx(5.0)


def test_tokens_that_were_used_hold_up_the_next_turn_not_the_running_one() -> None:
    clock = Clock()
    usage = TenantUsage(lambda tenant: TenantQuotas(tokens_per_min=60.0), clock)
    usage.turn("acme", 0)
    usage.computed("acme", 90)
    with pytest.raises(QuotaExceeded) as refused:
        usage.turn("acme", 0)
    wait_s = refused.value.fields["retry_after_s"]
    assert refused.value.fields["what"] == "tokens_per_min"
    assert wait_s == pytest.approx(31.0)
    usage.turn("other", 0)
    clock.now_s += wait_s + 0.001
    usage.turn("acme", 0)


def test_devices_and_streams_come_free_again() -> None:
    clock = Clock()
    usage = TenantUsage(lambda tenant: TenantQuotas(devices=2, attaches=1), clock)
    usage.device("acme", "one")
    usage.device("acme", "two")
    usage.device("acme", "one")
    with pytest.raises(QuotaExceeded) as refused:
        usage.device("acme", "three")
    usage.device("other", "three")
    clock.now_s += refused.value.fields["retry_after_s"] + 0.001
    usage.device("acme", "three")
    with usage.attached("acme"):
        with pytest.raises(QuotaExceeded), usage.attached("acme"):
            raise AssertionError
        with usage.attached("other"):
            pass
    with usage.attached("acme"):
        pass


def test_without_quotas_nothing_is_refused() -> None:
    usage = unlimited(Clock())
    for number in range(100):
        usage.append("default", 256, 2**23)
        usage.computed("default", 10**6)
        usage.turn("default", number)
        usage.device("default", f"device{number}")


# -- the file ---------------------------------------------------------------------------------


def test_a_file_says_what_differs() -> None:
    text = json.dumps(
        {
            "default": {"turns": 10},
            "tenants": {"acme": {"weight": 2, "sessions": None}, "other": {"turns": 3}},
        }
    )
    default, tenants = read_quotas(text.encode())
    usual = TenantQuotas()
    assert (default.turns, default.sessions) == (10, usual.sessions)
    assert (tenants["acme"].weight, tenants["acme"].sessions) == (2, math.inf)
    assert tenants["acme"].turns == 10
    assert tenants["other"].turns == 3


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["default", "tenants", "acme", "weight", "turns", "ops_per_s", "a b"]),
        inner, max_size=3,
    ),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_any_bytes_are_quotas_or_a_typed_error(data: bytes) -> None:
    try:
        default, tenants = read_quotas(data)
    except InvalidArgument:
        return
    for quotas in (default, *tenants.values()):
        assert quotas.weight > 0
        assert quotas.ops_per_s > 0


@pytest.mark.parametrize(
    "entry",
    [{"weight": 0}, {"weight": -1}, {"ops_per_s": 0}, {"turns": -1}, {"weight": None}, {"ops": 1}],
)
def test_what_makes_no_sense_is_refused_as_a_whole(entry: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        read_quotas(json.dumps({"tenants": {"acme": entry}}).encode())


def test_a_file_may_change_and_the_last_good_one_is_kept(tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "quotas.json"  # type: ignore[operator]
    path.write_text('{"tenants": {"acme": {"turns": 3}}}')
    clock = Clock()
    quotas = quotas_of(path, keyed=True, monotonic=clock)  # type: ignore[arg-type]
    assert quotas("acme").turns == 3
    for text, turns in (('{"tenants": {"acme": {"turns": 44}}}', 44), ("{", 44)):
        path.write_text(text)
        clock.now_s += 2.0
        assert quotas("acme").turns == turns


# -- places -----------------------------------------------------------------------------------


def turn_of(tenant: str, number: int) -> TurnName:
    return TurnName(SessionName(tenant, f"s{number}"), f"t{number}")


def test_who_fills_an_instance_gets_no_place_before_those_that_ask() -> None:
    clock = Clock()
    places = Places(4, lambda tenant: 1.0, clock)
    flood = [turn_of("noisy", number) for number in range(40)]
    for turn in flood[:4]:
        assert places.take(turn)
    quiet = [turn_of("quiet", number) for number in range(2)]
    assert [places.take(turn) for turn in quiet] == [False, False]
    for ended in flood[:2]:
        places.give_back(ended)
        assert not any(places.take(turn) for turn in flood[4:])
        assert places.take(quiet.pop(0))
    assert places.of("quiet") == places.of("noisy") == 2
    places.give_back(flood[2])
    assert places.take(flood[4]), "nobody else asks"


def test_a_claim_that_nobody_makes_again_is_dropped() -> None:
    clock = Clock()
    places = Places(1, lambda tenant: 1.0, clock)
    first, second, other = turn_of("noisy", 1), turn_of("noisy", 2), turn_of("quiet", 1)
    assert places.take(first)
    assert not places.take(other)
    places.give_back(first)
    assert not places.take(second)
    clock.now_s += PLACE_CLAIM_S + 0.01
    assert places.take(second)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_each_tenant_gets_its_part_of_the_places(data: st.DataObject) -> None:
    """Whoever asks again and again holds as many as its weight says; no place lies idle."""
    weights = data.draw(st.dictionaries(st.sampled_from("abcd"), st.sampled_from([1.0, 2.0, 4.0]),
                                        min_size=2))  # fmt: skip
    most = data.draw(st.integers(len(weights), 24))
    seed = random.Random(data.draw(st.integers(0, 10**6)))
    clock = Clock()
    places = Places(most, weights.__getitem__, clock)
    wants = {turn_of(tenant, number) for tenant in weights for number in range(30)}
    held: set[TurnName] = set()
    for _ in range(20):
        clock.now_s += PLACE_CLAIM_S / 1000
        if held and seed.random() < 0.02:
            ended = seed.choice(sorted(held, key=str))
            places.give_back(ended)
            held.discard(ended)
        for turn in seed.sample(sorted(wants - held, key=str), 8):
            if places.take(turn):
                held.add(turn)
        assert places.held == len(held) <= most
    for _ in range(40):  # some end, and all ask, often enough for the parts to settle
        for turn in seed.sample(sorted(held, key=str), min(2, len(held))):
            places.give_back(turn)
            held.discard(turn)
        asking = sorted(wants - held, key=str)
        seed.shuffle(asking)
        for turn in (*asking, *asking):
            if turn not in held and places.take(turn):
                held.add(turn)
        assert places.free == 0, "a place lies idle"
    total = sum(weights.values())
    for tenant, weight in weights.items():
        assert places.of(tenant) >= min(30, int(most * weight / total)) - 1


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=80), st.integers(1, 5))
def test_one_tenant_has_every_place_at_once(steps: list[tuple[int, bool]], most: int) -> None:
    places = Places(most)
    held: set[int] = set()
    for number, takes in steps:
        turn = turn_of("alone", number)
        if not takes and number in held:
            places.give_back(turn)
            held.discard(number)
        elif takes and number not in held:
            assert places.take(turn) == (len(held) < most)
            held |= {number} if len(held) < most else set()
