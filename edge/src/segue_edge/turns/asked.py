"""One turn as a device asked for it, checked before anybody works on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from segue_contract.checks import check_run
from segue_contract.errors import TurnConflict
from segue_contract.ids import SessionName, TurnName, check_id
from segue_contract.plan import Shape
from segue_contract.sync.ops import Sampling
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.planner.plan import parse_force


@dataclass
class Shown:
    """The newest token that the turn's device showed; "" on an open loopback."""

    token: str = field(default="", repr=False)
    expires_s: float = 0.0  # Unix seconds; 0: not known any more


@dataclass(frozen=True)
class Asked:
    """`force`: the plan shape that the request itself demands.

    Attributes:
        tenant: the caller's; no request names one.
        shown: changes as the device renews its token: what goes on is asked for with the new one.
    """

    request: pb.RunTurnRequest
    sampling: Sampling
    stop: tuple[str, ...]
    force: Shape | None
    tenant: str
    shown: Shown = field(default_factory=Shown)

    @property
    def token(self) -> str:
        return self.shown.token

    def renew(self, device: str, shown: Shown) -> None:
        """Its device shows a token that is valid for longer; another device's is none for it."""
        if device == self.request.device and shown.expires_s > self.shown.expires_s:
            self.shown.token, self.shown.expires_s = shown.token, shown.expires_s

    @property
    def session(self) -> SessionName:
        return SessionName(self.tenant, self.request.session)

    @property
    def turn(self) -> str:
        return self.request.turn

    @property
    def key(self) -> TurnName:
        return TurnName(self.session, self.turn)

    def check_same(
        self, prompt: str, max_tokens: int, sampling: Sampling, stop: Sequence[str]
    ) -> None:
        """Raises TurnConflict: the turn of this id, asked for so, is another question."""
        mine = (self.request.prompt, self.request.max_tokens, self.sampling, self.stop)
        if mine != (prompt, max_tokens, sampling, tuple(stop)):
            raise TurnConflict(
                f"Turn {self.turn} of session {self.request.session} was asked for something else.",
                hint="Give each question an id of its own; the same id joins the same turn.",
                turn=self.turn,
            )

    def check_joins(self, known: Asked) -> None:
        """Raises TurnConflict: `known` has this turn's id and is another question."""
        self.check_same(known.request.prompt, known.request.max_tokens, known.sampling, known.stop)

    @classmethod
    def of(cls, request: pb.RunTurnRequest, tenant: str, shown: Shown | None = None) -> Asked:
        """Raises InvalidArgument, EmptyPrompt, PromptTooLong or BadSampling."""
        check_id(request.session, "session")
        check_id(request.device, "device")
        check_id(request.turn, "turn")
        wire = request.sampling
        sampling = Sampling(
            temperature=wire.temperature,
            top_p=wire.top_p or 1.0,  # 0 on the wire: not set
            top_k=wire.top_k,
            min_p=wire.min_p,
            seed=wire.seed,
        )
        stop = tuple(request.stop)
        check_run(request.prompt, request.max_tokens, sampling, stop)
        force = parse_force(request.plan)
        return cls(request, sampling, stop, force, tenant, shown or Shown())
