"""The way to the cloud: which instance, its health and speed, the turn's stream, KV up."""
