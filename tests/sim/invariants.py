"""What must hold, whatever fails: checked as the store writes, as devices are told, and at the end.

The log's entries are watched where they are written. `History` knows each entry that ever was
under its id, and the `lineage`: those entries that the store has not lost since.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from segue_contract.sync.ops import (
    Frame,
    Op,
    Set,
    TurnEnded,
    TurnStarted,
    Unknown,
    decode_op,
)
from segue_contract.sync.replica import Applied, Replica
from segue_contract.sync.state import SessionState
from tests.sim.process import Process
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
    """One session's log, seen from outside.

    Attributes:
        tail: the last offset that the log gave.
        holed: the store threw entries away and kept what counts them. Nobody has to notice before
            somebody reads there; then the log goes on behind a state of what is left.
    """

    ever: dict[Place, Entry] = field(default_factory=dict)
    tail: int = 0
    holed: bool = False
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
        entry = Entry(place, data, op, client)
        before = history.ever.setdefault(place, entry)
        world.require(
            before.data == data,
            "Two entries under one generation and offset.",
            f"{session} {place}: {_shown(before)}, then {_shown(entry)}",
        )
        last = history.lineage[-1].place[0] if history.lineage else 0
        world.require(
            place[1] == history.tail + 1 and place[0] >= last,
            "The log's offsets do not count on.",
            f"{session}: {place} after {last} {history.tail}",
        )
        history.tail = place[1]
        # What came behind a hole may be gone as well once it is mended.
        world.require(
            op.id not in history.ids or history.holed,
            "One op is in the log twice.",
            f"{session} {op.id}: {history.ids.get(op.id)} and {place}",
        )
        history.ids.setdefault(op.id, place)
        history.lineage.append(entry)
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
        world.require(
            not turn.ended or history.holed, "A turn goes on after its end.", f"{session} {op.id}"
        )
        if isinstance(op, TurnEnded):
            turn.ended = True
            return
        world.require(
            op.index <= len(turn.tokens) or history.holed,
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
        """The store was put back to what it kept, or threw keys away: so is the lineage."""
        for session, history in self.sessions.items():
            kept = [history.ever[place] for place in self._places(session)]
            gone = {entry.place for entry in history.lineage} - {entry.place for entry in kept}
            unknown = _key(session, "meta") not in self._store.space.values
            if gone or unknown:  # devices are told then that there is no such session
                self._world.say("lost", session, len(gone))
                history.lost_at_s = self._world.now_s
                history.lost |= gone
            history.tail = self._tail(session)
            history.holed = history.holed or history.tail > (kept[-1].place[1] if kept else 0)
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

    def _places(self, session: str) -> list[Place]:
        """Of the entries that the store has now."""
        stream = self._store.space.values.get(_key(session, "log"))
        return list(stream.ids) if stream is not None else []

    def _tail(self, session: str) -> int:
        """Where the log goes on: where what is known of it is gone, behind what is left of it."""
        values = self._store.space.values
        known = values.get(_key(session, "meta"))
        if known is not None:
            return int(known[b"tail"])
        folded = values.get(_key(session, "snapshot"), b"0 0").split(b"\n")[0].split(b" ")[1]
        return max([int(folded), *(offset for _, offset in self._places(session))])

    # -- devices are told ---------------------------------------------------------------------

    def acknowledged(self, device: str, session: str, place: Place, op_id: str) -> None:
        """An append came back as a success."""
        self._world.say("ack", session, place, op_id)
        history = self.of(session)
        there = history.ever.get(place)
        kept = history.ids.get(op_id)  # its entry may be of a generation before the answer's
        self._world.require(
            (there is not None and there.op.id == op_id)
            or (kept is not None and kept[1] == place[1] and kept[0] < place[0]),
            "An acknowledged op is not where its device was told.",
            f"{device} {session} {op_id} at {place}; there is {_shown(there)}",
        )
        self.acks.append(Ack(device, session, place, op_id))

    def saw(self, device: str, session: str, place: Place, op: Op) -> None:
        """A follower was given an entry."""
        there = self.of(session).ever.get(place)
        same = there is not None and (isinstance(op, Unknown) or there.op == op)
        self._world.require(
            same,
            "A device was given an entry that the log never had there.",
            f"{device} {session} {place}: {op}; there is {_shown(there)}",
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
            if history.holed:
                continue
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
            for name, turn in history.turns.items() if not history.holed else ():
                self._world.require(turn.ended, "A turn has no end.", f"{session} {name}")


def _key(session: str, name: str) -> bytes:
    return f"segue:{{default:{session}}}:{name}".encode()


def _session_of(key: bytes) -> str:
    """Of segue:{tenant:session}:log."""
    return key.decode().split("{")[1].split("}")[0].split(":")[1]


def _shown(entry: Entry | None) -> Any:
    if entry is None:
        return "nothing"
    op = entry.op
    return f"{type(op).__name__} {op.id}" + (f" {op.name}" if isinstance(op, Set) else "")
