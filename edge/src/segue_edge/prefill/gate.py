"""The quality gate: what the edge's KV costs the reply, per graph and per codec step.

A window is `context` tokens and the `scored` ones after them. The edge's graph prefills the
context, its KV goes through the codec as it would travel, and the exact model reads the scored part
on it, and once more on its own KV. Both see the same text, so they are compared by position:

    agreement              share of positions where both would choose the same token
    mean_kl                mean over positions of KL(own || with the edge's KV), nats
    cross_entropy_change   mean of -log p(the text's next token), with the edge's KV minus own
    relative_accuracy      how often the likeliest token is the text's next: with that KV / own
    first_token_agreement  share of windows where the graph's own first token is the exact model's

Windows begin `scored` tokens apart at least: contexts may overlap, no position is scored twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segue_contract.errors import InvalidArgument
from segue_contract.kv.layout import BLOCK_TOKENS, KvBlock, KvGeometry
from segue_contract.kv.quantize import decode_block, encode_block
from segue_contract.kv.steps import codec_named
from segue_contract.model.manifest import Quality
from segue_edge.prefill.kv import Floats, PastKv
from segue_edge.prefill.quality import Judge

CONTEXT, SCORED = 512, 256  # tokens of a window
WINDOWS = BUILD_WINDOWS = 20

_PART_ROWS = 8  # of logits: 1.5 MB where the vocabulary has 49,152 tokens

# logits after the last of some tokens, and their KV, as one graph makes them
Side = Callable[[Sequence[int]], tuple[Floats, PastKv]]


@dataclass(frozen=True)
class Split:
    """Sizes of a window: `context` tokens are prefilled, the next `scored` are scored."""

    context: int
    scored: int

    def needed(self, windows: int) -> int:
        """Tokens of text that so many windows take."""
        return self.context + windows * self.scored


@dataclass(frozen=True)
class Score:
    """Of one window, one graph and one codec; counts are of positions."""

    positions: int
    agreeing: int
    right: int
    own_right: int
    kl: float
    cross_entropy_change: float
    first_agrees: bool


def split_for(context_tokens: int) -> Split:
    """512 + 256 tokens, or less in the same proportion where the model's context is shorter."""
    context = min(CONTEXT, context_tokens * 2 // 3 // BLOCK_TOKENS * BLOCK_TOKENS)
    if context == 0:
        raise InvalidArgument(
            f"The model's context of {context_tokens} tokens is too short to measure quality.",
            hint=f"It takes {3 * BLOCK_TOKENS // 2} tokens at least.",
        )
    return Split(context, context * SCORED // CONTEXT)


def package_text() -> str:
    """Prose, dialogue, instructions, lists and code that nothing was calibrated on."""
    return resources.files("segue_edge.prefill").joinpath("quality.txt").read_text("utf-8")


def read_text(path: Path) -> str:
    """The user's text. Raises InvalidArgument where it cannot be read or has nothing in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"The text {path} cannot be read: {error}.", hint="Name a text file in UTF-8."
        ) from error
    if not text.strip():
        raise InvalidArgument(
            f"The text {path} is empty.",
            hint=f"{WINDOWS} windows take {Split(CONTEXT, SCORED).needed(WINDOWS):,} tokens.",
        )
    return text


def cut_windows(tokens: Sequence[int], count: int, split: Split) -> list[list[int]]:
    """`count` windows spread evenly over the text.

    Raises:
        InvalidArgument: the text has too few tokens; says how many are needed.
    """
    if len(tokens) < split.needed(count):
        most = (len(tokens) - split.context) // split.scored
        more = f", or ask for fewer: --windows {most}" if most > 0 else ""
        raise InvalidArgument(
            f"The text has {len(tokens):,} tokens; {count} windows of {split.context} + "
            f"{split.scored} tokens take {split.needed(count):,}.",
            hint=f"Give a longer text{more}.",
            tokens=len(tokens),
            needed=split.needed(count),
        )
    size = split.context + split.scored
    room = len(tokens) - size
    starts = [room * index // max(1, count - 1) for index in range(count)]
    return [list(tokens[start : start + size]) for start in starts]


def score_window(
    judge: Judge,
    geometry: KvGeometry,
    sides: Mapping[str, Side],
    codecs: Mapping[str, Sequence[str]],
    window: Sequence[int],
    split: Split,
) -> dict[tuple[str, str], Score]:
    """The scores of every side with each of its `codecs`, by (side, codec)."""
    first = split.context - 1  # the last token of the context predicts the first scored one
    expected = judge.logits(window, PastKv(geometry, len(window)), first)[:-1]
    own = Own.of(expected, np.asarray(window[split.context :]))
    found = {}
    for name, side in sides.items():
        logits, kv = side(window[: split.context])
        agrees = bool(int(logits.argmax()) == int(expected[0].argmax()))
        for codec in codecs[name]:
            shipped = through_codec(kv, codec, len(window))
            # The judge sees the context's last token itself and gets the KV of those before it.
            shipped.truncate(first)
            given = judge.logits(window[first:-1], shipped)
            found[name, codec] = compare(own, given, agrees)
    return found


def through_codec(kv: PastKv, codec: str, capacity: int) -> PastKv:
    """`kv`, whole blocks, as it arrives at the other side."""
    chosen, geometry = codec_named(codec), kv.geometry
    blocks = []
    for index in range(kv.length // BLOCK_TOKENS):
        block = KvBlock(bytes(16), "", *kv.block(index))
        sink = chosen.sink_tokens if index == 0 else 0
        payload = encode_block(block, chosen.step.name, sink_tokens=sink)
        back = decode_block(payload, geometry, chosen.step.name, sink_tokens=sink)
        blocks.append((back.k, back.v))
    return PastKv.from_blocks(geometry, blocks, capacity)


@dataclass(frozen=True)
class Own:
    """The exact model on its own KV: log probabilities and probabilities `[positions, vocab]`, the
    likeliest tokens and the text's next ones `[positions]`."""

    log_p: Floats
    p: Floats
    best: NDArray[np.integer]
    following: NDArray[np.integer]

    @classmethod
    def of(cls, logits: Floats, following: NDArray[np.integer]) -> Own:
        """`logits`: of the text's positions; is used up."""
        best = logits.argmax(axis=1)
        p = np.empty_like(logits)
        for part in _parts(len(logits)):
            log_p = logits[part]
            log_p -= log_p.max(axis=1, keepdims=True)
            np.exp(log_p, out=p[part])
            total = p[part].sum(axis=1, keepdims=True)
            log_p -= np.log(total)
            p[part] /= total
        return cls(logits, p, best, following)


def compare(own: Own, logits: Floats, first_agrees: bool) -> Score:
    """`logits`: `[positions, vocab]` on the KV under test; are used up."""
    best = logits.argmax(axis=1)
    kl, change = 0.0, 0.0
    for part in _parts(len(logits)):
        other, log_p, following = logits[part], own.log_p[part], own.following[part]
        rows = np.arange(len(following))
        other -= other.max(axis=1, keepdims=True)
        other -= np.log(np.exp(other).sum(axis=1, keepdims=True))
        np.subtract(log_p, other, out=other)  # small numbers: their sum keeps its digits
        change += float(other[rows, following].sum())
        kl += float(np.einsum("ij,ij->i", own.p[part], other).sum())
    return Score(
        positions=len(best),
        agreeing=int((best == own.best).sum()),
        right=int((best == own.following).sum()),
        own_right=int((own.best == own.following).sum()),
        kl=kl / len(best),
        cross_entropy_change=change / len(best),
        first_agrees=first_agrees,
    )


def _parts(rows: int) -> Iterator[slice]:
    """Runs of rows that stay in the cache from one pass over them to the next."""
    for start in range(0, rows, _PART_ROWS):
        yield slice(start, min(start + _PART_ROWS, rows))


def summarise(scores: Sequence[Score], text: str) -> Quality:
    """The scores of all windows as the manifest keeps them."""
    positions = sum(score.positions for score in scores)
    own_right = sum(score.own_right for score in scores)
    return Quality(
        agreement=sum(score.agreeing for score in scores) / positions,
        mean_kl=sum(score.kl for score in scores) / len(scores),
        cross_entropy_change=sum(score.cross_entropy_change for score in scores) / len(scores),
        windows=len(scores),
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        positions=positions,
        first_token_agreement=sum(score.first_agrees for score in scores) / len(scores),
        # a model that is never right loses nothing
        relative_accuracy=sum(score.right for score in scores) / own_right if own_right else 1.0,
    )


def measure(
    judge: Judge,
    geometry: KvGeometry,
    sides: Mapping[str, Side],
    codecs: Mapping[str, Sequence[str]],
    windows: Sequence[Sequence[int]],
    split: Split,
) -> Iterator[dict[tuple[str, str], Score]]:
    """`score_window` of each window in turn, so that the caller can show how far it is."""
    for window in windows:
        yield score_window(judge, geometry, sides, codecs, window, split)
