"""One turn's stream, as every program writes and reads it. Pure.

events    what happens in a turn, as values: started, frame, durable, rewound, ended
wire      those values to and from protobuf; the only place that looks at a message's kind
from_log  the same values from log ops and from a folded turn
feed      the events of one turn, for any number of readers from any token on
merge     frames and previews by token index: what a reader shows, and takes back
text      a maker's tokens as text with stop strings, also where another maker began the reply

Start with `events`. Waiting readers of a feed are `segue_contract.transport.turn_feed`.
"""
