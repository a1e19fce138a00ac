"""The whole of Segue on one machine: starts the other programs as processes, imports none.

stack, parts, ready         the programs of `segue up`, and when they are ready (start with `stack`)
inspect, probes             what `segue doctor` finds and reaches
play, device, measure       the demo: devices, what they see, and how fast
"""
