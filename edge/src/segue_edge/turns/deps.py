"""What every turn of this node shares; put together once, in `segue_edge.node`."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Executor
from dataclasses import dataclass

from segue_contract.chat import ChatTokenizer
from segue_contract.model.manifest import Manifest
from segue_contract.plan import Shape
from segue_edge.compute import ComputeThread
from segue_edge.planner.estimators import EdgeSpeeds
from segue_edge.turns.history import HistoryCache
from segue_edge.turns.ledger_file import LedgerFile
from segue_edge.turns.model_port import EdgeModelPort, PrefixCachePort
from segue_edge.turns.outbox import Outbox
from segue_edge.turns.warm import Warmer
from segue_edge.uplink.clouds import CloudSet
from segue_edge.uplink.sender import Encode


@dataclass(frozen=True)
class EdgeDeps:
    """`force`: the plan shape of `--plan`. `encode`: a block to frames in the codec of `recipe`."""

    model: EdgeModelPort
    manifest: Manifest
    recipe: str
    tokenizer: ChatTokenizer
    cache: PrefixCachePort
    compute: ComputeThread
    encoder: Executor
    encode: Encode
    clouds: CloudSet
    histories: HistoryCache
    speeds: EdgeSpeeds
    warmer: Warmer
    outbox: Outbox
    ledger: LedgerFile
    instance: str
    force: Shape | None = None

    def may_ship(self, accepted: Collection[str]) -> bool:
        """Whether KV goes to a cloud that accepts these recipes: our manifest must allow it."""
        return self.recipe in accepted and self.recipe in self.manifest.allowed_recipes()

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(self.manifest.end_tokens)
