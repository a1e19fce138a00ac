"""The decode engine: a port, and a torch engine behind it."""

from __future__ import annotations

import os

# Read once, when torch loads its OpenMP runtime. By default its threads spin while they wait for
# each other, which on a machine with other busy programs costs a time slice per operation: with a
# load of 5 on 2 cores a decode step took 200 to 1,100 ms spinning and 40 ms sleeping.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
