"""Fan-out over MQTT, and who may read it.

outbox     what goes out when (pure)
publisher  sends it, sealed with the keys of `keys`
one_broker all instances of a store use one
dynsec     the commands of Mosquitto's dynamic security
logins     each device's login there, made at the pace of `login_pace` (pure), and its end
"""
