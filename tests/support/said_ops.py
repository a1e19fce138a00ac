"""The ops with which a turn begins, as tests of what is shown say them."""

from __future__ import annotations

from segue_contract.sync import ops


def begins(
    turn: str, device: str = "phone", prompt: str = "Hello?", follows: str | None = None
) -> tuple[ops.Op, ops.Op]:
    """`follows`: of a turn that was said offline."""
    return (
        ops.UserMessage(id=f"{turn}u", turn=turn, device=device, text=prompt),
        ops.TurnStarted(
            id=f"{turn}s", turn=turn, epoch=1, offline=follows is not None, follows=follows or ""
        ),
    )
