"""The gRPC face of the cloud: Agent for devices, Decode for edge nodes."""
