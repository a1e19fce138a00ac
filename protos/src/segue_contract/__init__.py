"""What the three programs of Segue agree on: messages, ids, limits, errors, KV format, log ops.

Pure modules (no sockets, no clock, no event loop): everything but `transport`, `servers` and
`chat`, which are the shells that more than one program needs.
"""

__version__ = "0.1.0"
