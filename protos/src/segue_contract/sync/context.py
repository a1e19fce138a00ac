"""What of a conversation the model sees: whole turns fall out, the oldest first, once it is full.

Cloud and edge decide by the same rule from the same log; the cloud's decision stands, in
`turn_started`. The cut moves seldom: then it frees half of the context, so that the kept part is
the beginning of many prompts to come and its KV is used again.

Pure: the tokenizer is given.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Protocol

from segue_contract.sync.state import TurnState, heard

# More than any known template adds to a message, and to an empty conversation (its own system
# message, today's date). Only to know without counting that a conversation is small.
_TEMPLATE_TOKENS_PER_TURN = 64
_TEMPLATE_TOKENS = 512


class Encoder(Protocol):
    """As `segue_contract.chat.ChatTokenizer`."""

    def encode_conversation(self, turns: Sequence[TurnState], prompt: str) -> list[int]:
        """Token ids of the whole prompt; no more of them with fewer turns."""
        ...


def seen(earlier: Sequence[TurnState], turn: str, context_from: str) -> list[TurnState]:
    """The turns of `earlier` that the prompt of `turn` holds, oldest first.

    `context_from`: id of the first turn that the model sees, `turn` itself where it sees no other;
    empty, or a turn that the log lost: everything.
    """
    return heard(earlier[first_seen(earlier, turn, context_from) :])


def first_seen(earlier: Sequence[TurnState], turn: str, context_from: str) -> int:
    """How many of `earlier` lie before the cut, and are in no prompt to come."""
    return len(earlier) if context_from == turn else _index(earlier, context_from)


def choose_context(
    earlier: Sequence[TurnState],
    turn: str,
    encoder: Encoder,
    prompt: str,
    *,
    max_tokens: int,
    context: int,
) -> str:
    """From which turn on the model sees the conversation in `turn`; empty: from its beginning.

    The cut of the turn before stays while prompt and reply fit. Else it moves forward, to where
    the prompt fills half of the context at the most. A reply is given up to half of the context. A
    message that is too long alone moves nothing: it fails, and the next one finds what was there.

    Args:
        earlier: all turns of the log before this one. What a turn without an end may still say
            counts as said.
        prompt: the new message.
        max_tokens: of the reply.
        context: tokens that the model takes, prompt and reply together.

    Raises:
        InvalidArgument: no tokenizer can take the message.
    """
    before = next((one.context_from for one in reversed(earlier) if one.context_from), "")
    start = _index(earlier, before)
    unsaid = sum(max(0, one.max_tokens - len(one.tokens)) for one in earlier if not one.ended)
    room = context - min(max_tokens, context // 2) - unsaid

    def tokens(first: int) -> int:
        return len(encoder.encode_conversation(heard(earlier[first:]), prompt))

    if tokens_at_most(earlier[start:], prompt) <= room or tokens(start) <= room:
        return before
    if tokens(len(earlier)) >= context:
        return before
    # A turn without an end is no place for the cut: an edge does not know it.
    starts = [index for index in range(start + 1, len(earlier)) if earlier[index].ended]
    place = bisect_left(starts, True, key=lambda first: tokens(first) + unsaid <= context // 2)
    return earlier[starts[place]].turn if place < len(starts) else turn


def tokens_at_most(turns: Sequence[TurnState], prompt: str) -> int:
    """More tokens than a prompt of these has: a token of byte-level BPE has at least a byte."""
    content = sum(_size(one.prompt) + max(len(one.tokens), _size(one.text)) for one in heard(turns))
    template = _TEMPLATE_TOKENS + _TEMPLATE_TOKENS_PER_TURN * (len(turns) + 1)
    return content + _size(prompt) + template


def _size(text: str) -> int:
    return len(text.encode(errors="replace"))


def _index(turns: Sequence[TurnState], turn: str) -> int:
    return next((index for index, one in enumerate(turns) if one.turn == turn), 0)
