"""The whole of Segue on one machine: starts the other programs as processes, imports none.

stack, parts, ready         the programs of `segue up`, and when they are ready (start with `stack`)
revival                     parts that end by themselves are started again
inspect, probes             what `segue doctor` finds and reaches
play, device, measure       the demo: devices, what they see, and how fast
"""
