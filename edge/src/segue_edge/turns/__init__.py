"""A turn on the edge, from what a device asked to its end.

registry   the turns of this node, by session and id: started once, joined by the same question
asked      what a device asked for, checked
run        one turn's life: begin, plan, serve, remember
planning   from what this node knows to the planner's inputs, and the plan
state/     what the edge does, whatever happens: a pure machine of signals and instructions
executor   performs its instructions, and brings it the signals
cloud/     where a turn begins, and its streams to the clouds
compute/   what it computes here: prefill, tokens, warm-ups
offline/   whole turns that wait for a cloud
history    the conversations that this node knows
measure    what happened, in seconds, tokens and bytes
closing    what is left to do at the end: remember, learn, write down
ledger_file  one line per turn on disk
"""
