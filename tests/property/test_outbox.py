"""The outbox: entries in order, bounded, and a head for whatever no message carried."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from segue_cloud.mqtt.outbox import Outbox
from segue_cloud.sessions.port import StoredEntry
from segue_contract.ids import SessionName
from segue_contract.limits import MAX_APPEND_OPS, MAX_MQTT_PAYLOAD_BYTES
from segue_contract.sync.state import Cursor
from segue_contract.topics import encode_log_message

KEYS = [SessionName("default", name) for name in "abc"]


def entries(first: int, count: int, size: int = 10) -> list[StoredEntry]:
    return [StoredEntry(Cursor(1, first + i), b"x" * size) for i in range(count)]


@given(seed=st.integers(0, 2**32), bound=st.integers(1, 30))
def test_heads_tell_the_tail_of_everything_appended(seed: int, bound: int) -> None:
    random = Random(seed)
    outbox = Outbox(max_entries=bound, head_delay_s=0.1)
    tails = dict.fromkeys(KEYS, 0)
    sent: dict[SessionName, list[int]] = {key: [] for key in KEYS}
    broker_heads: dict[SessionName, Cursor] = {}
    on_their_way: list[tuple[SessionName, Cursor]] = []
    now = 0.0
    for _ in range(100):
        now += random.uniform(0.0, 0.05)
        match random.randrange(5):
            case 0 | 1:
                key = random.choice(KEYS)
                count = random.randrange(1, 6)
                new = entries(tails[key] + 1, count)
                tails[key] += count
                outbox.add(key, new, now, online=random.random() < 0.8)
            case 2:
                if (batch := outbox.next_batch()) is not None:
                    offsets = range(batch.first.offset, batch.first.offset + len(batch.ops))
                    assert not sent[batch.session] or offsets[0] > sent[batch.session][-1]
                    sent[batch.session].extend(offsets)
            case 3:
                on_their_way += outbox.due_heads(now)
                while on_their_way:
                    key, cursor = on_their_way.pop(0)
                    if random.random() < 0.7:
                        broker_heads[key] = cursor
                        outbox.head_confirmed(key, cursor)
            case 4 if random.random() < 0.3:
                outbox.restart(now)
        outbox.check_integrity()
    outbox.restart(now)  # the last link stays up
    for key, cursor in outbox.due_heads(now):
        broker_heads[key] = cursor
        outbox.head_confirmed(key, cursor)
    assert {key: head.offset for key, head in broker_heads.items()} == {
        key: tail for key, tail in tails.items() if tail
    }
    assert outbox.empty
    total = sum(tails.values())
    assert sum(map(len, sent.values())) + outbox.dropped == total


def test_a_head_waits_until_it_is_quiet_but_not_for_ever() -> None:
    outbox = Outbox(head_delay_s=0.1, head_max_delay_s=1.0)
    now = 0.0
    for offset in range(1, 11):
        now = offset * 0.05
        outbox.add(KEYS[0], entries(offset, 1), now, online=True)
        assert outbox.due_heads(now) == []
    assert outbox.due_heads(now + 0.1) == [(KEYS[0], Cursor(1, 10))]
    assert outbox.next_head_s() is None
    outbox.add(KEYS[0], entries(11, 1), 1.0, online=True)
    outbox.head_confirmed(KEYS[0], Cursor(1, 10))
    assert not outbox.empty, "the broker has an older head"
    sent = []
    for offset in range(12, 40):
        now = 1.0 + (offset - 11) * 0.05
        outbox.add(KEYS[0], entries(offset, 1), now, online=True)
        sent += outbox.due_heads(now)
        outbox.check_integrity()
    assert [head.offset for _, head in sent] == [31], "once a second in a steady stream"


def test_messages_stay_within_the_brokers_bounds() -> None:
    outbox = Outbox()
    outbox.add(KEYS[0], entries(1, MAX_APPEND_OPS + 5), 0.0, online=True)
    outbox.add(KEYS[1], entries(1, 3, size=MAX_MQTT_PAYLOAD_BYTES // 2), 0.0, online=True)
    outbox.add(KEYS[2], entries(1, 1, size=MAX_MQTT_PAYLOAD_BYTES), 0.0, online=True)
    batches = []
    while (batch := outbox.next_batch()) is not None:
        payload = encode_log_message(batch.first.generation, batch.first.offset, batch.ops)
        assert len(payload) <= MAX_MQTT_PAYLOAD_BYTES
        batches.append((batch.session.session, batch.first.offset, len(batch.ops)))
    assert batches == [
        ("a", 1, MAX_APPEND_OPS),
        ("b", 1, 1),
        ("a", MAX_APPEND_OPS + 1, 5),
        ("b", 2, 1),
        ("b", 3, 1),
    ]
    assert outbox.dropped == 1, "an op too large for MQTT is read, not sent"


def test_a_cleared_head_is_not_cleared_once_the_session_lives_again() -> None:
    outbox = Outbox()
    outbox.clear_head(KEYS[0])
    outbox.clear_head(KEYS[1])
    outbox.add(KEYS[1], entries(1, 1), 0.0, online=True)
    assert outbox.take_clears() == [KEYS[0]]
    assert outbox.take_clears() == []


def test_only_confirmed_heads_are_forgotten() -> None:
    outbox = Outbox(max_heads=2)
    many = [SessionName("default", str(i)) for i in range(5)]
    for key in many:
        outbox.add(key, entries(1, 1), 0.0, online=True)
    assert len(outbox.due_heads(1.0)) == 5
    for key in many:
        outbox.head_confirmed(key, Cursor(1, 1))
        outbox.check_integrity()
    outbox.restart(2.0)
    assert [key for key, _ in outbox.due_heads(2.0)] == many[3:]


def test_even_unconfirmed_heads_are_bounded() -> None:
    outbox = Outbox(max_heads=2, max_unconfirmed=3)
    names = [SessionName("default", f"s{n}") for n in range(8)]
    for name in names:
        outbox.add_head(name, Cursor(1, 1), 0.0)
        outbox.check_integrity()
    assert outbox.due_heads(0.0) == [(name, Cursor(1, 1)) for name in names[-3:]]
    for name in names[-3:]:
        outbox.head_confirmed(name, Cursor(1, 1))
        outbox.check_integrity()
    outbox.clear_head(names[-1])
    outbox.check_integrity()
    outbox.restart(1.0)
    outbox.check_integrity()


def test_a_head_asked_for_while_the_same_is_on_its_way_is_sent_again() -> None:
    """A confirmation of the first is none of the second, which would wait confirmed."""
    outbox = Outbox()
    outbox.add_head(KEYS[0], Cursor(1, 3), 0.0)
    ((session, cursor),) = outbox.due_heads(0.0)
    outbox.add_head(session, cursor, 1.0)
    outbox.head_confirmed(session, cursor)
    outbox.check_integrity()
    assert outbox.due_heads(1.0) == [(session, cursor)]
    outbox.head_confirmed(session, cursor)
    outbox.check_integrity()
    assert outbox.empty
