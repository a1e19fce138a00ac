"""What of a conversation the model sees: never too much, seldom changed, never more again."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from segue_contract.sync.context import choose_context, first_seen, seen, tokens_at_most
from segue_contract.sync.state import TurnState

CONTEXT = 4000


class Bytes:
    """One token per byte, three more per message."""

    def encode_conversation(self, turns: Sequence[TurnState], prompt: str) -> list[int]:
        said = sum(len(turn.prompt) + len(turn.tokens) + 6 for turn in turns)
        return [0] * (said + len(prompt) + 6)


messages = st.one_of(st.integers(1, 900), st.integers(1, 900), st.integers(1, 2 * CONTEXT))
asked = st.tuples(messages, st.integers(0, 700), st.integers(1, 2 * CONTEXT))


@given(st.lists(asked, max_size=60))
def test_a_conversation_without_end(wanted: list[tuple[int, int, int]]) -> None:
    encoder = Bytes()
    turns: list[TurnState] = []
    cut = 0

    def size_from(first: int, name: str, prompt: str) -> int:
        return len(encoder.encode_conversation(seen(turns[first:], name, ""), prompt))

    for number, (size, reply, max_tokens) in enumerate(wanted):
        name, prompt = f"t{number}", "x" * size
        context_from = choose_context(
            turns, name, encoder, prompt, max_tokens=max_tokens, context=CONTEXT
        )
        start = first_seen(turns, name, context_from)
        kept = seen(turns, name, context_from)
        tokens = len(encoder.encode_conversation(kept, prompt))
        alone = len(encoder.encode_conversation([], prompt))
        assert cut <= start, "what was forgotten came back"
        room = min(max_tokens, CONTEXT // 2)
        if alone >= CONTEXT or size_from(cut, name, prompt) + room <= CONTEXT:
            assert start == cut, "it moved without need"
        else:
            assert tokens <= CONTEXT // 2 or not kept
            if start - 1 > cut:  # no more fell out than had to
                assert size_from(start - 1, name, prompt) > CONTEXT // 2
        if alone < CONTEXT:
            assert tokens < CONTEXT, "a message that fits was refused"
        assert tokens <= tokens_at_most(kept, prompt)
        cut = start
        failed = tokens >= CONTEXT
        made = 0 if failed else min(reply, max_tokens, CONTEXT - tokens)
        turns.append(
            TurnState(
                turn=name,
                prompt=prompt,
                tokens=[1] * made,
                pieces=["y"] * made,
                reason="error" if failed else "stop",
                max_tokens=max_tokens,
                context_from=context_from,
            )
        )


def test_what_a_running_turn_may_still_say_counts_and_it_is_no_place_for_the_cut() -> None:
    turns = [
        TurnState(turn="a", prompt="x" * 1000, tokens=[1], pieces=["y"], reason="stop"),
        TurnState(turn="b", prompt="x" * 500, max_tokens=1500),
    ]

    def choose(max_tokens: int) -> str:
        return choose_context(turns, "c", Bytes(), "hi", max_tokens=max_tokens, context=CONTEXT)

    assert choose(900) == ""
    assert choose(1200) == "c"


def test_a_cut_that_the_log_lost_shows_everything() -> None:
    turns = [TurnState(turn="a", prompt="x", tokens=[1], pieces=["y"], reason="stop")]
    assert seen(turns, "b", "lost") == turns
    assert seen(turns, "b", "b") == []
