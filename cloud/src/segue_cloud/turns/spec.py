"""One turn as its owner gets it."""

from __future__ import annotations

from dataclasses import dataclass, field

from segue_cloud.turns.writer import TurnKey
from segue_contract.plan import Shape
from segue_contract.sync.ops import Op, Sampling
from segue_contract.sync.state import Cursor


@dataclass(frozen=True)
class OwnedTurn:
    """`made` and `made_pieces`: tokens of the reply that the log holds already (a take-over),
    `adopted` further ones that an edge knows and the log lacks. `blocks`: ids of the prompt's full
    blocks under the edge's recipe; the first `ship_blocks` of them come over the edge's stream.
    `via`: the edge, by its certificate's name, whose KV it may use; "": none is named.
    `started`: where the turn's first ops end in the log; `opening` are these ops."""

    key: TurnKey
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    shape: Shape
    blocks: tuple[bytes, ...] = ()
    ship_blocks: int = 0
    made: tuple[int, ...] = ()
    made_pieces: tuple[str, ...] = ()
    adopted: tuple[int, ...] = ()
    edge_cached_tokens: int = 0
    has_edge: bool = False
    via: str = ""
    started: Cursor = field(default_factory=Cursor)
    opening: tuple[Op, ...] = ()
