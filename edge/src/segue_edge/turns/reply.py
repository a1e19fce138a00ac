"""The reply as this node knows it: tokens by index, which of them are durable. Pure.

Previews that the edge made and frames from the log meet here. Whatever comes twice is shown once;
where the log has other tokens than the preview had, the preview is taken back from there.
"""

from __future__ import annotations

from segue_contract.errors import InvalidArgument
from segue_contract.v1 import agent_pb2 as pb


class Reply:
    """Attributes:
    tokens, pieces: the reply so far, previews included.
    durable: tokens before this index are in the log.
    edge_made: how many of the tokens this node made.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.durable = 0
        self.edge_made = 0

    @property
    def next_index(self) -> int:
        return len(self.tokens)

    def preview(self, tokens: tuple[int, ...], pieces: tuple[str, ...]) -> pb.TurnEvent:
        """Tokens that this edge just made: shown at once, not durable yet."""
        frame = pb.TokenFrame(
            epoch=self.epoch,
            index=self.next_index,
            tokens=tokens,
            pieces=pieces,
            durable=False,
            made_by="edge",
        )
        self.tokens.extend(tokens)
        self.pieces.extend(pieces)
        self.edge_made += len(tokens)
        return pb.TurnEvent(frame=frame)

    def accept(self, frame: pb.TokenFrame) -> list[pb.TurnEvent]:
        """A durable frame from the cloud, as the events that a device has yet to see.

        Raises:
            InvalidArgument: it leaves a gap, or its tokens come without their text.
        """
        if len(frame.tokens) != len(frame.pieces):
            raise InvalidArgument("The cloud sent tokens without their text.")
        if frame.index > self.next_index:
            raise InvalidArgument(
                f"The cloud sent token {frame.index}; {self.next_index} is the next one."
            )
        self.epoch = max(self.epoch, frame.epoch)
        events: list[pb.TurnEvent] = []
        end = frame.index + len(frame.tokens)
        same = self._same_until(frame)
        if same < min(end, self.next_index):
            events.append(self.rewind(same))
        if same > self.durable:
            events.append(self.mark_durable(same, frame.offset))
        if end > same:
            events.append(self._append(frame, same))
        return events

    def mark_durable(self, next_index: int, offset: int) -> pb.TurnEvent:
        """The log holds tokens before `next_index`."""
        self.durable = max(self.durable, min(next_index, self.next_index))
        return pb.TurnEvent(durable=pb.TurnDurable(next_index=self.durable, offset=offset))

    def rewind(self, index: int) -> pb.TurnEvent:
        """Take back the previews from `index` on."""
        del self.tokens[index:]
        del self.pieces[index:]
        self.edge_made = min(self.edge_made, index)
        self.durable = min(self.durable, index)
        return pb.TurnEvent(rewound=pb.TurnRewound(epoch=self.epoch, index=index))

    def _same_until(self, frame: pb.TokenFrame) -> int:
        """First index at which the frame says something new or something else."""
        for position, token in enumerate(frame.tokens):
            index = frame.index + position
            if index >= self.next_index or self.tokens[index] != token:
                return index
        return frame.index + len(frame.tokens)

    def _append(self, frame: pb.TokenFrame, start: int) -> pb.TurnEvent:
        skip = start - frame.index
        rest = pb.TokenFrame(
            epoch=frame.epoch,
            index=start,
            tokens=frame.tokens[skip:],
            pieces=frame.pieces[skip:],
            durable=True,
            offset=frame.offset,
            made_by=frame.made_by,
        )
        self.tokens.extend(rest.tokens)
        self.pieces.extend(rest.pieces)
        self.durable = self.next_index
        return pb.TurnEvent(frame=rest)
