"""What every turn of this node shares; put together once, in `segue_edge.node`."""

from __future__ import annotations

from collections.abc import Callable
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


@dataclass(frozen=True)
class EdgeDeps:
    """`force`: the plan shape of `--plan`. `prefill_backlog`: prompt tokens waiting for prefill."""

    model: EdgeModelPort
    manifest: Manifest
    recipe: str
    tokenizer: ChatTokenizer
    cache: PrefixCachePort
    compute: ComputeThread
    encoder: Executor
    clouds: CloudSet
    histories: HistoryCache
    speeds: EdgeSpeeds
    warmer: Warmer
    outbox: Outbox
    ledger: LedgerFile
    prefill_backlog: Callable[[], int]
    instance: str
    force: Shape | None = None

    @property
    def end_tokens(self) -> frozenset[int]:
        return frozenset(self.manifest.end_tokens)
