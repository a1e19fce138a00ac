"""The gRPC face of the cloud.

agent      `Agent`, for devices; keeping is its part about sessions as wholes
decode     `Decode`, for edge nodes; run_stream is one turn's stream, history what an edge lacks
convert    messages to our own values and back: what a peer sent is checked here
follow_turn  a turn that another instance owns, as the log has it
facts      what the cloud says of itself to planners
"""
