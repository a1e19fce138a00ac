"""The chat without a terminal: lines in, text out, for pipes and scripts."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Sequence

from segue.cli._chat_text import clean, footer
from segue.cli._room import Room, Talk


class PlainScreen:
    """Own replies stream to standard output; others are printed whole, between own ones."""

    def __init__(self, write: Callable[[str], object] = sys.stdout.write) -> None:
        self._write = write
        self._room: Room | None = None
        self._own: Talk | None = None
        self._written = 0
        self._waiting: list[Talk] = []

    def bind(self, room: Room) -> None:
        self._room = room

    def history(self, talks: Sequence[Talk]) -> None:
        for talk in talks:
            self._whole(talk)

    def changed(self) -> None:
        """Write what is new of our own reply; a rewound reply is written again on a new line."""
        room = self._room
        if room is None:
            return
        ours = (talk for talk in room.live.values() if talk.ours)
        talk = self._own or next(ours, None)
        if talk is None:
            return
        if self._own is None:
            self._own, self._written = talk, 0
            self._line(f"{talk.device}> {clean(talk.prompt)}")
        self._stream(talk)

    def finished(self, talk: Talk) -> None:
        if talk is not self._own:
            if self._own is not None:
                self._waiting.append(talk)
            else:
                self._whole(talk)
            return
        self._stream(talk)
        self._line("")
        self._line(f"[{footer(talk)}]\n")
        self.idle()

    def idle(self) -> None:
        """Our own reply is over: what the others said meanwhile may be printed."""
        self._own = None
        waiting, self._waiting = self._waiting, []
        for other in waiting:
            self._whole(other)

    def note(self, text: str) -> None:
        sys.stderr.write(f"{clean(text)}\n")
        sys.stderr.flush()

    def _stream(self, talk: Talk) -> None:
        text = clean(talk.text)
        if len(text) < self._written:
            self._line("")
            self._written = 0
        self._write(text[self._written :])
        self._written = len(text)
        sys.stdout.flush()

    def _whole(self, talk: Talk) -> None:
        self._line(f"{talk.device}> {clean(talk.prompt)}")
        self._line(clean(talk.text))
        self._line(f"[{footer(talk)}]\n")

    def _line(self, text: str) -> None:
        self._write(f"{text}\n")
        sys.stdout.flush()


async def plain(room: Room, screen: PlainScreen) -> None:
    """One turn per line of standard input; ends at its end, after the last reply."""
    screen.bind(room)
    lines = _lines()
    while (line := await lines.get()) is not None:
        prompt = line.strip()
        if prompt == "/quit":
            return
        if prompt == "/stop":
            await room.stop()
        elif prompt:
            await room.say(prompt)
            screen.idle()


def _lines() -> asyncio.Queue[str | None]:
    """Lines of standard input, then None. Read ahead by one line only."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[str | None] = asyncio.Queue(1)

    def put(line: str | None) -> bool:
        try:
            asyncio.run_coroutine_threadsafe(queue.put(line), loop).result()
        except (RuntimeError, asyncio.CancelledError):
            return False
        return True

    def read() -> None:
        for line in sys.stdin:
            if not put(line):
                return
        put(None)

    # a daemon: a read that blocks must not keep the program from ending
    threading.Thread(target=read, name="stdin", daemon=True).start()
    return queue
