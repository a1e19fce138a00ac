"""The session log's content, on every side.

ops       the entries, and their bytes
state     what a log folds into
branches  which of a session's turns were said offline beside others
export    a session as one file
chain     the log's digest, for comparing
context   what of a conversation the model sees
replica   entries in any order, with gaps and repeats, to the state they mean
"""
