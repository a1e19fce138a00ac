"""Who computes what of a turn. Pure: no clock, no I/O.

costs        what each shape of a turn would cost (start here)
plan         the choice among them
estimators   link and speeds, learned from measurements
ledger       what was foreseen beside what happened
"""
