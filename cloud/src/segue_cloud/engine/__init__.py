"""The decode engine: a port, and a torch engine behind it.

policy, without torch    scheduler, sequence, admission, block_pool, placement, rates, stuck
loop                     worker (the port over it all), engine_thread, commands, streams
one step                 step_input, runner, model, attention, sampler, kv_pages, host_tier
weights                  weights, sources/ (what is read), convert and prepare (once per model)
other ways to compute    native/ (compiled, for CPUs), cuda/, tensor_parallel/

Start with `port`, then `scheduler`.
"""

from __future__ import annotations

import os

# Read once, when torch loads its OpenMP runtime. By default its threads spin while they wait for
# each other, which on a machine with other busy programs costs a time slice per operation: with a
# load of 5 on 2 cores a decode step took 200 to 1,100 ms spinning and 40 ms sleeping.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
