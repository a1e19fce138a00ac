"""What is said to be known of a log's tail is what the log has, however news and look-ups cross."""

from __future__ import annotations

from collections import deque
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from segue_cloud.hub.tails import Look, TailTable
from segue_cloud.sessions.news import LogTail
from segue_contract.ids import SessionName
from segue_contract.sync.state import Cursor

NAMES = [SessionName("default", name) for name in "abcd"]


def tail(generation: int, offset: int) -> LogTail:
    return LogTail(Cursor(generation, offset), f"{generation}-{offset}".encode())


class Link:
    """The store's side: news wait in order, each look-up's answer by itself."""

    def __init__(self, table: TailTable) -> None:
        self.table = table
        self.watched: set[SessionName] = set()
        self.news: deque[tuple[SessionName, LogTail | None]] = deque()
        self.answers: list[tuple[Look, LogTail]] = []

    def hear(self) -> None:
        session, tail = self.news.popleft()
        if tail is None:
            self.table.watched(session)
        else:
            self.table.told(session, tail)


@given(seed=st.integers(0, 2**32))
def test_a_known_tail_is_the_logs_once_all_news_were_heard(seed: int) -> None:
    random = Random(seed)
    table = TailTable(max_sessions=3, idle_s=10.0)
    link = Link(table)
    tails = {name: tail(1, 0) for name in NAMES}
    held: list[SessionName] = []
    now = 0.0

    def change(name: SessionName, generation: int, offset: int) -> None:
        tails[name] = tail(generation, offset)
        if name in link.watched:
            link.news.append((name, tails[name]))

    def work() -> None:
        for name in table.take_forgets(random.randrange(1, 4)):
            link.watched.discard(name)
        for name in table.take_watches(random.randrange(1, 4)):
            link.watched.add(name)
            link.news.append((name, None))
        link.answers += [(one, tails[one.session]) for one in table.take_looks(3)]

    for _ in range(80):
        name = random.choice(NAMES)
        match random.randrange(9):
            case 0:
                table.hold(name)
                held.append(name)
            case 1 if held:
                table.release(held.pop(random.randrange(len(held))))
            case 2:
                table.ask(name, now)
            case 3:
                change(name, tails[name].cursor.generation, tails[name].cursor.offset + 1)
            case 4 if random.random() < 0.3:  # a loss: back, under another generation
                change(name, tails[name].cursor.generation + 1, tails[name].cursor.offset // 2)
            case 5 if link.news:
                link.hear()
            case 6 if link.answers:
                table.looked_up(*link.answers.pop(random.randrange(len(link.answers))))
            case 7:
                work()
            case 8 if random.random() < 0.2:
                if random.random() < 0.5:
                    now += 6.0
                    table.expire(now)
                else:  # the link is lost, with all that was on its way
                    link = Link(table)
                    table.lost()
        table.check_integrity()

    while table.waiting or link.news or link.answers:
        work()
        while link.news:
            link.hear()
        while link.answers:
            table.looked_up(*link.answers.pop())
    for name in NAMES:
        known = table.ask(name, now)
        assert known in (None, tails[name])
        assert known is not None or name not in held, "a followed session is not known"


def test_only_so_many_sessions_are_watched_for_those_who_ask() -> None:
    table = TailTable(max_sessions=2, idle_s=10.0)
    for name in NAMES:
        assert table.ask(name, 0.0) is None
    assert len(table) == 2
    table.hold(NAMES[3])
    table.expire(10.0)
    assert table.take_watches(9) == [NAMES[3]]
    table.check_integrity()
