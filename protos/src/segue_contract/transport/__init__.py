"""The shells that all three programs need around gRPC, MQTT and logs. Not a pure part."""
