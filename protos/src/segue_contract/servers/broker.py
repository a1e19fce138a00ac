"""An MQTT 5 broker as a child process: Mosquitto, else iotcore (rumqttd)."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import pwd
import shutil
import sys
import tempfile
from pathlib import Path

from segue_contract.errors import DeadlineExceeded, Internal, MissingExtra
from segue_contract.limits import (
    BROKER_INFLIGHT,
    BROKER_PROBE_PAUSE_S,
    BROKER_QUEUED_MESSAGES,
    BROKER_START_TIMEOUT_S,
    MAX_MQTT_PAYLOAD_BYTES,
)
from segue_contract.servers.lifetime import LocalServer
from segue_contract.servers.process import LOOPBACK, ChildProcess, start_on_port

# NODELAY: Nagle's algorithm alone may hold a frame back for 40 ms.
_MOSQUITTO = """\
listener {port} {host}
allow_anonymous true
set_tcp_nodelay true
persistence false
max_queued_messages {queued}
max_inflight_messages {inflight}
max_packet_size {size}
max_keepalive 65535
connection_messages false
log_dest stderr
log_type error
log_type warning
log_type notice
log_type information
{user}
"""

# iotcore speaks MQTT 5 only on a [v5.*] listener of a rumqttd configuration.
_RUMQTTD = """\
id = 0

[router]
id = 0
max_connections = 1024
max_outgoing_packet_count = 200
max_segment_size = 16777216
max_segment_count = 4

[v5.1]
name = "v5-1"
listen = "{host}:{port}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {size}
max_inflight_count = {inflight}
dynamic_filters = true
"""

_IOTCORE_CHILD = """\
import logging, sys
from iotcore.iotcore import IotCoreBroker
logging.basicConfig(level="WARNING")
logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
broker = IotCoreBroker(config_path=sys.argv[1])
broker.check_ports()
print("starting", flush=True)
broker.run_forever()
"""

# MQTT 5: protocol name and version, clean start, keep-alive 10 s, no properties, a client id.
_PROBE = b"\x00\x04MQTT\x05\x02\x00\x0a\x00" + b"\x00\x0bsegue-ready"
_CONNECT = bytes((0x10, len(_PROBE))) + _PROBE
_CONNACK = b"\x20"
_DISCONNECT = b"\xe0\x00"


def find_broker(kind: str = "") -> tuple[str, str]:
    """(kind, program): "mosquitto" where there is one, else "iotcore". `kind` asks for one.

    Raises:
        MissingExtra: none is there.
    """
    search = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
    if kind in ("", "mosquitto") and (found := shutil.which("mosquitto", path=search)):
        return "mosquitto", found
    if kind in ("", "iotcore") and importlib.util.find_spec("iotcore") is not None:
        return "iotcore", sys.executable
    raise MissingExtra(
        f"No {kind or 'MQTT 5'} broker was found.",
        hint='Install Mosquitto, or: pip install "segue[embedded]", or give --mqtt-url.',
        extra="embedded",
    )


class Broker(LocalServer):
    """`async with Broker.start() as broker:` a fresh broker on loopback, reachable at `url`."""

    def __init__(self, *, port: int = 0, kind: str = "") -> None:
        super().__init__(port)
        self.kind = kind
        self._asked = kind

    @classmethod
    def start(cls, *, port: int = 0, kind: str = "") -> Broker:
        """Port 0 picks a free one; `kind` asks for "mosquitto" or "iotcore", else the best."""
        return cls(port=port, kind=kind)

    @property
    def url(self) -> str:
        return f"mqtt://{LOOPBACK}:{self.port}"

    async def _begin(self) -> None:
        self.kind, program = find_broker(self._asked)
        folder = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="segue-broker-"))
        )

        async def on_port(port: int) -> ChildProcess:
            if self.kind == "mosquitto":
                return await _start_mosquitto(program, folder, port)
            return await _start_iotcore(program, folder, port)

        self._child, self.port = await start_on_port("The MQTT broker", self.port, on_port)


async def _start_mosquitto(program: str, folder: Path, port: int) -> ChildProcess:
    # As root it would change its user, and with it lose the wish to end with its parent.
    user = f"user {pwd.getpwuid(os.geteuid()).pw_name}" if os.geteuid() == 0 else ""
    config = folder / "mosquitto.conf"
    config.write_text(
        _MOSQUITTO.format(
            host=LOOPBACK,
            port=port,
            queued=BROKER_QUEUED_MESSAGES,
            inflight=BROKER_INFLIGHT,
            size=2 * MAX_MQTT_PAYLOAD_BYTES,
            user=user,
        )
    )
    child = await ChildProcess.start(
        "mosquitto",
        [program, "-c", str(config)],
        ready=lambda line: "mosquitto version" in line and "running" in line,
        timeout_s=BROKER_START_TIMEOUT_S,
    )
    # It says so a moment before its loop runs, and forgets a SIGTERM that comes in between.
    return await _until_answering(child, port)


async def _start_iotcore(program: str, folder: Path, port: int) -> ChildProcess:
    config = folder / "rumqttd.toml"
    config.write_text(
        _RUMQTTD.format(
            host=LOOPBACK, port=port, inflight=BROKER_INFLIGHT, size=2 * MAX_MQTT_PAYLOAD_BYTES
        )
    )
    child = await ChildProcess.start(
        "iotcore",
        [program, "-c", _IOTCORE_CHILD, str(config)],
        ready=lambda line: line == "starting",
        timeout_s=BROKER_START_TIMEOUT_S,
    )
    # It prints nothing when it listens.
    return await _until_answering(child, port)


async def _until_answering(child: ChildProcess, port: int) -> ChildProcess:
    """Wait until the broker accepts an MQTT 5 client; end it where it does not."""
    try:
        async with asyncio.timeout(BROKER_START_TIMEOUT_S):
            while not await _accepts_clients(port):
                if child.returncode is not None:
                    raise Internal(
                        f"{child.name} ended before it was ready.",
                        hint=child.log_tail(5),
                        log=child.log_tail(),
                    )
                await asyncio.sleep(BROKER_PROBE_PAUSE_S)
    except BaseException as error:
        await child.stop()
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(
                f"{child.name} did not answer in time.", log=child.log_tail()
            ) from None
        raise
    return child


async def _accepts_clients(port: int) -> bool:
    """Whether a CONNECT gets a CONNACK."""
    try:
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
    except OSError:
        return False
    try:
        writer.write(_CONNECT)
        answer = await reader.read(1)
        writer.write(_DISCONNECT)
        await writer.drain()
    except OSError:
        return False
    finally:
        writer.close()
    return answer == _CONNACK
