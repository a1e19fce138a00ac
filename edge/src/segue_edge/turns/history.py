"""Conversations this node has seen, so that Begin sends only what is new. Bounded, LRU."""

from __future__ import annotations

from collections import OrderedDict

from segue_contract.ids import SessionName
from segue_contract.limits import EDGE_SESSION_CACHE
from segue_contract.sync.context import first_seen
from segue_contract.sync.state import TurnState
from segue_edge.uplink.clouds import Home


class SessionHistory:
    """One session's finished turns that the model sees: as many as fit its context.

    `confirmed` came from the log; `provisional` are turns this node served and the log may or may
    not have: they matter while the cloud is out of reach, and give way to the log's own.
    Those that wait in the outbox (`wait`) stay until they are delivered.
    `forgotten` turns lie before them, which no prompt will hold again.
    `known_digest` names the turns of the log that are known, as the cloud does.
    `held` are the token ids whose KV the cloud instance `held_by` is known to hold.
    `tenant`: as the cloud calls it; on an open loopback this node has no name for it.
    """

    def __init__(self) -> None:
        self.generation = 0
        self.known_digest = b""
        self.confirmed: list[TurnState] = []
        self.provisional: list[TurnState] = []
        self.forgotten = 0
        self.held: list[int] = []
        self.held_by = ""
        self.tenant = ""
        self._forgotten_last = ""
        self._waiting: set[str] = set()

    @property
    def known(self) -> bool:
        """Whether the conversation's beginning is known, so that it can go on without the log."""
        return self.generation > 0

    @property
    def known_turns(self) -> int:
        """How many finished turns of the log need not be sent to this node."""
        return self.forgotten + len(self.confirmed)

    @property
    def turns(self) -> list[TurnState]:
        return [*self.confirmed, *self.provisional]

    @property
    def newest(self) -> str:
        """Id of the last turn that this node knows of; "" for none."""
        turns = self.turns
        return turns[-1].turn if turns else self._forgotten_last

    def created(self, generation: int) -> None:
        """The session was created just now: its history is known to be empty."""
        if not self.known:
            self.generation = generation

    def merge(
        self, generation: int, first_turn: int, turns: list[TurnState], known_digest: bytes = b""
    ) -> bool:
        """Take a Begin reply; returns whether it changed what `turns` was before."""
        self.known_digest = known_digest
        before = [turn.turn for turn in self.turns]
        if generation != self.generation:
            self.confirmed, self.forgotten, self._forgotten_last = [], 0, ""
            self.generation = generation
        if not self.forgotten <= first_turn <= self.known_turns:
            self.confirmed, self.forgotten = [], first_turn
        self.confirmed = [*self.confirmed[: first_turn - self.forgotten], *turns]
        texts = {turn.turn: turn.tokens for turn in self.provisional}
        listed = {turn.turn for turn in self.confirmed}
        self.provisional = [
            turn
            for turn in self.provisional
            if turn.turn in self._waiting and turn.turn not in listed
        ]
        same = [turn.turn for turn in self.turns] == before
        return not (same and all(texts.get(t.turn, t.tokens) == t.tokens for t in turns))

    def forget(self, turn: str, context_from: str) -> None:
        """Drop what the model does not see from `turn` on."""
        before = first_seen(self.confirmed, turn, context_from)
        if before:
            self._forgotten_last = self.confirmed[before - 1].turn
        self.forgotten += before
        del self.confirmed[:before]

    def add(self, turn: TurnState) -> None:
        """A turn that this node served to its end."""
        if all(known.turn != turn.turn for known in self.turns):
            self.provisional.append(turn)

    def wait(self, turn: TurnState) -> None:
        """A turn that this node served and that waits for a cloud."""
        self._waiting.add(turn.turn)
        self.add(turn)

    def delivered(self, turn: str, as_shown: bool) -> None:
        """The log has a turn that waited; as it was shown, or otherwise."""
        self._waiting.discard(turn)
        if not as_shown:
            self.provisional = [known for known in self.provisional if known.turn != turn]

    def cloud_has(self, instance: str, prompt: list[int]) -> int:
        """Prompt tokens whose KV the instance should still hold."""
        if not instance or instance != self.held_by:
            return 0
        same = 0
        for mine, theirs in zip(prompt, self.held, strict=False):
            if mine != theirs:
                break
            same += 1
        return same

    def cloud_now_holds(self, instance: str, tokens: list[int]) -> None:
        self.held, self.held_by = tokens, instance


class HistoryCache:
    """Sessions by name, the least recently used forgotten first."""

    def __init__(self, capacity: int = EDGE_SESSION_CACHE) -> None:
        self._capacity = capacity
        self._sessions: OrderedDict[SessionName, SessionHistory] = OrderedDict()

    def of(self, session: SessionName) -> SessionHistory:
        """The session's history, empty where it is new here."""
        history = self._sessions.pop(session, None) or SessionHistory()
        self._sessions[session] = history
        while len(self._sessions) > self._capacity:
            self._sessions.popitem(last=False)
        return history

    def find(self, session: SessionName) -> SessionHistory | None:
        return self._sessions.get(session)

    def home(self, session: SessionName) -> Home:
        """The cloud that has the session's KV, as far as this node knows."""
        history = self.find(session)
        if history is None or not history.held:
            return Home()
        return Home(history.held_by, len(history.held))

    def forget(self, session: SessionName) -> None:
        self._sessions.pop(session, None)
