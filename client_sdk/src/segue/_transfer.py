"""Exports and imports: a session as one file, over a node's streams."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from segue._nodes import EOF, Nodes
from segue.events import Imported
from segue_contract.errors import InvalidArgument, OutcomeUnknown, SessionBusy, Unreachable
from segue_contract.ids import check_id
from segue_contract.limits import EXPORT_PART_BYTES, EXPORT_TIMEOUT_S, MAX_EXPORT_BYTES
from segue_contract.sync.export import Export, ExportReader
from segue_contract.sync.state import Cursor
from segue_contract.v1 import agent_pb2 as pb

_TRIES = 3  # of an export: a node may go, and a session may be compacted while it is read


async def export_session(nodes: Nodes, session: str, file: Path) -> Export:
    """`Client.export_session`."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        for attempt in range(1, _TRIES + 1):
            try:
                found = await _receive(nodes, session, part)
                break
            except (SessionBusy, Unreachable):
                if attempt == _TRIES:
                    raise
        part.replace(file)
        return found
    except OSError as error:
        raise InvalidArgument(
            f"The file {file} cannot be written: {error.strerror}.", hint="Name another one."
        ) from error
    finally:
        part.unlink(missing_ok=True)


async def _receive(nodes: Nodes, session: str, part: Path) -> Export:
    """All of it in `part`, on the disk, and found right."""
    reader = ExportReader()
    node = await nodes.connect()
    stub = await nodes.stub(node)
    request = pb.ExportSessionRequest(session=check_id(session, "session"))
    total_s = nodes.options.timeout.total
    call = node.keep(stub.ExportSession(request, timeout=total_s or EXPORT_TIMEOUT_S))
    try:
        async with nodes.calling(node):
            with part.open("wb") as out:
                while (message := await call.read()) is not EOF:
                    reader.feed(message.data)
                    out.write(message.data)
                out.flush()
                await asyncio.to_thread(os.fsync, out.fileno())
    finally:
        call.cancel()
    return await asyncio.to_thread(reader.finish)


async def import_session(nodes: Nodes, file: Path, session: str) -> Imported:
    """`Client.import_session`."""
    found, data = await asyncio.to_thread(_read, file)
    name = check_id(session or found.head.session, "session")

    async def parts() -> AsyncIterator[pb.ImportPart]:
        yield pb.ImportPart(session=name)
        for start in range(0, len(data), EXPORT_PART_BYTES):
            yield pb.ImportPart(data=data[start : start + EXPORT_PART_BYTES])

    node = await nodes.connect()
    stub: Any = await nodes.stub(node)
    total_s = nodes.options.timeout.total
    call = node.keep(stub.ImportSession(parts(), timeout=total_s or EXPORT_TIMEOUT_S))
    try:
        async with nodes.calling(node):
            reply: pb.ImportSessionReply = await call
    except Unreachable as error:
        raise OutcomeUnknown(
            f"The connection broke while {name} was imported.",
            hint="It is there as a whole, or not at all: list the sessions, then try again.",
        ) from error
    finally:
        call.cancel()
    return Imported(reply.session, Cursor(reply.tail.generation, reply.tail.offset), reply.turns)


def _read(file: Path) -> tuple[Export, bytes]:
    """Raises BadExport, InvalidArgument."""
    try:
        with file.open("rb") as source:
            data = source.read(MAX_EXPORT_BYTES + 1)
    except OSError as error:
        raise InvalidArgument(
            f"The file {file} cannot be read: {error.strerror}.", hint="Check its name."
        ) from error
    reader = ExportReader()
    reader.feed(data)
    return reader.finish(), data
