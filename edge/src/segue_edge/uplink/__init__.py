"""The way to the cloud: which instance, its health and speed, the turn's stream, KV up.

clouds           all instances: channels, probes, what is known of each (start here)
rendezvous       their order for a session (pure)
stream, sender   one turn's stream; its KV blocks, encoded and sent
pacer            a rate that the uplink keeps to
goodput_probe    sizes for measuring a link (pure)
"""
