"""The session log's content, on every side.

ops       the entries, and their bytes
state     what a log folds into
branches  which of a session's turns were said offline beside others
replica   entries in any order, with gaps and repeats, to the state they mean
"""
