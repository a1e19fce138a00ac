"""Turns that this node served while no cloud was there, until the log has them.

turn     one of them, whole
outbox   the queues, one per session; what is reserved, delivered or refused, and when
journal  the same turns in a file, so that a restart loses none
deliver  one of them on its way into the log
"""
