"""A turn that was served offline, whole, and what its device is told of it."""

from __future__ import annotations

from dataclasses import dataclass

from segue_contract.errors import SegueError
from segue_contract.limits import TITLE_CHARS
from segue_contract.sync.ops import Usage
from segue_contract.transport.turn_feed import TurnFeed
from segue_contract.turn.events import Ended, Frame, MadeBy, Reason, Started
from segue_contract.v1 import agent_pb2 as pb
from segue_edge.turns.asked import Asked, Shown
from segue_edge.turns.offline.journal import StoredTurn

_TOKEN_BYTES = 8


@dataclass(frozen=True)
class OfflineTurn:
    """A whole turn as the device saw it.

    Attributes:
        prompt: its token ids as they were then.
        begun: it began in the log, and has no end there that this edge knows of.
        follows: the last turn that this node knew of the session before it; "" for none.
        number: its place in the file, 0 without one.
        refused: why the log will never have it; None while it waits.
    """

    asked: Asked
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    reason: Reason
    plan: bytes
    begun: bool = False
    follows: str = ""
    number: int = 0
    refused: SegueError | None = None

    @property
    def size(self) -> int:
        """Bytes that it takes, about, in memory as in the file."""
        text = sum(len(piece.encode()) for piece in self.pieces)
        ids = _TOKEN_BYTES * (len(self.prompt) + len(self.tokens))
        return self.asked.request.ByteSize() + text + ids + len(self.plan)

    def stored(self) -> StoredTurn:
        return StoredTurn(
            request=self.asked.request.SerializeToString(),
            tenant=self.asked.tenant,
            token=self.asked.token,
            prompt=self.prompt,
            tokens=self.tokens,
            pieces=self.pieces,
            reason=self.reason,
            plan=self.plan,
            begun=self.begun,
            follows=self.follows,
            refused_code=self.refused.code if self.refused is not None else "",
            refused_message=str(self.refused) if self.refused is not None else "",
        )

    @classmethod
    def of(cls, number: int, stored: StoredTurn) -> OfflineTurn:
        """Raises SegueError, ValueError or DecodeError where the request was none."""
        return cls(
            Asked.of(
                pb.RunTurnRequest.FromString(stored.request), stored.tenant, Shown(stored.token)
            ),
            stored.prompt,
            stored.tokens,
            stored.pieces,
            Reason(stored.reason),
            stored.plan,
            stored.begun,
            stored.follows,
            number,
            SegueError.of(stored.refused_code, stored.refused_message)
            if stored.refused_code
            else None,
        )

    def listed(self) -> pb.OfflineTurn:
        """For a device that opens the session."""
        refused = self.refused
        return pb.OfflineTurn(
            turn=self.asked.turn,
            device=self.asked.request.device,
            title=self.asked.request.prompt[:TITLE_CHARS],
            error_code=refused.code if refused is not None else "",
            error_message=str(refused) if refused is not None else "",
        )

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=len(self.prompt), completion_tokens=len(self.tokens))

    def replay(self) -> TurnFeed:
        """What its device was told, for one that comes back; and that the log refused it."""
        feed = TurnFeed()
        feed.publish(Started(self.asked.turn, 0))
        if self.tokens:
            feed.publish(Frame(0, 0, self.tokens, self.pieces, made_by=MadeBy.EDGE))
        refused = self.refused
        feed.publish(
            Ended(
                reason=self.reason if refused is None else Reason.ERROR,
                next_index=len(self.tokens),
                usage=self.usage,
                plan=self.plan,
                error_code=refused.code if refused is not None else "",
                error_message=str(refused) if refused is not None else "",
                durable=False,
            )
        )
        feed.close()
        return feed
