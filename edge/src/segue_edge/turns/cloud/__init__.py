"""A turn and the clouds: where it begins, and the one stream to a cloud that counts at a time.

begin   claim the turn in the log, learn what this node lacks of the conversation, or go offline
spec    what a cloud is told of a turn, as its stream is opened
side    opening the stream, sending tokens and KV over it; taking over at the next cloud
successor  another cloud that gets ready, where this one leaves or may be lost
link    one such stream, read: what the cloud says, as signals of the turn
"""
