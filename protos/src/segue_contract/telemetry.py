"""Names of metrics and log events that more than one part writes or reads.

Prometheus conventions: base units, `_total` for counters.
"""

from __future__ import annotations

from typing import Final

# -- metrics ----------------------------------------------------------------------------------
TURNS_RUNNING: Final = "segue_turns_running"
ENGINE_STEP: Final = "segue_engine_step_seconds"
ENGINE_BATCH: Final = "segue_engine_batch_sequences"
ENGINE_PAGES_FREE: Final = "segue_engine_pages_free"
ENGINE_PREFIX_HITS: Final = "segue_engine_prefix_hit_tokens_total"
STORE_WAITS: Final = "segue_store_replica_waits_total"  # result (confirmed, short, none)
KV_CHECKS: Final = "segue_kv_checks_total"  # result (right, wrong)

# -- structured log events --------------------------------------------------------------------
EVENT_READY: Final = "ready"
EVENT_PREPARING: Final = "preparing"  # before it, where that takes long; field `what`
EVENT_TURN: Final = "turn"
EVENT_PROVIDER: Final = "execution_provider"
