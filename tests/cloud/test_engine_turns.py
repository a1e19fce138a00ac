"""What the engine promises besides tokens: bounds, cancels, shipped blocks, typed errors."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from segue_cloud.engine.options import EngineOptions
from segue_cloud.engine.port import EngineTurn
from segue_cloud.engine.runner import Prepared, Runner
from segue_cloud.engine.scheduler import Step
from segue_cloud.engine.stuck import LOOKS, StuckWatch
from segue_cloud.engine.torch_engine import TorchEngine
from segue_contract.errors import (
    BadBlock,
    BadRecipe,
    EmptyPrompt,
    EngineGone,
    InvalidArgument,
    ModelError,
    Overloaded,
    PromptTooLong,
    TurnFailed,
)
from segue_contract.kv.layout import KvBlock, block_ids
from segue_contract.limits import EngineLimits
from segue_contract.model.manifest import Manifest
from tests.support.tiny_llama import TINY, build_tiny_llama

OPTIONS = EngineOptions(dtype="fp32", pool_bytes=8 << 20, max_turns=4)
IMPATIENT = replace(OPTIONS, limits=EngineLimits(step_timeout_s=0.1))
PROMPT = tuple(range(10, 210))
DEADLINE_S = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    directory = tmp_path_factory.mktemp("tiny")
    return directory, build_tiny_llama(directory)


@pytest.fixture(params=[False, True], ids=["in_turn", "ahead"])
async def engine(
    model: tuple[Path, Manifest], request: pytest.FixtureRequest
) -> AsyncIterator[TorchEngine]:
    engine = await TorchEngine.load(*model, replace(OPTIONS, ahead=request.param))
    yield engine
    await engine.close()
    engine.check_integrity()


def turn(name: str = "t", **changes: object) -> EngineTurn:
    base = EngineTurn(turn=name, prompt=PROMPT, max_tokens=700)
    return replace(base, **changes)  # type: ignore[arg-type]


async def until(engine: TorchEngine, met: Callable[[], bool]) -> None:
    """Wait for a fact about the engine: any other turn's outputs tell that it took a step."""
    async with asyncio.timeout(DEADLINE_S):
        while not met():
            async for _ in engine.submit(turn("probe", prompt=(5, 6), max_tokens=1)):
                pass


def random_blocks(manifest: Manifest, prompt: tuple[int, ...], seed: int = 3) -> list[KvBlock]:
    rng = np.random.default_rng(seed)
    recipe = manifest.edge_recipe.digest
    shape = (TINY.layers, TINY.kv_heads, 64, TINY.head_dim)
    return [
        KvBlock(
            name,
            recipe,
            rng.standard_normal(shape, dtype=np.float32).astype(np.float16),
            rng.standard_normal(shape, dtype=np.float32).astype(np.float16),
        )
        for name in block_ids(recipe, prompt)
    ]


async def test_leaving_a_turn_frees_its_pages(
    engine: TorchEngine, model: tuple[Path, Manifest]
) -> None:
    async with aclosing(engine.submit(turn())) as stream:
        await anext(stream)
        assert engine.stats().running == 1
    await until(engine, lambda: engine.stats().running == 0)
    assert engine.stats().pages_free == engine.stats().pages_total
    # What was computed stays in the cache until its pages are needed.
    assert engine.have_blocks(block_ids(model[1].edge_recipe.digest, PROMPT)) == 3


async def test_leaving_before_the_first_token_is_a_cancel_too(engine: TorchEngine) -> None:
    stream = engine.submit(turn())
    await stream.aclose()
    await stream.aclose()
    assert [output async for output in stream] == []
    await until(engine, lambda: engine.stats().running == 0 and engine.stats().waiting == 0)
    assert engine.stats().pages_free == engine.stats().pages_total


async def test_a_reader_that_is_cancelled_can_go_on_reading(engine: TorchEngine) -> None:
    stream = engine.submit(turn(max_tokens=20))
    reader = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    outputs = [output async for output in stream]
    assert outputs[0].index == 0
    assert sum(len(o.tokens) for o in outputs) == 20


async def test_a_turn_id_may_come_again_while_the_old_one_ends(engine: TorchEngine) -> None:
    first = engine.submit(turn("same"))
    await anext(first)
    await first.aclose()
    outputs = [output async for output in engine.submit(turn("same", max_tokens=3))]
    assert sum(len(o.tokens) for o in outputs) == 3


async def test_beyond_the_bound_a_turn_is_refused_at_once(engine: TorchEngine) -> None:
    streams = [engine.submit(turn(f"t{i}")) for i in range(OPTIONS.max_turns)]
    with pytest.raises(Overloaded) as refused:
        engine.submit(turn("one too many"))
    assert refused.value.fields["retry_after_s"] > 0
    await streams[0].aclose()
    again = engine.submit(turn("now it fits", max_tokens=1))
    assert [output.finished async for output in again] == ["length"]
    for stream in streams:
        await stream.aclose()


async def test_what_can_never_fit_is_refused_before_it_is_queued(engine: TorchEngine) -> None:
    with pytest.raises(PromptTooLong, match="1024"):
        engine.submit(turn(max_tokens=TINY.context))
    with pytest.raises(PromptTooLong):
        engine.submit(turn(prompt=PROMPT * 6))
    with pytest.raises(EmptyPrompt):
        engine.submit(turn(prompt=()))
    with pytest.raises(InvalidArgument, match="vocabulary"):
        engine.submit(turn(prompt=(1, TINY.vocab)))
    with pytest.raises(InvalidArgument, match="vocabulary"):
        engine.submit(turn(made=(-1,)))
    assert engine.stats().waiting == 0


async def test_a_turn_that_others_finished_ends_at_once(engine: TorchEngine) -> None:
    full = turn(made=(5, 6), max_tokens=2)
    assert [(o.index, o.finished) async for o in engine.submit(full)] == [(2, "length")]
    ended = turn(made=(5, 6), end_tokens=frozenset((6,)))
    assert [(o.index, o.finished) async for o in engine.submit(ended)] == [(2, "stop")]


async def test_shipped_blocks_are_found_only_once_offered(
    engine: TorchEngine, model: tuple[Path, Manifest]
) -> None:
    blocks = random_blocks(model[1], PROMPT)
    ids = [block.id for block in blocks]
    assert engine.have_blocks(ids) == 0
    assert await engine.offer_blocks(blocks[1:2]) == 1
    assert engine.have_blocks(ids) == 0, "a prefix has no gap"
    assert await engine.offer_blocks(blocks[:1]) == 1
    assert engine.have_blocks(ids) == 2
    stream = engine.submit(turn(prompt_blocks=tuple(ids), max_tokens=1))
    assert [output.cached_tokens async for output in stream] == [128]
    assert await engine.offer_blocks(blocks) == 3, "blocks that are there count as taken"


async def test_the_pool_takes_no_more_blocks_than_fit(model: tuple[Path, Manifest]) -> None:
    manifest = model[1]
    engine = await TorchEngine.load(*model, replace(OPTIONS, pool_bytes=1024 * 512))
    try:
        async with aclosing(engine.submit(turn())) as stream:
            await anext(stream)
            many = [
                block
                for seed in range(20)
                for block in random_blocks(manifest, tuple(range(seed, seed + 64)), seed)
            ]
            assert len(many) * 4 > engine.stats().pages_total
            assert await engine.offer_blocks(many) == len(many)  # older idle ones make room
            assert engine.stats().running == 1
        await until(engine, lambda: engine.stats().running == 0)
    finally:
        await engine.close()
    engine.check_integrity()


async def test_blocks_of_another_recipe_or_shape_are_refused(
    engine: TorchEngine, model: tuple[Path, Manifest]
) -> None:
    block = random_blocks(model[1], PROMPT)[0]
    with pytest.raises(BadRecipe):
        await engine.offer_blocks([replace(block, recipe="00" * 16)])
    with pytest.raises(BadBlock):
        await engine.offer_blocks([replace(block, k=block.k[:, :, :32])])
    with pytest.raises(BadBlock):
        await engine.offer_blocks([replace(block, v=block.v.astype(np.int8))])
    poisoned = block.v.copy()
    poisoned[0, 0, 0, 0] = np.inf
    with pytest.raises(BadBlock, match="finite"):
        await engine.offer_blocks([replace(block, v=poisoned)])
    assert engine.have_blocks([block.id]) == 0


class UnluckyRunner(Runner):
    """Fails in its first step, then works."""

    unlucky = True

    def run(self, prepared: Prepared) -> list[int]:
        if self.unlucky:
            self.unlucky = False
            raise RuntimeError("out of luck")
        return super().run(prepared)


@pytest.mark.parametrize("ahead", [False, True])
async def test_a_failing_step_ends_its_turns_and_no_others(
    model: tuple[Path, Manifest], ahead: bool
) -> None:
    build = partial(UnluckyRunner, model[0], TINY, 128, OPTIONS)
    engine = TorchEngine(model[1], replace(OPTIONS, ahead=ahead), 128, build)
    await engine.start()
    with pytest.raises(TurnFailed, match="out of luck"):
        await anext(engine.submit(turn()))
    outputs = [output async for output in engine.submit(turn(max_tokens=4))]
    assert sum(len(o.tokens) for o in outputs) == 4
    await engine.close()
    engine.check_integrity()


class DyingRunner(Runner):
    """Takes the engine's thread down."""

    def run(self, prepared: Prepared) -> list[int]:
        raise SystemExit("no more")


@pytest.mark.parametrize("ahead", [False, True])
async def test_an_engine_that_died_says_so(model: tuple[Path, Manifest], ahead: bool) -> None:
    build = partial(DyingRunner, model[0], TINY, 128, OPTIONS)
    engine = TorchEngine(model[1], replace(OPTIONS, ahead=ahead), 128, build)
    await engine.start()
    assert not engine.died.is_set()
    with pytest.raises(EngineGone, match="died"):
        await anext(engine.submit(turn()))
    async with asyncio.timeout(DEADLINE_S):
        await engine.died.wait()
    with pytest.raises(EngineGone):
        engine.submit(turn("later"))
    await engine.close()


class StuckRunner(Runner):
    """Hangs in its first step until it is told to go on."""

    go_on = threading.Event()

    def run(self, prepared: Prepared) -> list[int]:
        assert self.go_on.wait(DEADLINE_S)
        return super().run(prepared)


@pytest.mark.parametrize("ahead", [False, True])
async def test_an_engine_that_hangs_is_dead(model: tuple[Path, Manifest], ahead: bool) -> None:
    StuckRunner.go_on.clear()
    build = partial(StuckRunner, model[0], TINY, 128, OPTIONS)
    engine = TorchEngine(model[1], replace(IMPATIENT, ahead=ahead), 128, build)
    await engine.start()
    try:
        async with asyncio.timeout(DEADLINE_S):
            with pytest.raises(EngineGone, match="hangs"):
                await anext(engine.submit(turn()))
        assert engine.died.is_set()
        with pytest.raises(EngineGone):
            engine.submit(turn("later"))
    finally:
        StuckRunner.go_on.set()
        await engine.close()


@pytest.mark.parametrize("ahead", [False, True])
async def test_an_engine_that_hangs_in_a_step_says_so_long_before(
    model: tuple[Path, Manifest], ahead: bool
) -> None:
    """Steps before it say how long one takes."""
    StuckRunner.go_on.set()
    build = partial(StuckRunner, model[0], TINY, 128, OPTIONS)
    engine = TorchEngine(model[1], replace(OPTIONS, ahead=ahead), 128, build)
    await engine.start()
    try:
        async for _ in engine.submit(turn("first", max_tokens=3)):
            pass
        assert not engine.stats().stalled
        StuckRunner.go_on.clear()
        outputs = engine.submit(turn("second", max_tokens=2))
        reading = asyncio.ensure_future(anext(outputs))
        async with asyncio.timeout(DEADLINE_S):
            while not engine.stats().stalled:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert not engine.died.is_set()
        StuckRunner.go_on.set()
        await asyncio.wait_for(reading, DEADLINE_S)
        async with asyncio.timeout(DEADLINE_S):
            while engine.stats().stalled:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    finally:
        StuckRunner.go_on.set()
        await engine.close()


class ClumsyRunner(Runner):
    """Cannot prepare its first step."""

    clumsy = True

    def prepare(self, step: Step) -> Prepared:
        if self.clumsy:
            self.clumsy = False
            raise RuntimeError("clumsy")
        return super().prepare(step)


@pytest.mark.parametrize("ahead", [False, True])
async def test_an_engine_that_waits_for_work_does_not_hang(
    model: tuple[Path, Manifest], ahead: bool
) -> None:
    failed = False  # the failing step may take its time: only what follows is about waiting
    looked = asyncio.Event()
    looks: list[float] = []

    class Watch(StuckWatch):
        def look(self, step: float) -> bool:
            if not failed:
                return False
            looks.append(step)
            if len(looks) > 2 * LOOKS:
                looked.set()
            return super().look(step)

    build = partial(ClumsyRunner, model[0], TINY, 128, OPTIONS)
    engine = TorchEngine(model[1], replace(IMPATIENT, ahead=ahead), 128, build, watch=Watch())
    await engine.start()
    with pytest.raises(TurnFailed, match="clumsy"):
        await anext(engine.submit(turn()))
    failed = True
    async with asyncio.timeout(DEADLINE_S):
        await looked.wait()
    assert set(looks[LOOKS:]) == {0.0}
    assert not engine.died.is_set()
    assert [o.index async for o in engine.submit(turn(max_tokens=1))] == [0]
    await engine.close()


async def test_closing_ends_running_turns_with_an_error(model: tuple[Path, Manifest]) -> None:
    engine = await TorchEngine.load(*model, OPTIONS)
    stream = engine.submit(turn())
    await anext(stream)
    await engine.close()
    await engine.close()
    with pytest.raises(EngineGone):
        async for _ in stream:
            pass
    with pytest.raises(EngineGone):
        engine.submit(turn())
    assert await engine.offer_blocks(random_blocks(model[1], PROMPT)) == 0


async def test_rates_are_measured_from_steps(engine: TorchEngine) -> None:
    async for _ in engine.submit(turn(max_tokens=5)):
        pass
    stats = engine.stats()
    assert stats.prefill_tokens_per_s > 0
    assert stats.decode_step_s > 0
    assert stats.steps >= 5
    assert engine.busy_s > 0


async def test_a_pool_too_small_says_what_it_needs(model: tuple[Path, Manifest]) -> None:
    with pytest.raises(ModelError, match="needs") as refused:
        await TorchEngine.load(*model, replace(OPTIONS, pool_bytes=1000))
    assert "--pool-mb" in refused.value.hint
    with pytest.raises(ModelError, match="does not fit"):
        await TorchEngine.load(*model, replace(OPTIONS, pool_bytes=1 << 50))


def test_unknown_options_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="fp8"):
        EngineOptions(dtype="fp8")
    with pytest.raises(InvalidArgument, match="threads"):
        EngineOptions(threads=0)
