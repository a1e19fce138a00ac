"""A turn's prompt from the log: which earlier turns are in it, and its token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from segue_cloud.turns.opening import TurnRequest
from segue_cloud.turns.owner import OwnerDeps
from segue_contract.sync.context import choose_context, seen
from segue_contract.sync.state import TurnState


async def prompt_begins(deps: OwnerDeps, earlier: Sequence[TurnState], request: TurnRequest) -> str:
    """`context_from` of a turn that is to begin after `earlier`: `choose_context`.

    Raises:
        InvalidArgument: no tokenizer can take the message.
    """
    return await asyncio.to_thread(
        choose_context,
        earlier,
        request.turn,
        deps.tokenizer,
        request.prompt,
        max_tokens=request.max_tokens,
        context=deps.max_context,
    )


async def encode_prompt(
    deps: OwnerDeps, turns: Sequence[TurnState], turn: str, prompt: str, context_from: str
) -> tuple[int, ...]:
    """Token ids of the prompt of `turn`; `turns`: those of the log before it."""
    kept = seen(turns, turn, context_from)
    return tuple(await asyncio.to_thread(deps.tokenizer.encode_conversation, kept, prompt))


async def encode_known_prompt(
    deps: OwnerDeps, turns: Sequence[TurnState], turn: TurnState
) -> tuple[int, ...]:
    """The same of one of the log's own `turns`."""
    earlier = turns[: turns.index(turn)]
    return await encode_prompt(deps, earlier, turn.turn, turn.prompt, turn.context_from)
