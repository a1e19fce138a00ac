"""Both ends of a stream that may say nothing for long: who writes sends heartbeats, who reads
takes silence for the loss of the peer.

A dead process breaks its connections at once. One that was stopped, a machine without power, a
cable that was pulled do not: gRPC notices them after seconds at best. So every long stream carries
a `Heartbeat` each `HEARTBEAT_S` where nothing else was sent, from the event loop that serves it,
and its reader gives up after `SILENCE_S` without anything; for a turn's streams it is
`TURN_HEARTBEAT_S` and `TURN_SILENCE_S`.

A peer that is about to leave says so in a heartbeat; and who said nothing for half of the time may
be lost. Where somebody else can go on, it gets ready then, so that the change takes no longer than
it must.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from segue_contract.errors import Unreachable
from segue_contract.limits import DOUBT_LOOKS, HEARTBEAT_S, SILENCE_LOOKS, SILENCE_S
from segue_contract.liveness import Silence

T = TypeVar("T")

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


async def beating(
    source: AsyncIterator[T],
    beat: Callable[[], T],
    *,
    every_s: float = HEARTBEAT_S,
    news: asyncio.Event | None = None,
) -> AsyncGenerator[T, None]:
    """The items of `source`, and `beat()` after each `every_s` without one; once more between two
    items after `news` is set, for what a beat says then.

    `source` is read in a task of its own, and no further than this generator is.
    """
    loop = asyncio.get_running_loop()
    ready: deque[T] = deque()
    wanted, changed = asyncio.Event(), asyncio.Event()
    last_s = loop.time()
    timer: asyncio.TimerHandle

    async def pump() -> None:
        try:
            await wanted.wait()
            async for item in source:
                ready.append(item)
                wanted.clear()
                changed.set()
                await wanted.wait()
        finally:
            changed.set()
            if inspect.isasyncgen(source):
                await source.aclose()  # it ends when its reader does, and not some time later

    def wake() -> None:
        nonlocal timer
        left_s = last_s + every_s - loop.time()
        if left_s <= 0:
            changed.set()
            left_s = every_s
        timer = loop.call_later(left_s, wake)

    timer = loop.call_later(every_s, wake)
    pumping = asyncio.create_task(pump(), name="heartbeats: source")
    told = False  # the news
    try:
        while True:
            if news is not None and news.is_set() and not told:
                told, last_s = True, loop.time()
                yield beat()
            elif ready:
                last_s = loop.time()
                yield ready.popleft()
            elif pumping.done():
                await pumping
                return
            elif loop.time() - last_s >= every_s:
                last_s = loop.time()
                yield beat()
            else:
                wanted.set()
                changed.clear()
                await changed.wait()
    finally:
        timer.cancel()
        pumping.cancel()
        await asyncio.gather(pumping, return_exceptions=True)


class Listening:
    """Reads a gRPC call whose writer is `beating`; its heartbeats are left out.

    Only the time that a reader waits in `read` counts as silence.

    Args:
        patient: while it is true, a first message may take as long as it likes: the request itself
            waits on its way, behind what else this link carries.
        others: somebody else could go on: a peer whose compute hangs is as good as lost then.
        prepare: lets somebody else get ready to go on, and returns once that is so. Called where
            the peer says that it leaves (with True), and where it is quiet for half of
            `silence_s` (with False), each once. After the former the call is left.

    Attributes:
        silent: the peer said nothing for `silence_s`, or that its compute hangs: the call was
            cancelled for that.
        slept: this process itself stood still for longer than `silence_s`, and went on less than
            that ago: the peer may have taken it for lost.
    """

    def __init__(
        self,
        call: Any,
        *,
        silence_s: float = SILENCE_S,
        patient: Callable[[], bool] = lambda: False,
        others: bool = False,
        prepare: Callable[[bool], Awaitable[object]] | None = None,
    ) -> None:
        self.silent = False
        self._prepare = prepare
        self._preparing: dict[bool, asyncio.Task[None]] = {}
        self._left = False
        self._woke = float("-inf")
        self._others = others
        self._call = call
        self._patient = patient
        self._begun = False  # the peer said something
        self._silence = Silence()
        self._silence_s = silence_s
        self._pause_s = silence_s / SILENCE_LOOKS
        self._waiting = False
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._pause_s, self._look)

    @property
    def slept(self) -> bool:
        return self._late or self._loop.time() < self._woke + self._silence_s

    @property
    def _late(self) -> bool:
        """The timer is: this process has stood still, and has only just gone on."""
        return self._loop.time() > self._timer.when() + self._silence_s

    async def read(self) -> Any:
        """The next message, or `EOF` where the peer ended the call.

        Raises:
            Unreachable: it fell silent, or hangs.
            AioRpcError, CancelledError: as the call's own `read`.
        """
        while True:
            self._silence.heard()
            self._waiting = True
            try:
                message = await self._call.read()
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not (task is not None and task.cancelling()):
                    if self.silent:
                        raise self._lost() from None
                    if self._left:
                        self._rest()
                        raise Unreachable(
                            "The other side is being stopped.", hint="Another one is ready."
                        ) from None
                self.cancel()
                raise
            except BaseException:
                self.cancel()
                raise
            finally:
                self._waiting = False
            self._begun = True
            if message is EOF:
                self._rest()
                return message
            if message.WhichOneof("kind") != "heartbeat":
                return message
            if message.heartbeat.leaving:
                self._doubt(True)
            if message.heartbeat.stalled and self._others:
                self.silent = True
                self.cancel()
                raise Unreachable(
                    "The other side's compute makes no progress.", hint="Somebody else goes on."
                )

    async def __aiter__(self) -> AsyncIterator[Any]:
        """All messages up to the end."""
        while (message := await self.read()) is not EOF:
            yield message

    def cancel(self) -> None:
        """Leave the call."""
        self._rest()
        self._call.cancel()

    def _rest(self) -> None:
        self._timer.cancel()
        for task in self._preparing.values():
            task.cancel()

    def _doubt(self, leaving: bool) -> None:
        if self._prepare is None or leaving in self._preparing or True in self._preparing:
            return
        task = self._loop.create_task(self._get_ready(self._prepare, leaving), name="prepare")
        self._preparing[leaving] = task

    async def _get_ready(self, prepare: Callable[[bool], Awaitable[object]], leaving: bool) -> None:
        try:
            await prepare(leaving)
        except Exception:  # nobody is ready: this call is read to its end, as ever
            return
        if leaving:
            self._left = True
            self._call.cancel()

    def _look(self) -> None:
        if self._late:
            self._woke = self._loop.time()
        listening = self._waiting and (self._begun or not self._patient())
        if listening and self._silence.look():
            self.silent = True
            self._call.cancel()
            return
        if listening and self._silence.looks == DOUBT_LOOKS:
            self._doubt(False)
        self._timer = self._loop.call_later(self._pause_s, self._look)

    def _lost(self) -> Unreachable:
        return Unreachable(
            f"The other side said nothing for {self._silence_s:g} s.",
            hint="Its process hangs, or the network between lost it.",
        )


async def answered(
    call: Awaitable[T],
    ping: Callable[[float], Awaitable[object]],
    *,
    silence_s: float = SILENCE_S,
) -> T:
    """The result of `call`, given up where the peer answers nothing at all.

    A slow answer is none that is lost: after half of `silence_s`, and again and again, `ping` is
    asked for a sign of life within the other half.

    Args:
        ping: called with seconds; raises where no answer came within them.

    Raises:
        Unreachable: no answer, and no sign of life either.
        Whatever `call` raises.
    """
    half_s = silence_s / 2
    asking = asyncio.ensure_future(call)
    try:
        while True:
            done, _ = await asyncio.wait({asking}, timeout=half_s)
            if done:
                return asking.result()
            began = asyncio.get_running_loop().time()
            try:
                await ping(half_s)
            except Exception as error:
                if asking.done():
                    return asking.result()
                late_s = asyncio.get_running_loop().time() - began
                if late_s > 2 * half_s:
                    continue  # we were not scheduled ourselves: that says nothing of the peer
                raise Unreachable(
                    f"The other side did not answer for {silence_s:g} s.",
                    hint="Its process hangs, or the network between lost it.",
                ) from error
    finally:
        if not asking.done():
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
