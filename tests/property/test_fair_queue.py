"""The edge's processor under any load, on a simulated clock: who gets it, and who waits."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from segue_contract.limits import DECODE_RETURN_S
from segue_edge.compute.fair import FairQueue, Idle, Priority

DECODE, PREFILL, WARM = Priority
SHARED = (DECODE, PREFILL)


@dataclass
class Task:
    """`steps`: seconds of each, what is left of them."""

    kind: Priority
    number: int
    steps: list[float]
    reply: Reply | None = None


@dataclass
class Reply:
    """Tokens one after another, each asked for `pause_s` after the one before."""

    tokens: int
    step_s: float
    pause_s: float = 0.0
    ends: list[float] = field(default_factory=list)


@dataclass
class Served:
    task: Task
    began: float
    seconds: float
    waiting: dict[Priority, list[int]]  # numbers of the jobs of each class, before the choice


class Processor:
    """A simulated clock, one processor, and everything that happened."""

    def __init__(self, decode_share: float = 0.5) -> None:
        self.queue: FairQueue[Task] = FairQueue(decode_share)
        self.now = 0.0
        self.history: list[Served] = []
        self.idled: list[tuple[float, float]] = []  # (from, to) while jobs waited
        self.finished: dict[int, float] = {}
        self._events: list[tuple[float, int, Task]] = []
        self._numbers = itertools.count()
        self._replies: set[int] = set()

    def task(self, at: float, kind: Priority, steps: list[float]) -> Task:
        task = Task(kind, next(self._numbers), list(steps))
        heapq.heappush(self._events, (at, task.number, task))
        return task

    def reply(self, at: float, reply: Reply) -> None:
        task = Task(DECODE, next(self._numbers), [reply.step_s], reply)
        self._replies.add(id(reply))
        heapq.heappush(self._events, (at, task.number, task))

    def run(self) -> None:
        while self._events or len(self.queue):
            self._arrive()
            waiting = {kind: [task.number for task in self.queue.jobs(kind)] for kind in Priority}
            due = self.queue.take(self.now, len(self._replies))
            if isinstance(due, Idle):
                self._idle(due)
                continue
            self._serve(due, waiting)

    def _arrive(self) -> None:
        while self._events and self._events[0][0] <= self.now:
            task = heapq.heappop(self._events)[2]
            self.queue.push(task.kind, task)

    def _idle(self, idle: Idle) -> None:
        times = [self._events[0][0]] if self._events else []
        if idle.until is not None:
            assert len(self.queue) > 0
            assert idle.until > self.now
            times.append(idle.until)
            self.idled.append((self.now, min(times)))
        else:
            assert len(self.queue) == 0, "idle although a job waits"
        self.now = min(times)

    def _serve(self, task: Task, waiting: dict[Priority, list[int]]) -> None:
        seconds = task.steps.pop(0)
        self.history.append(Served(task, self.now, seconds, waiting))
        self.now += seconds
        self._arrive()  # what came while the step ran
        self.queue.check_integrity()
        if task.steps:
            self.queue.put_back(seconds, self.now)
            return
        self.queue.drop(seconds, self.now)
        self.finished[task.number] = self.now
        if task.reply is not None:
            self._next_token(task.reply)

    def _next_token(self, reply: Reply) -> None:
        reply.ends.append(self.now)
        if len(reply.ends) == reply.tokens:
            self._replies.discard(id(reply))
            return
        task = Task(DECODE, next(self._numbers), [reply.step_s], reply)
        heapq.heappush(self._events, (self.now + reply.pause_s, task.number, task))


step_seconds = st.floats(0.001, 0.4)
arrivals = st.floats(0, 3)


@st.composite
def processors(draw: st.DrawFn) -> Processor:
    processor = Processor(draw(st.sampled_from([0.25, 0.5, 0.75])))
    for _ in range(draw(st.integers(0, 4))):
        tokens, pause = draw(st.integers(1, 12)), draw(st.floats(0, 0.02))
        processor.reply(draw(arrivals), Reply(tokens, draw(step_seconds), pause))
    for kind in (PREFILL, PREFILL, PREFILL, WARM):
        if draw(st.booleans()):
            steps = draw(st.lists(step_seconds, min_size=1, max_size=6))
            processor.task(draw(arrivals), kind, steps)
    return processor


@given(processors())
def test_within_a_class_it_is_first_come_first_served(processor: Processor) -> None:
    processor.run()
    for served in processor.history:
        assert served.task.number == served.waiting[served.task.kind][0]


@given(processors())
def test_work_waits_only_for_a_reply_between_two_tokens(processor: Processor) -> None:
    processor.run()
    decoded = [s.began + s.seconds for s in processor.history if s.task.kind is DECODE]
    for begin, end in processor.idled:
        assert any(ended <= begin and end <= ended + DECODE_RETURN_S + 1e-9 for ended in decoded)


@given(processors())
def test_nobody_starves(processor: Processor) -> None:
    """Between two services of a class that has work, and before its first, the other class gets at
    most what the one's last step earned it, and one step more."""
    processor.run()
    shares = processor.queue.shares
    longest: defaultdict[Priority, float] = defaultdict(float)
    for served in processor.history:
        longest[served.task.kind] = max(longest[served.task.kind], served.seconds)
    for mine, other in (SHARED, SHARED[::-1]):
        waited = 0.0
        earned = longest[mine] * shares[other] / shares[mine]
        for served in processor.history:
            if served.task.kind is mine or not served.waiting[mine]:
                waited = 0.0
            elif served.task.kind is other:
                waited += served.seconds
                assert waited <= earned + longest[other] + 1e-6


@given(processors())
def test_warm_ups_run_only_where_nothing_else_waits(processor: Processor) -> None:
    processor.run()
    for served in processor.history:
        if served.task.kind is WARM:
            assert not served.waiting[DECODE]
            assert not served.waiting[PREFILL]


def first_token_s(replies: int, *, chunks: int = 1) -> float:
    """Until a prompt of `chunks` steps of 0.25 s is prefilled, which comes while endless replies
    are decoded in steps of 12 ms."""
    processor = Processor()
    for _ in range(replies):
        processor.reply(0.0, Reply(2_000, 0.012, 0.0003))
    prompt = processor.task(1.0, PREFILL, [0.25] * chunks)
    processor.run()
    return processor.finished[prompt.number] - 1.0


def test_a_prompt_takes_at_most_twice_as_long_beside_any_number_of_replies() -> None:
    for replies in (0, 1, 2, 8):
        for chunks in (1, 4, 16):
            assert first_token_s(replies, chunks=chunks) <= 2 * 0.25 * chunks + 0.012
    assert first_token_s(0, chunks=4) == 1.0


def test_a_single_reply_gets_its_share_although_it_pauses_between_tokens() -> None:
    """Without the short wait for its next token it would have one token a chunk: four a second."""
    processor, reply = Processor(), Reply(1_000, 0.012, 0.0003)
    processor.reply(0.0, reply)
    processor.task(0.0, PREFILL, [0.25] * 40)
    processor.run()
    beside = [end for end in reply.ends if end <= 10.0]
    assert 0.45 * 10 <= len(beside) * 0.012 <= 0.55 * 10


def test_replies_share_what_decoding_gets() -> None:
    processor = Processor()
    replies = [Reply(300, 0.012, 0.0003) for _ in range(3)]
    for reply in replies:
        processor.reply(0.0, reply)
    processor.run()
    for one, other in itertools.combinations(replies, 2):
        assert abs(one.ends[150] - other.ends[150]) <= 3 * 0.0123


def test_idle_time_earns_no_credit() -> None:
    """Prompts alone for long, then replies come: they get their share, not what they missed."""
    processor, reply = Processor(), Reply(200, 0.012)
    prompts = processor.task(0.0, PREFILL, [0.25] * 60)
    processor.reply(10.0, reply)
    processor.run()
    assert processor.finished[prompts.number] > 15.0
    during = [served for served in processor.history if 10.0 <= served.began < 14.0]
    prefilled = sum(served.seconds for served in during if served.task.kind is PREFILL)
    assert 1.75 <= prefilled <= 2.5
