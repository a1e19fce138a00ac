"""The chat in a terminal: finished turns scroll away above, running ones live above the input.

What runs is drawn by prompt_toolkit between scrollback and input line, so typing is never torn
apart; what ended is printed once, by rich, and belongs to the terminal's own scrollback.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from prompt_toolkit.application import Application, run_in_terminal
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.layout import ConditionalContainer, HSplit, Layout, Window
from prompt_toolkit.layout.controls import BufferControl, FormattedTextControl
from prompt_toolkit.layout.processors import BeforeInput
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.styles import Style
from rich.console import Console
from rich.text import Text

from segue.cli._chat_text import HELP, OWN_COLOUR, body, clean, colour, footer, heading
from segue.cli._room import Room, Talk
from segue.errors import SegueError
from segue_contract.checks import check_plan

_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_HISTORY_SHOWN = 20
_CHROME_ROWS = 4  # input, status, and some of the scrollback stay visible
_STYLE = Style.from_dict({"dim": "#808080", "own": f"bold ansi{OWN_COLOUR}"})


class TerminalScreen:
    """A `Screen`; `run` shows it until the user leaves.

    Args: where to print, read keys and draw; by default this terminal.
    """

    def __init__(
        self,
        *,
        console: Console | None = None,
        keys: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self._console = console or Console(highlight=False)
        self._room: Room | None = None
        self._shown: dict[str, Talk] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._prints: set[asyncio.Future[None]] = set()
        self._stopping = ""  # the turn that we asked to stop
        self._buffer = Buffer(multiline=False, accept_handler=self._accept)
        self._app: Application[None] = self._build(keys, output or create_output())

    # -- Screen -----------------------------------------------------------------------------------
    def history(self, talks: Sequence[Talk]) -> None:
        left_out = len(talks) - _HISTORY_SHOWN

        def show() -> None:
            if left_out > 0:
                name = self._room.session.name if self._room else ""
                self._console.print(f"{left_out} earlier turns: segue log {name}\n", style="dim")
            for talk in talks[-_HISTORY_SHOWN:]:
                self._print(talk)

        self._above(show)

    def changed(self) -> None:
        if self._room is not None:
            self._shown.update(self._room.live)
            for name in [n for n, talk in self._shown.items() if self._is_gone(n, talk)]:
                del self._shown[name]
        self._app.invalidate()

    def finished(self, talk: Talk) -> None:
        def show() -> None:
            self._shown.pop(talk.turn, None)
            self._print(talk)

        self._above(show)

    def note(self, text: str) -> None:
        self._above(lambda: self._console.print(Text(clean(text), style="yellow")))

    # -- life -------------------------------------------------------------------------------------
    async def run(self, room: Room, place: str) -> None:
        """Show `room` until the user leaves; `place` says where we are connected."""
        self._room = room
        session = room.session
        self._console.print(
            Text.assemble(
                ("segue", "bold"), f" · session {session.name} · you are ",
                (session.device, f"bold {OWN_COLOUR}"),
            )
        )  # fmt: skip
        self._console.print(f"{place} · {session.model} · /help for commands\n", style="dim")
        spin = asyncio.create_task(self._spin(), name="spinner")
        following = asyncio.create_task(self._follow(room), name="follow")
        try:
            await self._app.run_async(handle_sigint=False)
        finally:
            if self._prints:
                await asyncio.wait(self._prints, timeout=1)
            for task in (spin, following, *self._tasks):
                task.cancel()
            await asyncio.gather(spin, following, *self._tasks, return_exceptions=True)
        if following.done() and not following.cancelled() and following.exception():
            raise following.exception() or AssertionError

    async def _follow(self, room: Room) -> None:
        try:
            await room.follow()
        except SegueError:
            self._leave()
            raise

    async def _spin(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            if self._shown:
                self._app.invalidate()

    def _leave(self) -> None:
        if self._app.is_running and not self._app.is_done:
            self._app.exit()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- input ------------------------------------------------------------------------------------
    def _accept(self, buffer: Buffer) -> bool:
        text = buffer.text.strip()
        if text.startswith("/"):
            self._command(*text.split(maxsplit=1))
        elif text and self._room is not None:
            self._start(self._room.say(text))
        return False

    def _command(self, name: str, argument: str = "") -> None:
        room = self._room
        assert room is not None
        if name in ("/quit", "/exit", "/q"):
            self._leave()
        elif name == "/stop":
            self._start(room.stop())
        elif name == "/help":
            self._above(lambda: self._console.print(f"{HELP}\n", style="dim", markup=False))
        elif name == "/plan":
            self._set_plan(room, argument)
        elif name == "/tokens":
            if argument.isdigit() and int(argument):
                room.options["max_tokens"] = int(argument)
                self.note(f"Replies have up to {int(argument)} tokens from now on.")
            else:
                self.note("Write /tokens and a number, for example /tokens 400.")
        else:
            self.note(f"There is no {name}. /help lists the commands.")

    def _set_plan(self, room: Room, name: str) -> None:
        try:
            room.options["plan"] = check_plan(name)
        except SegueError as error:
            self.note(str(error))
        else:
            chosen = room.options["plan"]
            self.note(f"Plan {chosen} from now on." if chosen else "The planner decides again.")

    def _keys(self) -> KeyBindings:
        keys = KeyBindings()

        @keys.add("c-c")
        def interrupt(event: KeyPressEvent) -> None:
            running = self._running()
            if running and self._stopping != running and self._room is not None:
                self._stopping = running
                self._start(self._room.stop())
                self._app.invalidate()
            elif self._buffer.text and not running:
                self._buffer.reset()
            else:
                self._leave()

        @keys.add("c-d")
        def end(event: KeyPressEvent) -> None:
            if not self._buffer.text:
                self._leave()

        return keys

    def _running(self) -> str:
        """The turn that runs now (others may wait behind it); "" where none does."""
        return next(iter(self._room.live), "") if self._room is not None else ""

    # -- drawing ----------------------------------------------------------------------------------
    def _build(self, keys: Input | None, output: Output) -> Application[None]:
        # asking for the cursor's place leaves "^[[12;1R" behind in slow terminals; not needed here
        if hasattr(output, "enable_cpr"):
            output.enable_cpr = False
        prompt = BeforeInput(lambda: [("class:own", f"{self._own()} › ")])
        field = Window(
            BufferControl(self._buffer, input_processors=[prompt]),
            wrap_lines=True,
            dont_extend_height=True,
        )
        return Application(
            layout=Layout(
                HSplit(
                    [
                        ConditionalContainer(
                            Window(FormattedTextControl(self._live), dont_extend_height=True),
                            filter=Condition(lambda: bool(self._shown)),
                        ),
                        Window(FormattedTextControl(self._status), height=1),
                        field,
                    ]
                ),
                focused_element=field,
            ),
            key_bindings=self._keys(),
            style=_STYLE,
            input=keys,
            output=output,
            min_redraw_interval=0.02,
            erase_when_done=True,
        )

    def _own(self) -> str:
        return self._room.session.device if self._room is not None else ""

    def _is_gone(self, name: str, talk: Talk) -> bool:
        """A turn that was refused disappears at once; one that ended stays until it is printed."""
        return self._room is not None and name not in self._room.live and not talk.reason

    def _live(self) -> StyleAndTextTuples:
        """Running turns, the newest lines of them where they are many."""
        size = self._app.output.get_size()
        lines: list[StyleAndTextTuples] = []
        for place, talk in enumerate(self._shown.values()):
            style = colour(talk.device, self._own())
            for line in self._wrap(heading(talk, self._own()).plain, size.columns):
                lines.append([(f"ansi{style}", line)])
            text = body(talk)
            lines += [[("", line)] for line in self._wrap(text, size.columns)] if text else []
            if not text:
                waits = talk.waiting or place
                wait = "waiting for the reply above" if waits else "thinking"
                lines.append([("class:dim", f"{self._frame()} {wait}")])
            lines.append([("", "")])
        out: StyleAndTextTuples = []
        for fragments in lines[-max(1, size.rows - _CHROME_ROWS) :]:
            out += [*fragments, ("", "\n")]
        if out:
            out.pop()
        return out

    def _wrap(self, text: str, width: int) -> list[str]:
        return [line.plain for line in Text(text).wrap(self._console, width)]

    def _frame(self) -> str:
        return _SPINNER[int(asyncio.get_running_loop().time() * 10) % len(_SPINNER)]

    def _status(self) -> StyleAndTextTuples:
        room = self._room
        parts = [room.transport if room is not None else "connecting"]
        running = self._running()
        if running and self._stopping == running:
            parts.append("stopping, once more leaves")
        elif running:
            parts.append("Ctrl-C stops")
        return [("class:dim", " · ".join(parts))]

    def _print(self, talk: Talk) -> None:
        self._console.print(heading(talk, self._own()))
        text = body(talk)
        if text:
            self._console.print(Text(text))
        style = "red" if talk.reason == "error" else "dim"
        self._console.print(Text(footer(talk) + "\n", style=style))

    def _above(self, show: Callable[[], None]) -> None:
        """Print above what lives; in order, at once where nothing is drawn yet."""
        if self._app.is_running:
            printing = asyncio.ensure_future(run_in_terminal(show))
            self._prints.add(printing)
            printing.add_done_callback(self._prints.discard)
        else:
            show()
