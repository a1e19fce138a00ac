"""Which slot of a Cluster a command belongs to, and which node serves it."""

from __future__ import annotations

import pytest

from segue_cloud.sessions.cluster import read_slots, slot_of
from segue_cloud.sessions.keys import SessionKeys, index_key, key_slot
from segue_cloud.sessions.scripts import Script
from segue_contract.ids import SessionName


def test_the_slot_of_a_command() -> None:
    keys = SessionKeys.of(SessionName("t", "s"))
    script = Script("return 1")
    assert slot_of(script.call(keys.all, "open")) == key_slot("{t:s}")
    assert slot_of(("ZADD", index_key("t"), 1, "s")) == key_slot("{t}")
    assert slot_of(("TIME",)) is None
    with pytest.raises(AssertionError, match="2 slots"):
        slot_of(script.call([keys.log, "elsewhere"]))


def test_the_map_of_slots() -> None:
    reply = [[0, 1, [b"a", 7, b"id"]], [2, 2, [b"", 8, b"id"], [b"r", 9, b"id"]], [3, 4, [b"?", 1]]]
    assert read_slots(reply, ("seed", 6)) == {0: ("a", 7), 1: ("a", 7), 2: ("seed", 8)}
