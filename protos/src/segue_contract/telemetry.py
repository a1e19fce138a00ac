"""Names of metrics and log events, so that dashboards and code cannot drift apart.

Prometheus conventions: base units, `_total` for counters. Labels are listed beside each name.
"""

from __future__ import annotations

from typing import Final

# -- both programs ----------------------------------------------------------------------------
BUILD_INFO: Final = "segue_build_info"  # version, role
TURNS: Final = "segue_turns_total"  # role, shape, reason
TURNS_RUNNING: Final = "segue_turns_running"  # role
REFUSALS: Final = "segue_refusals_total"  # role, code
TTFT: Final = "segue_time_to_first_token_seconds"  # role, made_by
INTER_TOKEN: Final = "segue_inter_token_seconds"  # role
TOKENS: Final = "segue_tokens_total"  # role, kind (prompt, completion)

# -- edge -------------------------------------------------------------------------------------
PREFILL_RATE: Final = "segue_edge_prefill_tokens_per_second"
EDGE_CACHE_BYTES: Final = "segue_edge_kv_cache_bytes"
EDGE_CACHE_HITS: Final = "segue_edge_kv_cache_hit_tokens_total"
KV_SHIPPED: Final = "segue_kv_shipped_bytes_total"
LINK_RTT: Final = "segue_link_round_trip_seconds"
LINK_GOODPUT: Final = "segue_link_goodput_bytes_per_second"
PLAN_REGRET: Final = "segue_plan_regret_seconds"  # shape

# -- cloud ------------------------------------------------------------------------------------
ENGINE_STEP: Final = "segue_engine_step_seconds"
ENGINE_BATCH: Final = "segue_engine_batch_sequences"
ENGINE_PAGES_FREE: Final = "segue_engine_pages_free"
ENGINE_PREFIX_HITS: Final = "segue_engine_prefix_hit_tokens_total"
KV_RECEIVED: Final = "segue_kv_received_bytes_total"
KV_REJECTED: Final = "segue_kv_rejected_blocks_total"  # code
LOG_APPEND: Final = "segue_log_append_seconds"
LOG_APPENDS: Final = "segue_log_entries_total"  # status (ok, dup, stale, gap)
FANOUT_PUBLISHED: Final = "segue_fanout_published_total"
FANOUT_DROPPED: Final = "segue_fanout_dropped_total"

# -- structured log events --------------------------------------------------------------------
EVENT_READY: Final = "ready"
EVENT_PREPARING: Final = "preparing"  # before it, where that takes long; field `what`
EVENT_TURN: Final = "turn"
EVENT_PROVIDER: Final = "execution_provider"
