"""The engine's part of a reply: its tokens as text, until their end or a stop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from segue_cloud.engine.port import Engine, EngineOutput, EngineTurn
from segue_contract.chat import ChatTokenizer
from segue_contract.errors import Internal
from segue_contract.turn.events import Reason
from segue_contract.turn.text import ReplyText

Add = Callable[[tuple[int, ...], tuple[str, ...]], None]


async def decode(
    engine: Engine,
    tokenizer: ChatTokenizer,
    turn: EngineTurn,
    *,
    stop: Sequence[str],
    stopping: asyncio.Event,
    add: Add,
    on_output: Callable[[EngineOutput], None],
) -> str:
    """Compute the rest of a reply; returns the reason of its end.

    Args:
        stop: strings that end the reply and are left out of it.
        stopping: ends it with "cancelled".
        add: told the tokens that may be shown, in order.

    Raises:
        SegueError: what the engine raised.
    """
    text = ReplyText(tokenizer, stop, turn.made)
    outputs = engine.submit(turn)
    stopped = asyncio.create_task(stopping.wait())
    step: asyncio.Future[EngineOutput | None] | None = None
    try:
        while True:
            step = asyncio.ensure_future(anext(outputs, None))
            await asyncio.wait({step, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                return Reason.CANCELLED
            output = step.result()
            if output is None:
                raise Internal("The engine ended a turn without a reason.")
            on_output(output)
            scan = text.push(output.tokens)
            add(scan.tokens, scan.pieces)
            if scan.stopped:
                return Reason.STOP
            if output.finished:
                rest = text.flush()
                add(rest.tokens, rest.pieces)
                return output.finished
    finally:
        stopped.cancel()
        if step is not None:  # a generator can only be closed while nobody waits in it
            step.cancel()
            await asyncio.gather(step, return_exceptions=True)
        await leave(outputs)


async def leave(iterator: object) -> None:
    """Cancel an engine's turn that nobody reads any more."""
    close = getattr(iterator, "aclose", None)
    if close is not None:
        await close()
