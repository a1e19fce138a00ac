"""The edge's model: how its graphs are made, how they run, and the KV they leave.

export, builder, graph, smooth, quantise, exact, quality,  `segue model build`, once per model
  sensitivity
runtime, runner, kv, providers                             prefill and short decode
prefix_cache                                               KV blocks by id, pure
"""
