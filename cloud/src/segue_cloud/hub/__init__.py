"""Followers of sessions in this process, and how far the logs go.

`state` decides who has what to see (pure), `hub` runs it; `tails` is what is known of tails (pure),
`feed` keeps it true by what the store tells.
"""
