"""Third step of `segue model build`, and `segue model quality`: measures every recipe.

    python -m segue_edge.prefill.ladder build --artifact DIR --work DIR [--max-agreement-loss X]
    python -m segue_edge.prefill.ladder report DIR [--text FILE] [--windows N]

`build` writes `gate.json`, which says what was measured; where no INT8 recipe is in the budget, it
also puts the heavier graph into the artifact. `report` measures a built model again and stores the
result in its manifest. Both end with one line {"event": "quality", ...}.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer

from segue_contract.errors import InvalidArgument, ModelMismatch
from segue_contract.model.gate import (
    EDGE,
    FLOAT,
    FLOAT_QUANT,
    MAX_AGREEMENT_LOSS,
    WEIGHT_ONLY,
    Choice,
    Measured,
    bytes_per_token,
    choose,
    codecs_of,
    entries,
    representative,
)
from segue_contract.model.manifest import (
    Manifest,
    ModelGeometry,
    Quality,
    RecipeEntry,
    read_manifest,
    write_manifest,
)
from segue_contract.model.progress import Progress, run_step, tell
from segue_contract.model.seal import EdgeFacts, GateFacts
from segue_edge.prefill.exact import SCORER, ExactModel
from segue_edge.prefill.export import read_geometry
from segue_edge.prefill.float_graph import float_graph
from segue_edge.prefill.gate import (
    BUILD_WINDOWS,
    WINDOWS,
    Score,
    Side,
    cut_windows,
    measure,
    package_text,
    read_text,
    split_for,
    summarise,
)
from segue_edge.prefill.graph import Graph
from segue_edge.prefill.kv import Floats, PastKv
from segue_edge.prefill.providers import CPU, Device
from segue_edge.prefill.runner import GraphRunner, open_head, open_session
from segue_edge.prefill.tensorrt import QDQ, QDQ_GRAPH

_GRAPH_SHARE = 0.3  # of the report's bar, where the float graph must be built first


class Bench:
    """One model's judge and text. Measures the sides it is given."""

    def __init__(
        self,
        folder: Path,
        float_graph: Path,
        geometry: ModelGeometry,
        text: str,
        windows: int,
        threads: int,
    ) -> None:
        """`folder`: where the tokenizer lies. Raises InvalidArgument where the text is short."""
        self.text = text
        self.split = split_for(geometry.context)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokens = tokenizer.encode(text, add_special_tokens=False).ids
        self.windows = cut_windows(tokens, windows, self.split)
        self._geometry = geometry
        self._threads = threads
        scorer = float_graph.with_name(SCORER)
        self.judge = ExactModel(scorer, geometry, head_of(float_graph), threads)

    def side(self, path: Path) -> Side:
        """First logits and KV by the graph at `path`."""
        geometry = self._geometry
        device = Device("cpu", (CPU,))
        head = open_head(path.parent, device, self._threads)
        session = open_session(path, device, self._threads)
        runner = GraphRunner(session, geometry, head=head)

        def prefill(tokens: Sequence[int]) -> tuple[Floats, PastKv]:
            kv = PastKv(geometry.kv, len(tokens))
            return runner.logits(runner.run(np.asarray(tokens, np.int64), kv)), kv

        return prefill

    def run(self, sides: dict[str, tuple[str, Path]], progress: Progress) -> list[Measured]:
        """The codecs of each of `sides`: name -> (weight quantisation, graph)."""
        progress(0.0, "Loading the graphs")
        made = {name: self.side(path) for name, (_, path) in sides.items()}
        scores: dict[tuple[str, str], list[Score]] = {}
        codecs = {name: codecs_of(name) for name in made}
        found = measure(self.judge, self._geometry.kv, made, codecs, self.windows, self.split)
        for number, window in enumerate(found, 1):
            for key, score in window.items():
                scores.setdefault(key, []).append(score)
            what = f"Quality: window {number} of {len(self.windows)}"
            progress(number / len(self.windows), what)
        return [
            Measured(
                graph=name,
                weight_quant=sides[name][0],
                codec=codec,
                quality=summarise(all_scores, self.text),
            )
            for (name, codec), all_scores in scores.items()
        ]


def part(low: float, high: float) -> Progress:
    """Progress of one part of this step's bar."""
    return lambda done, what: tell(low + (high - low) * done, what)


def head_of(graph: Path) -> Floats:
    """The weight that makes the logits, float32 `[hidden, vocab]`."""
    loaded = Graph.load(graph)
    (node,) = (n for n in loaded.matmuls() if n.output[0] == "logits")
    return np.ascontiguousarray(loaded.weight_of(node), np.float32)


def build(artifact: Path, work: Path, max_loss: float, windows: int, threads: int) -> None:
    """Measure what the step before made; raises ModelError, OSError."""
    geometry = read_geometry(work)
    facts = _edge_facts(work)
    source = work / "fp32" / "model.onnx"
    edge = artifact / "edge"
    bench = Bench(artifact, source, geometry, package_text(), windows, threads)
    sides = {
        EDGE: (facts.edge_quant, edge / "prefill.onnx"),
        WEIGHT_ONLY: (facts.decode_quant, edge / "decode.onnx"),
    }
    measured = bench.run(sides, part(0.0, 0.7))
    choice = choose(measured, geometry.kv, max_loss)
    if choice.edge is None:
        tell(0.7, "INT8 loses too much: float32")
        measured += bench.run({FLOAT: (FLOAT_QUANT, source)}, part(0.7, 0.95))
        choice = choose(measured, geometry.kv, max_loss)
    _put_graph(choice, source, edge)
    gate = GateFacts(measured=measured, max_agreement_loss=max_loss)
    (work / "gate.json").write_bytes(msgspec.json.encode(gate))
    _say(measured, choice, geometry, windows)


def _put_graph(choice: Choice, source: Path, edge: Path) -> None:
    """The prefill graph that was chosen is the one that lies there."""
    if choice.edge is None or choice.edge.graph == EDGE:
        return
    for path in edge.glob("prefill.onnx*"):
        path.unlink()
    if choice.edge.graph == FLOAT:
        Graph.load(source).save(edge / "prefill.onnx")


def _edge_facts(work: Path) -> EdgeFacts:
    try:
        return msgspec.json.decode((work / "edge.json").read_bytes(), type=EdgeFacts)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelMismatch(f"The build step before failed: {error}.") from error


def report(
    directory: Path, text: Path | None, windows: int, max_loss: float | None, threads: int
) -> None:
    """Measure a built model on a text and store the result in its manifest.

    `max_loss`: choose the recipes again under this budget; None: only measure.
    """
    manifest = read_manifest(directory)
    words = package_text() if text is None else read_text(text)
    geometry = manifest.geometry
    split = split_for(geometry.context)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    # before anything that takes long
    cut_windows(tokenizer.encode(words, add_special_tokens=False).ids, windows, split)

    source = float_graph(directory, manifest, part(0.0, _GRAPH_SHARE))
    bench = Bench(directory, source, geometry, words, windows, threads)
    measured = bench.run(sides_of(directory, manifest), part(_GRAPH_SHARE, 1.0))
    budget = max_loss
    if budget is None:
        budget = manifest.max_agreement_loss
    choice = choose(measured, geometry.kv, MAX_AGREEMENT_LOSS if budget is None else budget)
    updated = store(manifest, measured, choice, choose_again=max_loss is not None)
    write_manifest(directory, updated)
    _say(measured, choice, geometry, windows, updated)


def sides_of(directory: Path, manifest: Manifest) -> dict[str, tuple[str, Path]]:
    """The graphs that the model has, by the name of their recipes."""
    edge = directory / "edge"
    sides: dict[str, tuple[str, Path]] = {}
    quant = manifest.edge_quant  # of what the build left in prefill.onnx
    weight_only = manifest.recipes.get("edge-weight-only")
    decode_quant = weight_only.recipe.weight_quant if weight_only else ""
    if quant != decode_quant:
        sides[FLOAT if quant == FLOAT_QUANT else EDGE] = (quant, edge / "prefill.onnx")
    if decode_quant:
        sides[WEIGHT_ONLY] = (decode_quant, edge / "decode.onnx")
    if QDQ in manifest.recipes and (directory / QDQ_GRAPH).is_file():
        sides[QDQ] = (manifest.recipes[QDQ].recipe.weight_quant, directory / QDQ_GRAPH)
    return sides


def store(
    manifest: Manifest, measured: Sequence[Measured], choice: Choice, *, choose_again: bool
) -> Manifest:
    """The manifest with the new figures. What is allowed, and what "edge" stands for, changes only
    where `choose_again`: the nodes that run this model must agree on it."""
    base = manifest.edge_recipe
    fresh = entries(measured, choice, base)
    recipes = dict(manifest.recipes)
    for name, entry in fresh.items():
        old = recipes.get(name)
        if choose_again or old is None:
            recipes[name] = entry
    added = [one for one in measured if one.graph == QDQ]
    if choose_again and added:
        chosen = representative(added, manifest.geometry.kv, choice.max_loss)
        recipes[QDQ] = fresh[chosen.name]
    by_digest = {entry.recipe.digest: entry for entry in fresh.values() if entry.quality}
    for name, entry in recipes.items():
        found = by_digest.get(entry.recipe.digest)
        if found is not None:
            recipes[name] = RecipeEntry(
                recipe=entry.recipe, allowed=entry.allowed, quality=found.quality
            )
    budget = choice.max_loss if choose_again else manifest.max_agreement_loss
    return msgspec.structs.replace(manifest, recipes=recipes, max_agreement_loss=budget)


def _say(
    measured: Sequence[Measured],
    choice: Choice,
    geometry: ModelGeometry,
    windows: int,
    manifest: Manifest | None = None,
) -> None:
    split = split_for(geometry.context)

    def row(one: Measured) -> dict[str, object]:
        quality: Quality = one.quality
        return {
            "recipe": one.name,
            "graph": one.graph,
            "codec": one.codec,
            "bytes_per_token": bytes_per_token(one.codec, geometry.kv),
            **{key: _finite(value) for key, value in msgspec.to_builtins(quality).items()},
            "within_budget": one.within(choice.max_loss),
        }

    edge = choice.edge.name if choice.edge else None
    if manifest is not None:  # what is used may differ from what this text would choose
        edge = f"{_graph_name(manifest)}-{manifest.edge_recipe.codec}"
    line = {
        "event": "quality",
        "rows": [row(one) for one in measured],
        "edge": edge,
        "would_choose": choice.edge.name if choice.edge else None,
        "windows": windows,
        "context": split.context,
        "scored": split.scored,
        "max_agreement_loss": choice.max_loss,
        "note": choice.note,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _graph_name(manifest: Manifest) -> str:
    quant = manifest.edge_recipe.weight_quant
    if quant == FLOAT_QUANT:
        return FLOAT
    weight_only = manifest.recipes.get("edge-weight-only")
    return WEIGHT_ONLY if weight_only and weight_only.recipe.weight_quant == quant else EDGE


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build")
    building.add_argument("--artifact", type=Path, required=True)
    building.add_argument("--work", type=Path, required=True)
    building.add_argument("--max-agreement-loss", type=float, default=MAX_AGREEMENT_LOSS)
    building.add_argument("--windows", type=int, default=BUILD_WINDOWS)
    reporting = commands.add_parser("report")
    reporting.add_argument("directory", type=Path)
    reporting.add_argument("--text", type=Path)
    reporting.add_argument("--windows", type=int, default=WINDOWS)
    reporting.add_argument("--max-agreement-loss", type=float)
    for command in (building, reporting):
        command.add_argument("--threads", type=int, default=0, help="0: one per core")
    args = parser.parse_args()

    def step() -> None:
        if args.windows < 1:
            raise InvalidArgument(f"{args.windows} windows; at least one is needed.")
        loss = args.max_agreement_loss
        if loss is not None and not 0.0 <= loss < 1.0:
            raise InvalidArgument(
                f"A loss of {loss} is no share of positions.", hint="Give 0.03 for 3 percent."
            )
        if args.command == "build":
            build(args.artifact, args.work, loss, args.windows, args.threads)
        else:
            report(args.directory, args.text, args.windows, loss, args.threads)

    return run_step(step)


if __name__ == "__main__":
    sys.exit(main())
