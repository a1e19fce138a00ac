"""The whole of Segue on one machine: starts the other programs as processes, imports none."""
