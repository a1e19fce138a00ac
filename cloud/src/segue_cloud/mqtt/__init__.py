"""Fan-out over MQTT: `outbox` decides what goes out when (pure), `publisher` sends it, sealed with
the keys of `keys`."""
