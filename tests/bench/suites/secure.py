"""What it costs that many share a cloud and nobody is trusted without proof."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

import structlog

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.identity.keys import IssuerKey, KeySet
from segue_contract.identity.principal import Right
from segue_contract.identity.tokens import TokenChecker, issue
from segue_contract.model.manifest import DEFAULT_MODEL, model_home, read_manifest
from tests.bench.harness import Report, median_of
from tests.bench.suites._device import bench_device
from tests.bench.suites._noisy import noisy_tenant_rows
from tests.bench.suites._tls_cost import tls_rows


def run(report: Report, quick: bool) -> None:
    # Lines of turns would stand between the rows.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    _token_rows(report, quick)
    asyncio.run(tls_rows(report, quick))
    asyncio.run(_engine_rows(report, model_home() / DEFAULT_MODEL, quick))


def _token_rows(report: Report, quick: bool) -> None:
    """A token that no cache knows, and one that it does."""
    now_s = time.time()
    key = IssuerKey.new("bench", lambda count: bytes(range(count)))
    checker = TokenChecker(KeySet([key.public(now_s)]))
    count = 100 if quick else 2000
    tokens = [
        issue(key, device="phone", sessions=["ann.*"], rights=[Right.READ, Right.SEND],
              lifetime_s=600, now_s=now_s, token_id=f"token{number}")
        for number in range(count)
    ]  # fmt: skip
    rest = iter(tokens)
    each = median_of(lambda: checker.principal(next(rest), now_s), count - 1)
    report.row("token_check_us", each * 1e6, "µs", 300, "lower", "signature and claims")
    each = median_of(lambda: checker.principal(tokens[0], now_s), count)
    report.row("token_again_us", each * 1e6, "µs", note="a token that was checked before")


async def _engine_rows(report: Report, directory: Path, quick: bool) -> None:
    manifest = read_manifest(directory)
    engine = await TorchEngine.load(directory, manifest, EngineOptions(device=bench_device()))
    try:
        async for _ in engine.submit(EngineTurn("warm", tuple(range(5, 69)), max_tokens=8)):
            pass
        await noisy_tenant_rows(report, engine, manifest.geometry.vocab, quick)
    finally:
        await engine.close()
