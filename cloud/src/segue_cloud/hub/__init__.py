"""Followers of sessions in this process: `state` decides who has what to see, `hub` runs it."""
