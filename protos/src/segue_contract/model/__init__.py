"""A built model's directory: what both sides must agree on.

manifest   geometry, digests, recipes (start here)
gate       which KV codecs pass the quality budget (pure)
home       where built models are
seal       a build's last step: everything in place, then the manifest
progress   what a build says while it runs
"""
