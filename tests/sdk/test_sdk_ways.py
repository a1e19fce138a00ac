"""When a follower needs a gRPC stream of its own: a pure rule."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from segue._ways import Ways
from segue_contract.limits import TAILS_INTERVAL_S

times = st.floats(0, 1000)


@st.composite
def some_ways(draw: st.DrawFn) -> tuple[Ways, float]:
    now = draw(times)
    earlier = st.floats(0, now)
    ways = Ways(
        use_s=draw(st.sampled_from([0.0, 30.0])),
        news_at=draw(earlier),
        heard_at=draw(earlier),
        tails=draw(st.booleans()),
        mqtt=draw(st.booleans()),
    )
    return ways, now


@given(some_ways())
def test_something_always_watches_the_log(given_ways: tuple[Ways, float]) -> None:
    ways, now = given_ways
    assert ways.mqtt or ways.needs_stream(now) or ways.watched(now)
    assert not (ways.needs_stream(now) and ways.spares_stream(now))


@given(some_ways(), st.booleans())
def test_the_next_look_comes_before_the_answers_are_out_of_date(
    given_ways: tuple[Ways, float], streams: bool
) -> None:
    ways, now = given_ways
    look_s = ways.look_s(now, streams=streams)
    later = now + (1e6 if look_s is None else look_s * 0.99)
    if streams:
        assert ways.spares_stream(now) or not ways.spares_stream(later)
    else:
        assert ways.needs_stream(now) or not ways.needs_stream(later)


@given(some_ways(), st.booleans())
def test_looks_do_not_follow_each_other_at_once(
    given_ways: tuple[Ways, float], streams: bool
) -> None:
    """As each look opens or closes the stream, and the tails are answered."""
    ways, now = given_ways
    looks = 0
    end = now + 60
    while now < end:
        look_s = ways.look_s(now, streams=streams)
        if look_s is None:
            return
        now = max(now + look_s, now * (1 + 1e-9))  # time goes on by the least that it can show
        ways.heard_at = max(ways.heard_at, now - TAILS_INTERVAL_S)
        if streams and ways.spares_stream(now):
            streams = False
        elif not streams and ways.needs_stream(now):
            streams = True
        looks += 1
        assert looks <= 60 / TAILS_INTERVAL_S + 4
