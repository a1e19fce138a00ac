"""The device API of an edge node: turns are served here, everything else by the cloud."""
