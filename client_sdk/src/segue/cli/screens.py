"""Two devices side by side while a turn runs; plain text where no terminal shows it."""

from __future__ import annotations

import time

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from segue.local.play import Screen

_LINES = 10  # of a reply are shown while it grows
_PER_SECOND = 12
_EDGE_STYLE = "cyan"  # tokens that the edge made
_SHOWN_PROMPT_CHARS = 160


class DemoView:
    """The watcher of the play: scenes as headings, turns as two live panels."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._scenes = 0
        self._live: Live | None = None
        self._screens: tuple[Screen, ...] = ()
        self._began = 0.0

    def scene(self, title: str) -> None:
        self._scenes += 1
        self._console.print()
        self._console.print(f"[bold]{self._scenes}  {escape(title)}[/]")

    def told(self, text: str, *, good: bool) -> None:
        mark = "[green]✓[/]" if good else "[red]✗[/]"
        self._console.print(f"   {mark} {escape(text)}")

    def begin(self, prompt: str, screens: tuple[Screen, ...]) -> None:
        asker = next(screen.name for screen in screens if screen.role == "asks")
        words = " ".join(prompt.split())
        if len(words) > _SHOWN_PROMPT_CHARS:
            words = words[:_SHOWN_PROMPT_CHARS].rsplit(" ", 1)[0] + " ..."
        line = Text.from_markup(f"[dim]{asker}:[/] [italic]{escape(words)}[/]")
        self._console.print(Padding(line, (0, 3)))
        self._screens = screens
        self._began = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=self._panels,
                console=self._console,
                refresh_per_second=_PER_SECOND,
            )
            self._live.start()

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            return
        longest = max(self._screens, key=lambda screen: len(screen.seen.at))
        for screen in self._screens:
            self._console.print(f"   [dim]{screen.name}: {_status(screen)}[/]")
        self._console.print(Padding(Text(longest.seen.text.strip(), style="italic"), (0, 3)))

    def _panels(self) -> RenderableType:
        grid = Table.grid(expand=True, padding=(0, 1))
        width = max(20, self._console.width // len(self._screens) - 6)
        for _ in self._screens:
            grid.add_column(ratio=1)
        grid.add_row(*(_panel(self._console, screen, width) for screen in self._screens))
        return grid


def _panel(console: Console, screen: Screen, width: int) -> Panel:
    gone = bool(screen.note)
    lines = _reply(screen).wrap(console, width)[-_LINES:]
    lines.extend([Text("")] * (_LINES - len(lines)))
    return Panel(
        Text("\n").join(lines),
        title=f"[bold]{screen.name}[/] [dim]{screen.role}[/]",
        title_align="left",
        subtitle=f"[red]{screen.note}[/]" if gone else f"[dim]{_status(screen)}[/]",
        subtitle_align="left",
        border_style="red" if gone else "dim",
    )


def _reply(screen: Screen) -> Text:
    seen, text = screen.seen, Text()
    for piece, by in zip(seen.pieces, seen.made_by, strict=True):
        text.append(piece, style=_EDGE_STYLE if by == "edge" else "")
    return text


def _status(screen: Screen) -> str:
    if screen.note:
        return screen.note
    seen = screen.seen
    if seen.reason:
        return f"{len(seen.at)} tokens, ended ({seen.reason})"
    if not seen.at:
        return "waits for the first token"
    return f"{len(seen.at)} tokens, {seen.tokens_per_s:.0f}/s"
