"""The one line of JSON that a program prints on stdout when it serves, and its log lines.

{"event": "ready", "role": "edge", "host": "127.0.0.1", "port": 7411, "instance": "...",
 "seconds": 1.9, ...}
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from segue_contract.telemetry import EVENT_PREPARING, EVENT_READY

_MAX_LINE_CHARS = 160


@dataclass(frozen=True)
class Ready:
    """What a program said when it was ready. `seconds`: from its start to this line."""

    role: str
    host: str
    port: int
    instance: str = ""
    seconds: float = 0.0
    facts: dict[str, object] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


class _Line(msgspec.Struct):
    event: str
    role: str
    port: int
    host: str = "127.0.0.1"
    instance: str = ""
    seconds: float = 0.0


def parse_ready(line: str) -> Ready | None:
    """The ready record in `line`, or None where the line says something else."""
    try:
        record = msgspec.json.decode(line, type=_Line)
        facts = msgspec.json.decode(line, type=dict[str, object])
    except msgspec.MsgspecError:
        return None
    if record.event != EVENT_READY or not 0 < record.port <= 65535:
        return None
    known = set(_Line.__struct_fields__)
    return Ready(
        role=record.role,
        host=record.host,
        port=record.port,
        instance=record.instance,
        seconds=record.seconds,
        facts={name: value for name, value in facts.items() if name not in known},
    )


class _News(msgspec.Struct):
    event: str
    what: str = ""


def parse_news(line: str) -> str:
    """What a program that is not ready yet says that it does; "" where the line is another one."""
    try:
        record = msgspec.json.decode(line, type=_News)
    except msgspec.MsgspecError:
        return ""
    return record.what[:_MAX_LINE_CHARS] if record.event == EVENT_PREPARING else ""


def readable(line: str) -> str:
    """A log line as a person reads it: JSON records become "level event key=value ..."."""
    try:
        record = msgspec.json.decode(line, type=dict[str, object])
    except msgspec.MsgspecError:
        return line.rstrip()[:_MAX_LINE_CHARS]
    event = record.pop("event", "")
    level = record.pop("level", "")
    record.pop("timestamp", None)
    rest = " ".join(f"{name}={value}" for name, value in record.items())
    return " ".join(part for part in (f"{level}", f"{event}", rest) if part)[:_MAX_LINE_CHARS]
