"""One device as a program of its own, so that it can be cut off like a real one.

    python -m segue.local.device ask    --node HOST:PORT --session S --device D --prompt P
    python -m segue.local.device follow --node HOST:PORT --session S --device D

It uses the public SDK and prints one JSON line for each thing that happened, with the time of
CLOCK_MONOTONIC, which all processes of a machine share:

    {"event": "asked" | "accepted" | "tokens" | "rewound" | "ended" | "joined" | "error", "at": s}
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence

import msgspec

from segue.client import Client
from segue.errors import SegueError
from segue.events import Ended, Entry, Frame, Rewound, Snapshot, Started, TurnEvent
from segue_contract.sync.ops import Frame as FrameOp
from segue_contract.sync.ops import TurnEnded, TurnStarted


class Happened(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of a device. `at` in seconds of CLOCK_MONOTONIC; `index` counts reply tokens."""

    event: str
    at: float
    turn: str = ""
    index: int = 0
    pieces: list[str] = []
    made_by: str = ""
    reason: str = ""
    text: str = ""


_decoder = msgspec.json.Decoder(Happened)


def parse(line: str) -> Happened | None:
    """What a device's line says; None where it is no such line (a warning of a library)."""
    try:
        return _decoder.decode(line)
    except msgspec.MsgspecError:
        return None


def say(event: Happened) -> None:
    """Print one line, at once."""
    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
    sys.stdout.flush()


async def ask(node: str, name: str, device: str, prompt: str, options: argparse.Namespace) -> None:
    """Run one turn to its end, telling every event."""
    async with Client(node, device=device, token="", tls_ca="") as client:
        session = await client.session(name)
        say(Happened(event="asked", at=time.monotonic()))
        running = session.run(
            prompt,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
            plan=options.plan,
        )
        async with running as turn:
            async for event in turn:
                if (told := asked_for(event, turn.id, time.monotonic())) is not None:
                    say(told)


def asked_for(event: TurnEvent, turn: str, now: float) -> Happened | None:
    """What the asking device makes of an event of its turn; None: nothing of interest here."""
    match event:
        case Started():
            return Happened(event="accepted", at=now, turn=turn)
        case Frame(index=index, pieces=pieces, made_by=made_by):
            return Happened(
                event="tokens", at=now, turn=turn, index=index, pieces=list(pieces), made_by=made_by
            )
        case Rewound(index=index):
            return Happened(event="rewound", at=now, turn=turn, index=index)
        case Ended(reason=reason):
            return Happened(event="ended", at=now, turn=turn, reason=reason)
        case _:
            return None


async def follow(node: str, name: str, device: str) -> None:
    """Tell what happens in a session, from a snapshot on, until killed."""
    async with Client(node, device=device, token="", tls_ca="") as client:
        session = await client.session(name)
        async for item in session.follow():
            if (event := heard(item, time.monotonic())) is not None:
                say(event)


def heard(item: Snapshot | Entry, now: float) -> Happened | None:
    """What a follower makes of an item of the log; None: nothing of interest here."""
    if isinstance(item, Snapshot):
        last = item.state.turns[-1] if item.state.turns else None
        return Happened(
            event="joined",
            at=now,
            turn=last.turn if last else "",
            text=last.text if last else "",
            index=len(last.tokens) if last else 0,
        )
    match item.op:
        case TurnStarted(turn=turn):
            return Happened(event="accepted", at=now, turn=turn)
        case FrameOp(turn=turn, index=index, pieces=pieces, made_by=made_by):
            return Happened(
                event="tokens", at=now, turn=turn, index=index, pieces=list(pieces), made_by=made_by
            )
        case TurnEnded(turn=turn, reason=reason):
            return Happened(event="ended", at=now, turn=turn, reason=reason)
        case _:
            return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 an error of Segue's, told as the last line."""
    parser = argparse.ArgumentParser(prog="python -m segue.local.device")
    parser.add_argument("what", choices=["ask", "follow"])
    parser.add_argument("--node", required=True)
    parser.add_argument("--session", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plan", default="")
    options = parser.parse_args(arguments)
    try:
        if options.what == "ask":
            asyncio.run(ask(options.node, options.session, options.device, options.prompt, options))
        else:
            asyncio.run(follow(options.node, options.session, options.device))
    except SegueError as error:
        say(Happened(event="error", at=time.monotonic(), text=str(error)))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
