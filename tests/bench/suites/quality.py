"""What shipped KV costs the reply: every graph and codec step of the built default model.

The same measurement as `segue model quality`, on the package's own text; it stores nothing. And how
often a sampled reply goes on as it would have elsewhere.
"""

from __future__ import annotations

from segue_contract.model.gate import MAX_AGREEMENT_LOSS, bytes_per_token
from segue_contract.model.manifest import DEFAULT_MODEL, model_home, read_manifest
from segue_edge.prefill.float_graph import float_graph
from segue_edge.prefill.gate import WINDOWS, package_text
from segue_edge.prefill.ladder import Bench, sides_of
from segue_edge.prefill.runtime import EdgeModel
from tests.bench.harness import Report
from tests.bench.suites._sampled import TEMPERATURE, Readers, agreement


def run(report: Report, quick: bool) -> None:
    directory = model_home() / DEFAULT_MODEL
    manifest = read_manifest(directory)
    geometry = manifest.geometry
    source = float_graph(directory, manifest, lambda *_: None)
    windows = 1 if quick else WINDOWS
    bench = Bench(directory, source, geometry, package_text(), windows, 0)
    report.row("windows", windows, "", note=f"of {bench.split.context} + {bench.split.scored}")
    for one in bench.run(sides_of(directory, manifest), lambda *_: None):
        quality, name = one.quality, one.name
        used = one.codec == manifest.edge_recipe.codec and (
            one.weight_quant == manifest.edge_recipe.weight_quant
        )
        report.row(
            f"{name}_agreement",
            quality.agreement,
            "share",
            1 - MAX_AGREEMENT_LOSS if used else None,
            note="the recipe in use" if used else "",
        )
        report.row(f"{name}_mean_kl", quality.mean_kl, "nats")
        report.row(f"{name}_cross_entropy_change", quality.cross_entropy_change, "nats")
        if quality.relative_accuracy is not None:
            report.row(f"{name}_relative_accuracy", quality.relative_accuracy, "ratio")
        report.row(f"{name}_bytes_per_token", bytes_per_token(one.codec, geometry.kv), "bytes")
        if quality.first_token_agreement is not None:
            first = quality.first_token_agreement
            report.row(f"{name}_first_token_agreement", first, "share", note="by the edge's logits")
    sampled = agreement(
        Readers(EdgeModel.load(directory, providers="cpu"), bench.judge), bench.windows, bench.split
    )
    note = f"temperature {TEMPERATURE}; any rule could reach {{:.4f}}"
    report.row(
        "sampled_agreement_edge",
        sampled.edge,
        "share",
        0.95,
        note=note.format(sampled.edge_possible),
    )
    report.row(
        "sampled_agreement_shipped",
        sampled.shipped,
        "share",
        0.97,
        note=note.format(sampled.shipped_possible),
    )
