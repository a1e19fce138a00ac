"""The outbox's file, whatever became of its bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from segue_edge.turns.offline.journal import Journal, StoredTurn
from segue_edge.turns.offline.turn import OfflineTurn
from tests.support.offline_turns import said


def stored(name: str) -> StoredTurn:
    return said(name).stored()


def journal(path: Path, *names: str) -> bytes:
    file = Journal(path)
    for name in names:
        file.add(stored(name))
    file.close()
    return path.read_bytes()


def names_in(path: Path) -> list[str]:
    file = Journal(path)
    names = [OfflineTurn.of(number, turn).asked.turn for number, turn in file.turns]
    file.close()
    return names


def test_any_torn_end_costs_at_most_the_turn_that_was_being_written(tmp_path: Path) -> None:
    path = tmp_path / "outbox"
    one = len(journal(path, "t1"))
    data = journal(path, "t2")
    for cut in range(12, len(data)):
        path.write_bytes(data[:cut])
        assert names_in(path) == (["t1"] if cut >= one else [])


def test_bytes_that_changed_are_noticed_and_kept_for_a_person(tmp_path: Path) -> None:
    path = tmp_path / "outbox"
    journal(path, "t1", "t2")
    data = bytearray(journal(path, "t3"))
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    damaged = tmp_path / "outbox.damaged"
    damaged.write_bytes(b"of an earlier time, for everybody")
    damaged.chmod(0o644)
    assert names_in(path) == ["t1"]
    assert damaged.read_bytes() == data
    assert damaged.stat().st_mode & 0o777 == 0o600


@given(st.binary(max_size=200))
def test_any_file_is_read_or_set_aside(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outbox"
        path.write_bytes(b"SEGUEOUT" + (1).to_bytes(4, "little") + data)
        assert names_in(path) == []
