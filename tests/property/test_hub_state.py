"""Followers of a session see its log, in order, once, whatever is dropped on the way to them."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from segue_cloud.hub.state import HubState
from segue_cloud.sessions.port import StoredEntry
from segue_contract.ids import SessionName
from segue_contract.sync.state import Cursor

KEY = SessionName("default", "s")


def entry(offset: int, generation: int = 1) -> StoredEntry:
    return StoredEntry(Cursor(generation, offset), f"op{offset}".encode())


@given(seed=st.integers(0, 2**32), bound=st.integers(1, 6))
def test_every_follower_sees_the_whole_log(seed: int, bound: int) -> None:
    """The shell's loop, step by step, between random appends here and elsewhere."""
    random = Random(seed)
    hub = HubState(queue_entries=bound)
    log: list[StoredEntry] = []
    seen: dict[int, list[int]] = {}

    def step(follower: int) -> None:
        """What `Hub._steps` does, with `log` as the store."""
        if taken := hub.take(follower, random.choice((1, 20, 1000))):
            seen[follower] += [one.cursor.offset for one in taken]
        elif hub.behind(follower) is not None:
            at = seen[follower][-1] if seen[follower] else 0
            page = log[at : at + random.randrange(1, 5)]
            if page:
                seen[follower] += [one.cursor.offset for one in page]
                hub.move(follower, page[-1].cursor)

    for _ in range(120):
        match random.randrange(6):
            case 0:
                follower = hub.join(KEY)
                if random.random() < 0.5:  # an append between joining and the snapshot
                    log.append(entry(len(log) + 1))
                    hub.offer(KEY, [log[-1]])
                seen[follower] = list(range(1, len(log) + 1))
                hub.move(follower, Cursor(1, len(log)))
            case 1 if seen:
                follower = random.choice(list(seen))
                del seen[follower]
                hub.leave(follower)
            case 2:  # appended here; sometimes the hub hears of it late, or never
                new = [entry(len(log) + 1 + i) for i in range(random.randrange(1, 4))]
                log.extend(new)
                if random.random() < 0.8:
                    hub.offer(KEY, new)
            case 3 if log:  # the same again, or the tail seen elsewhere
                hub.offer(KEY, [random.choice(log)])
                hub.announce(KEY, log[-1].cursor, hub.tail(KEY))
            case _:
                for follower in seen:
                    step(follower)
        hub.check_integrity()
    hub.announce(KEY, Cursor(1, len(log)), hub.tail(KEY))
    for follower, offsets in seen.items():
        while offsets != list(range(1, len(log) + 1)):
            before = len(offsets)
            step(follower)
            assert len(offsets) > before, "it waits although something is missing"
        assert hub.behind(follower) is None
        hub.leave(follower)
    assert hub.followed == []


@given(seed=st.integers(0, 2**32))
def test_whoever_misses_something_is_woken(seed: int) -> None:
    """Followers step only where they were woken, as `Hub._steps` does; their reads take a while,
    and news of other instances' appends comes late, some of it of a log that was lost since."""
    random = Random(seed)
    hub = HubState()
    generation, length, began = 1, 0, Cursor(1, 0)
    news: list[Cursor] = []
    followers = {hub.join(KEY): began for _ in range(3)}
    for one in followers:
        hub.move(one, began)
    hub.announce(KEY, began, hub.tail(KEY))
    awake: set[int] = set()
    reads: dict[int, tuple[Cursor, Cursor]] = {}  # what was known as it asked, what it was answered

    def step(follower: int) -> None:
        if follower in reads:
            asked_at, tail = reads.pop(follower)
            followers[follower] = tail
            hub.move(follower, tail)
            awake.update(hub.announce(KEY, tail, asked_at))
            awake.add(follower)
        elif (asked_at_now := hub.behind(follower)) is not None:
            reads[follower] = asked_at_now, Cursor(generation, length)
        else:
            awake.discard(follower)

    for _ in range(80):
        match random.randrange(8):
            case 0 | 1:
                length += 1
                news.append(Cursor(generation, length))
            case 2 if random.random() < 0.3:  # entries are lost, and the store's link with them
                generation, length = generation + 1, max(0, length - random.randrange(3))
                news.append(Cursor(generation, length))
            case 3 | 4 if news:
                awake.update(hub.told(KEY, news.pop(0)))
            case _ if awake | reads.keys():
                step(random.choice(sorted(awake | reads.keys())))
    for tail in news:
        awake.update(hub.told(KEY, tail))
    for _ in range(100):
        for one in sorted(awake | reads.keys()):
            step(one)
    assert not awake, "it reads for ever"
    assert set(followers.values()) == {Cursor(generation, length)}, "one of them was not woken"


def test_what_waits_is_bounded_by_bytes_each_and_together() -> None:
    """Large entries beyond a bound are not kept; whoever misses them reads the log."""

    def large(offset: int) -> StoredEntry:
        return StoredEntry(Cursor(1, offset), b"x" * 100)

    hub = HubState(queue_bytes=250, all_bytes=350)
    one, two = hub.join(KEY), hub.join(KEY)
    for follower in (one, two):
        hub.move(follower, Cursor(1, 0))
    hub.offer(KEY, [large(offset) for offset in range(1, 6)])
    hub.check_integrity()
    kept = [hub.take(follower, 10_000) for follower in (one, two)]
    assert sorted(len(entries) for entries in kept) == [1, 2]
    assert [hub.behind(follower) for follower in (one, two)] == [Cursor(1, 5)] * 2
    hub.move(one, Cursor(1, 5))
    hub.move(two, Cursor(1, 5))
    hub.offer(KEY, [large(6)])  # there is room again
    assert [len(hub.take(follower, 10_000)) for follower in (one, two)] == [1, 1]
    hub.check_integrity()


def test_another_generation_makes_a_follower_read() -> None:
    hub = HubState()
    follower = hub.join(KEY)
    hub.move(follower, Cursor(1, 9))
    hub.offer(KEY, [entry(6, generation=2)])
    assert hub.take(follower, 1000) == []
    assert hub.behind(follower) == Cursor(2, 6)
    hub.move(follower, Cursor(2, 6))
    assert hub.behind(follower) is None


def test_who_has_no_snapshot_yet_is_woken_and_told_to_read() -> None:
    hub = HubState()
    follower = hub.join(KEY)
    assert list(hub.offer(KEY, [entry(1)])) == [follower]
    hub.move(follower, Cursor(1, 0))
    assert hub.behind(follower) == Cursor(1, 1)
    assert list(hub.announce(KEY, Cursor(1, 1), hub.tail(KEY))) == []
    assert list(hub.offer(SessionName("default", "other"), [entry(1)])) == []


def test_large_entries_wait_up_to_their_bytes_and_are_read_beyond() -> None:
    """Behind followers that stand still: each has its bound, and all together have one."""
    hub = HubState(queue_entries=100, queue_bytes=40, all_bytes=100)
    followers = [hub.join(KEY) for _ in range(4)]
    for follower in followers:
        hub.move(follower, Cursor(1, 0))
    large = [StoredEntry(Cursor(1, offset), b"x" * 15) for offset in range(1, 6)]
    for one in large:
        hub.offer(KEY, [one])
        hub.check_integrity()
    waiting = [sum(len(one.op) for one in hub.take(follower, 1000)) for follower in followers]
    assert max(waiting) == 30, "two of them fit, a third would be beyond the bound"
    assert sum(waiting) == 90
    assert all(hub.behind(follower) == Cursor(1, 5) for follower in followers)
    hub.check_integrity()
