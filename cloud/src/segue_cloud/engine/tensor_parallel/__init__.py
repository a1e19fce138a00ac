"""One engine over several processes: each rank holds some KV heads and their share of the weights.

engine thread (rank 0)                      rank process (1 .. N-1)
LeadRunner ── a step, a block (Unix socket) ──► Rank
Runner over shard 0 ◄── partial sums, logits (gloo or NCCL) ──► Runner over shard r
"""
