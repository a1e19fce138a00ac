"""Benchmarks: they print figures and assert none. `scripts/bench SUITE` runs one."""
