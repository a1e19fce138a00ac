"""One fenced, idempotent, server-sequenced log per session, in Redis or Valkey.

    port      what a store does, and its values
    log.lua   every change of a session is one atomic call: append.lua (ops), turns.lua (who runs
              one), session.lua (the rest), each behind log.lua
    scripts   this and the other scripts, each behind common.lua
    whole     the port's part for whole sessions
    news      the port's part that tells of tails; `changes` is the link for it
    keep.lua  whole sessions: deleted, made of an export; `keeper` calls it
    quota     what a session may hold
    known     what the store knows of a session besides its log, made of it
    keys      names in the store
    active    which sessions were written to of late, for the fan-out's sweep
    wire      commands, repeated until their deadline
    replicas  waiting for them, where a fail-over must not lose what was written
    routes    which server a command goes to: the one there is, or the Sentinels' primary,
    cluster   or the node of a Cluster that has its slot
    node      pooled connections to one server
    store     the port over wire and script; `rows` translates
    slices    large states encoded and decoded, a piece at a time
    reader    folded states and pages, kept at hand

Nothing here knows who follows a session, or how entries reach devices: that is `segue_cloud.log`.
"""
