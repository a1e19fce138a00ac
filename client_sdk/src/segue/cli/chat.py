"""`segue chat`: talk in a session; two terminals are two devices, each sees the other live."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from typing import Annotated, Any

import typer

from segue.cli.runner import run

app = typer.Typer(add_completion=False)

AddressOption = Annotated[
    list[str] | None,
    typer.Option(
        "--address", "-a", metavar="HOST:PORT",
        help="An edge node or the cloud; again for others to go to where one fails. "
        "By default SEGUE_URL, else as `segue login` said, else this machine's edge.",
    ),
]  # fmt: skip
DeviceOption = Annotated[
    str, typer.Option("--device", "-d", help="This device's name; by default this machine's.")
]


def default_device() -> str:
    """This machine's name, as far as it can be a device's."""
    name = re.sub(r"[^A-Za-z0-9-]", "", socket.gethostname().partition(".")[0]).strip("-")
    return name[:32] or "device"


@app.command()
def chat(
    session: Annotated[str, typer.Option("--session", "-s", help="Opened, or created.")] = "main",
    device: DeviceOption = "",
    address: AddressOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a reply at most.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from this share of likely tokens.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Of what is drawn; a fresh one each time.")
    ] = None,
    plan: Annotated[str, typer.Option(help="auto, edge, ship or text.")] = "auto",
) -> None:
    """Talk in a session. Start it twice with two --device names: each shows the other live."""
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "plan": plan,
    }
    run(talk(address, session, device or default_device(), options))


async def talk(
    addresses: list[str] | None, session_name: str, device: str, options: dict[str, Any]
) -> None:
    """Chat until the user leaves; without a terminal, until standard input ends."""
    import segue
    from segue.cli._room import Room

    async with segue.Client(addresses, device=device) as client:
        session = await client.session(session_name)
        session.run("?", **options)  # bad options are said now, not after the first message
        if sys.stdin.isatty() and sys.stdout.isatty():
            from segue.cli._chat_terminal import TerminalScreen

            terminal = TerminalScreen()
            room = Room(session, terminal, options)
            await terminal.run(room, f"{session.role} {session.instance} at {client.addresses[0]}")
            return
        from segue.cli._chat_plain import PlainScreen, plain

        screen = PlainScreen()
        room = Room(session, screen, options)
        following = asyncio.create_task(room.follow(), name="follow")
        talking = asyncio.create_task(_plain_after_history(plain(room, screen), room))
        try:
            await asyncio.wait({following, talking}, return_when=asyncio.FIRST_COMPLETED)
            done = talking if talking.done() else following
            done.result()
        finally:
            for task in (following, talking):
                task.cancel()
            await asyncio.gather(following, talking, return_exceptions=True)


async def _plain_after_history(talking: Any, room: Any) -> None:
    await room.arrived.wait()
    await talking
