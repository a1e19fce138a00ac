"""One fenced, idempotent, server-sequenced log per session, in Redis or Valkey.

    port      what a store does, and its values
    log.lua   every change of a session: one atomic call
    keys      names in the store
    wire      commands over pooled connections
    store     the port over wire and script; `rows` translates
    reader    folded states and pages, kept at hand

Nothing here knows who follows a session, or how entries reach devices: that is `segue_cloud.log`.
"""
