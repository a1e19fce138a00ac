"""The files of a Mosquitto that Segue administers: who connects shows a login, and reads what it
was given and nothing else. Pure: bytes in, text out.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from segue_contract import base64url
from segue_contract.limits import (
    BROKER_CONNECTIONS,
    BROKER_INFLIGHT,
    BROKER_QUEUED_BYTES,
    BROKER_QUEUED_MESSAGES,
    MAX_MQTT_PAYLOAD_BYTES,
)
from segue_contract.topics import ROOT

CLOUD_USER = "segue-cloud"
_ITERATIONS = 101  # as Mosquitto's own tools: the password is 256 random bits, nothing to guess

_CONFIG = """\
# Mosquitto for Segue: who connects shows a login; `segue cloud --mqtt-login` gives devices theirs.
per_listener_settings false
allow_anonymous false
plugin {plugin}
plugin_opt_config_file {logins}

listener {port} {host}
{tls}
set_tcp_nodelay true
persistence false
max_connections {connections}
max_queued_messages {queued}
max_queued_bytes {queued_bytes}
max_inflight_messages {inflight}
max_packet_size {size}
"""


@dataclass(frozen=True, slots=True)
class BrokerFiles:
    """`config`: mosquitto.conf. `logins`: what its dynamic-security plugin reads, and writes from
    then on. `login`: the clouds', a file for --mqtt-login."""

    config: str
    logins: str = field(repr=False)
    login: str = field(repr=False)


def broker_files(
    folder: Path,
    *,
    host: str,
    port: int,
    plugin: Path,
    certificate: Path | None,
    key: Path | None,
    random_bytes: Callable[[int], bytes],
) -> BrokerFiles:
    """Of a broker whose files will lie in `folder`; without a certificate it speaks no TLS."""
    password = base64url.encode(random_bytes(32))
    tls = f"certfile {certificate}\nkeyfile {key}\n" if certificate is not None else ""
    config = _CONFIG.format(
        plugin=plugin,
        logins=folder / "logins.json",
        host=host,
        port=port,
        tls=tls,
        connections=BROKER_CONNECTIONS,
        queued=BROKER_QUEUED_MESSAGES,
        queued_bytes=BROKER_QUEUED_BYTES,
        inflight=BROKER_INFLIGHT,
        size=2 * MAX_MQTT_PAYLOAD_BYTES,
    )
    return BrokerFiles(config, _logins(password, random_bytes(12)), f"{CLOUD_USER}:{password}\n")


def _logins(password: str, salt: bytes) -> str:
    derived = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ITERATIONS)
    rules = [
        ("publishClientSend", "$CONTROL/dynamic-security/#"),
        ("publishClientReceive", "$CONTROL/dynamic-security/#"),
        ("subscribePattern", "$CONTROL/dynamic-security/#"),
        ("publishClientSend", f"{ROOT}/#"),
    ]
    acls = [{"acltype": kind, "topic": topic, "allow": True} for kind, topic in rules]
    return json.dumps(
        {
            "defaultACLAccess": {
                "publishClientSend": False,
                "publishClientReceive": True,
                "subscribe": False,
                "unsubscribe": True,
            },
            "clients": [
                {
                    "username": CLOUD_USER,
                    "textName": "The clouds: they publish, and give devices their logins.",
                    "password": base64.b64encode(derived).decode(),
                    "salt": base64.b64encode(salt).decode(),
                    "iterations": _ITERATIONS,
                    "roles": [{"rolename": CLOUD_USER}],
                }
            ],
            "roles": [{"rolename": CLOUD_USER, "acls": acls}],
        },
        indent=2,
    )
