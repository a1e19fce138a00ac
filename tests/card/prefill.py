"""Prompts of 1,024 and 4,096 tokens alone, beside the compute roof; always profiled."""

from __future__ import annotations

import asyncio

from tests.bench.harness import Report
from tests.bench.suites._card_plan import plan_here
from tests.bench.suites.gpu import prefill_rows


def run(report: Report, quick: bool) -> None:
    plan = plan_here(report, quick)
    if plan is not None:
        asyncio.run(prefill_rows(report, plan))
