"""How a turn reads: the words and styles that terminal and plain output share. Pure."""

from __future__ import annotations

import re
import zlib

from rich.text import Text

from segue.cli._room import Talk

HELP = """\
/stop          stop the running reply, whoever asked for it (or Ctrl-C)
/plan NAME     force who computes what: auto, edge, ship or text
/tokens N      how long a reply may be
/help          this list
/quit          leave (or Ctrl-D); a running reply goes on without you"""

OWN_COLOUR = "cyan"
_COLOURS = ("magenta", "yellow", "green", "blue")
# C0 and C1 controls but newline and tab: a reply must not steer the terminal.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(text: str) -> str:
    """`text` without control characters."""
    return _CONTROLS.sub("", text)


def colour(device: str, own: str) -> str:
    """Each device has its colour, the same on every screen but one's own."""
    if device == own:
        return OWN_COLOUR
    return _COLOURS[zlib.crc32(device.encode()) % len(_COLOURS)]


def duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def heading(talk: Talk, own: str) -> Text:
    """ "phone › Plan a day in Paris." """
    style = colour(talk.device, own)
    return Text.assemble((f"{talk.device or '?'} › ", f"bold {style}"), (clean(talk.prompt), style))


def footer(talk: Talk) -> str:
    """Who made the first token, how soon, how fast, how many, by which plan."""
    timing = talk.timing
    parts = []
    if talk.beside:
        parts.append(f"a branch, said offline beside {talk.beside} of others")
    elif talk.offline:
        parts.append("said offline")
    if talk.reason == "cancelled":
        parts.append("stopped")
    elif talk.reason == "length":
        parts.append("cut at the token limit")
    elif talk.reason == "error":
        parts.append(f"failed: {clean(talk.error) or 'no reason given'}")
    if timing.first_token_by:
        maker = f" by {timing.first_token_by}" if timing.first_token_by != "?" else ""
        parts.append(f"first token{maker} in {duration(timing.first_token_s)}")
    elif talk.plan is not None and talk.plan.first_token_by:
        parts.append(f"first token by {talk.plan.first_token_by}")
    if timing.tokens_per_s:
        parts.append(f"{timing.tokens_per_s:.0f} tokens/s")
    if timing.tokens:
        parts.append(f"{timing.tokens} token{'s' if timing.tokens != 1 else ''}")
    if talk.plan is not None:
        parts.append(f"plan {talk.plan.shape}")
    if talk.cached_tokens:
        parts.append(f"{talk.cached_tokens} tokens reused")
    return " · ".join(parts)


def body(talk: Talk) -> str:
    """The reply so far, without the blank lines that models begin and end with."""
    return clean(talk.text).strip("\n").rstrip()
