"""What must hold, whatever fails: checked as the store writes, as devices are told, and at the end.

The log's entries are watched where they are written. `History` knows each entry that ever was
under its id, and the `lineage`: those entries that the store has not lost since.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from segue_contract.sync.ops import Frame, Op, Set, TurnEnded, TurnStarted, Unknown, decode_op
from segue_contract.sync.replica import Applied, Replica
from segue_contract.sync.state import SessionState
from tests.sim.process import Process
from tests.sim.redis_model import Stream
from tests.sim.store import Store
from tests.sim.world import World

Place = tuple[int, int]  # generation, offset


@dataclass
class Entry:
    place: Place
    data: bytes
    op: Op
    client: Process  # who appended it


@dataclass
class _Turn:
    tokens: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass
class SessionHistory:
    """One session's log, seen from outside."""

    ever: dict[Place, bytes] = field(default_factory=dict)
    lineage: list[Entry] = field(default_factory=list)
    ids: dict[str, Place] = field(default_factory=dict)  # of the lineage's ops
    turns: dict[str, _Turn] = field(default_factory=dict)
    lost: set[Place] = field(default_factory=set)  # entries that the store lost
    lost_at_s: float = -1.0  # when the store last lost entries

    def fold(self) -> SessionState:
        replica = Replica()
        for number, entry in enumerate(self.lineage, 1):
            applied = replica.apply_op(1, number, entry.op)
            assert applied is Applied.APPLIED
        return replica.state


@dataclass
class Ack:
    """An append that its device was told of."""

    device: str
    session: str
    place: Place
    op_id: str


class History:
    """All sessions of one run; checks each write at once."""

    def __init__(self, world: World, store: Store) -> None:
        self._world = world
        self._store = store
        self.sessions: dict[str, SessionHistory] = {}
        self.acks: list[Ack] = []
        self.owners: dict[tuple[str, str, int], Process] = {}
        store.wrote.append(self._wrote)
        store.changed.append(self._changed)

    def of(self, session: str) -> SessionHistory:
        return self.sessions.setdefault(session, SessionHistory())

    # -- the store writes ---------------------------------------------------------------------

    def _wrote(self, client: Process | None, command: tuple[bytes, ...]) -> None:
        if command[0].upper() != b"XADD" or client is None or not command[1].endswith(b":log"):
            return
        session = _session_of(command[1])
        generation, _, offset = command[2].partition(b"-")
        self._added(client, session, (int(generation), int(offset)), command[-1])

    def _added(self, client: Process, session: str, place: Place, data: bytes) -> None:
        world, history = self._world, self.of(session)
        op = decode_op(data)
        world.say("log", session, place, type(op).__name__, op.id, client.name)
        before = history.ever.setdefault(place, data)
        world.require(
            before == data,
            "Two entries under one generation and offset.",
            f"{session} {place}: {_shown(before)}, then {_shown(data)}",
        )
        tail = history.lineage[-1].place if history.lineage else (0, 0)
        world.require(
            place[1] == tail[1] + 1 and place[0] >= tail[0],
            "The log's offsets do not count on.",
            f"{session}: {place} after {tail}",
        )
        world.require(
            op.id not in history.ids,
            "One op is in the log twice.",
            f"{session} {op.id}: {history.ids.get(op.id)} and {place}",
        )
        history.ids[op.id] = place
        history.lineage.append(Entry(place, data, op, client))
        self._check_turn(client, session, history, op)

    def _check_turn(self, client: Process, session: str, history: SessionHistory, op: Op) -> None:
        if not isinstance(op, TurnStarted | Frame | TurnEnded):
            return
        world = self._world
        turn = history.turns.setdefault(op.turn, _Turn())
        if isinstance(op, TurnStarted):
            return
        owner = self.owners.setdefault((session, op.turn, op.epoch), client)
        world.require(
            owner is client,
            "Two owners under one turn epoch.",
            f"{session} {op.turn} epoch {op.epoch}: {owner} and {client}",
        )
        world.require(not turn.ended, "A turn goes on after its end.", f"{session} {op.id}")
        if isinstance(op, TurnEnded):
            turn.ended = True
            return
        world.require(
            op.index <= len(turn.tokens),
            "A frame leaves a hole in its reply.",
            f"{session} {op.id}: the log has {len(turn.tokens)} tokens",
        )
        pieces = tuple(chr(token) for token in op.tokens)
        world.require(op.pieces == pieces, "Text and tokens differ.", f"{session} {op.id}")
        turn.tokens[op.index :] = (
            op.tokens if op.next_index > len(turn.tokens) else (turn.tokens[op.index :])
        )

    # -- the store loses ----------------------------------------------------------------------

    def _changed(self, why: str) -> None:
        """The store was put back to what it kept: so is the lineage."""
        for session, history in self.sessions.items():
            stream = self._stream(session)
            last = stream.last if stream is not None and stream.last > (0, 0) else (0, 0)
            kept = [entry for entry in history.lineage if entry.place <= last]
            if len(kept) < len(history.lineage):
                self._world.say("lost", session, len(history.lineage) - len(kept))
                history.lost_at_s = self._world.now_s
                history.lost |= {entry.place for entry in history.lineage[len(kept) :]}
                history.lineage = kept
                history.ids = {entry.op.id: entry.place for entry in kept}
                history.turns.clear()
                self._forget_owners(session)
                for entry in kept:
                    self._replay(session, history, entry)

    def _forget_owners(self, session: str) -> None:
        """An epoch whose claim was lost is given again, in another generation."""
        for key in [key for key in self.owners if key[0] == session]:
            del self.owners[key]

    def _replay(self, session: str, history: SessionHistory, entry: Entry) -> None:
        op = entry.op
        if isinstance(op, Frame | TurnEnded):
            self.owners[session, op.turn, op.epoch] = entry.client
        if isinstance(op, TurnStarted | Frame | TurnEnded):
            turn = history.turns.setdefault(op.turn, _Turn())
            if isinstance(op, Frame):
                turn.tokens[op.index :] = op.tokens
            turn.ended = turn.ended or isinstance(op, TurnEnded)

    def _stream(self, session: str) -> Stream | None:
        for key, value in self._store.space.values.items():
            if key.endswith(b":log") and _session_of(key) == session:
                assert isinstance(value, Stream)
                return value
        return None

    # -- devices are told ---------------------------------------------------------------------

    def acknowledged(self, device: str, session: str, place: Place, op_id: str) -> None:
        """An append came back as a success."""
        self._world.say("ack", session, place, op_id)
        history = self.of(session)
        data = history.ever.get(place)
        kept = history.ids.get(op_id)  # its entry may be of a generation before the answer's
        self._world.require(
            (data is not None and decode_op(data).id == op_id)
            or (kept is not None and kept[1] == place[1] and kept[0] < place[0]),
            "An acknowledged op is not where its device was told.",
            f"{device} {session} {op_id} at {place}; there is {_shown(data)}",
        )
        self.acks.append(Ack(device, session, place, op_id))

    def saw(self, device: str, session: str, place: Place, op: Op) -> None:
        """A follower was given an entry."""
        data = self.of(session).ever.get(place)
        same = data is not None and (isinstance(op, Unknown) or decode_op(data) == op)
        self._world.require(
            same,
            "A device was given an entry that the log never had there.",
            f"{device} {session} {place}: {op}; there is {_shown(data)}",
        )

    def shown_durable(self, session: str, turn: str, tokens: list[int]) -> None:
        """An asker was told that the log holds these first tokens of its reply."""
        history = self.of(session)
        kept = history.turns[turn].tokens if turn in history.turns else []
        self._world.require(
            history.lost_at_s >= 0 or kept[: len(tokens)] == tokens,
            "Tokens are called durable that the log does not have.",
            f"{session} {turn}: {len(tokens)} shown, the log has {kept}",
        )

    # -- the end ------------------------------------------------------------------------------

    def check_acks(self) -> None:
        """Within a generation no acknowledged op is lost or moved."""
        for ack in self.acks:
            history = self.of(ack.session)
            there = history.ids.get(ack.op_id)
            if there is not None:
                self._world.require(
                    there[1] == ack.place[1] and there[0] <= ack.place[0],
                    "An acknowledged op moved.",
                    f"{ack}: now at {there}",
                )
                continue
            told = history.lineage[-1].place[0] if history.lineage else 0
            self._world.require(
                ack.place in history.lost and told != ack.place[0],
                "An acknowledged op is gone, and nobody was told.",
                f"{ack}; the log is at generation {told}",
            )

    def check_ended(self) -> None:
        for session, history in self.sessions.items():
            for name, turn in history.turns.items():
                self._world.require(turn.ended, "A turn has no end.", f"{session} {name}")


def _session_of(key: bytes) -> str:
    """Of segue:{tenant:session}:log."""
    return key.decode().split("{")[1].split("}")[0].split(":")[1]


def _shown(data: bytes | None) -> Any:
    if data is None:
        return "nothing"
    op = decode_op(data)
    return f"{type(op).__name__} {op.id}" + (f" {op.name}" if isinstance(op, Set) else "")
