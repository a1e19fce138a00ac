"""What must be seen on a machine with a card, as steps of a few minutes: `scripts/card`.

main          the command: its arguments, what it prints, the JSON of all steps
packages      wheels for a machine without a network: packing them, and adding what is missing
plan          the steps, in order, with their limits
runner        one process a step, ended at its limit; a result whatever becomes of it
child         that process
exactness, decode, prefill, kv, attention, gpu_tests
              the steps: `run(report, quick)`, as a benchmark suite has it
"""
