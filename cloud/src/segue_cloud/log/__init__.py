"""The session log as the rest of the cloud sees it.

`session_log.SessionLog` joins what lies below: the store (`sessions/`), the reader that folds
sessions, the followers in this process (`hub/`) and the fan-out (`mqtt/`). Nothing below knows it.
"""
