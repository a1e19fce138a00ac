"""Deterministic simulation of a whole Segue: the product's own code over a simulated world.

| module | what |
|---|---|
| `loop`, `process` | an asyncio event loop with virtual time; processes that crash and pause |
| `network` | links between processes: latency, loss of connections, partitions, half-open ones |
| `redis_model`, `lua` | the commands of the store, and the product's real Lua scripts over them |
| `store`, `broker` | a store and an MQTT broker as the product's libraries see them |
| `rpc_client`, `rpc_server` | gRPC as the product sees it: channels, calls, servers, handlers |
| `world` | one run: seed, trace, random numbers, clocks |
| `faults` | what goes wrong, drawn from the seed; a list that can be minimised |
| `invariants` | what must hold after every step and at the end |
| `scenarios` | who does what: devices on clouds |
| `patches`, `engine`, `cluster` | what of the outside is replaced; the programs as processes |
| `run`, `cli` | `scripts/sim` |
| `mutations` | faults planted in the product's code, each of which must be found |
"""
