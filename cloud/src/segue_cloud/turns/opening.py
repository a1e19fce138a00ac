"""The first ops of a turn, from what was asked for, or from what the log says of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from segue_cloud.sessions.port import Bearer
from segue_contract.ids import SessionName, TurnName
from segue_contract.sync.ops import Op, Sampling, TurnStarted, UserMessage, request_digest
from segue_contract.sync.state import TurnState


@dataclass(frozen=True)
class TurnRequest:
    """What a device asked for, checked."""

    session: SessionName
    device: str
    turn: str
    prompt: str
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    wait: bool = True
    offline: bool = False  # served already, out of reach of the log
    edge: str = ""  # to which it is granted, by its certificate's name
    follows: str = ""  # and then: the last turn that its node knew
    bearer: Bearer | None = None  # the token that it was asked with

    @property
    def name(self) -> TurnName:
        return TurnName(self.session, self.turn)

    @property
    def digest(self) -> str:
        """What tells the same question, asked again, from another one under the same id."""
        return request_digest(self.prompt, self.max_tokens, self.sampling, self.stop)


def opening_ops(
    request: TurnRequest, *, model: str, weights: str = "", now_ms: int, context_from: str = ""
) -> tuple[Op, ...]:
    """user_message and turn_started of a turn that begins now."""
    return (
        UserMessage(
            id=f"{request.turn}.user",
            device=request.device,
            at_ms=now_ms,
            turn=request.turn,
            text=request.prompt,
        ),
        TurnStarted(
            id=f"{request.turn}.started",
            device=request.device,
            at_ms=now_ms,
            turn=request.turn,
            epoch=1,
            model=model,
            weights=weights,
            max_tokens=request.max_tokens,
            sampling=request.sampling,
            stop=request.stop,
            context_from=context_from,
            offline=request.offline,
            follows=request.follows,
            edge=request.edge,
        ),
    )


def opening_of(session: SessionName, turn: TurnState, *, now_ms: int) -> tuple[Op, ...]:
    """The same of a turn that the log has, for a log that may lose it."""
    request = TurnRequest(
        session=session,
        device=turn.device,
        turn=turn.turn,
        prompt=turn.prompt,
        max_tokens=turn.max_tokens,
        sampling=turn.sampling,
        stop=turn.stop,
        offline=turn.offline,
        follows=turn.follows,
        edge=turn.edge,
    )
    return opening_ops(
        request,
        model=turn.model,
        weights=turn.weights,
        now_ms=now_ms,
        context_from=turn.context_from,
    )
