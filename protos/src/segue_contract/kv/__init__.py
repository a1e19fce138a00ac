"""KV hand-over: from arrays to bytes of one stream and back. No sockets, no clock, no torch.

layout     a block's shape, its recipe and its identity
steps      the ladder of codec steps and the sizes of a payload
kernels    the numpy passes: rounding, scales, nibbles, half floats
quantize   arrays <-> payload bytes of some layers
frame      payloads <-> frames: header, checksums, commit record
assembler  bytes as they come off a stream -> committed blocks
"""
