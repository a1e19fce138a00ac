"""Real servers as child processes: Valkey and an MQTT 5 broker, for a laptop and for tests.

Each is an async context manager that is ready when it is entered and gone when it is left, also
when this process is killed.
"""

from segue_contract.servers.broker import Broker
from segue_contract.servers.process import ChildProcess
from segue_contract.servers.valkey import Valkey

__all__ = ["Broker", "ChildProcess", "Valkey"]
