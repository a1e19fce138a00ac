"""Turns that this instance owns: who may begin one, how it runs, and what the log gets of it.

manager    all turns of the instance: begins them, keeps the running ones, finds them again
begin      claims (one turn a session, others wait in the store), opening (the first ops), prompts,
           places (how many at once)
run        owner (a turn's whole life), progress (who makes the next token), decoding (the engine's
           part), intake (KV from the edge), spec (what the owner is given)
log        writer (tokens into the log, once, under an epoch), frames, report (the plan's ledger)
go on      takeover (from an owner that is gone), recovery (orphans are looked for), patience
ports      what a turn needs of the session log

Readers of a turn get `segue_contract.turn` events from its owner's feed, or from the log
(`segue_cloud.rpc.follow_turn`). Start with `owner`, then `manager`.
"""
