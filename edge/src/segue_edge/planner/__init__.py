"""Who computes what of a turn: costs, the choice, estimates, the ledger. Pure: no clock, no I/O."""
