"""Tasks that end together: with the first error, and never in place of a cancellation."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from segue_contract.transport.together import Together


async def fail(after: asyncio.Event, error: Exception) -> None:
    await after.wait()
    raise error


async def wait_long(ended: list[str], name: str) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.append(name)


async def test_it_waits_for_all_also_for_those_that_one_of_them_started() -> None:
    ended: list[str] = []

    async def first(tasks: Together) -> None:
        await asyncio.sleep(0)
        tasks.start(second())
        ended.append("first")

    async def second() -> None:
        await asyncio.sleep(0)
        ended.append("second")

    async with Together() as tasks:
        tasks.start(first(tasks))
    assert ended == ["first", "second"]
    async with Together():
        pass


async def test_the_first_error_ends_the_others() -> None:
    ended: list[str] = []
    now = asyncio.Event()

    async def run() -> None:
        async with Together() as tasks:
            tasks.start(wait_long(ended, "a"))
            tasks.start(wait_long(ended, "b"))
            tasks.start(fail(now, ValueError("one")))
            tasks.start(fail(now, ValueError("two")))
            now.set()

    with pytest.raises(ValueError, match="one"):
        await run()
    assert sorted(ended) == ["a", "b"]


async def test_an_error_of_the_body_ends_the_tasks() -> None:
    ended: list[str] = []

    async def run() -> None:
        async with Together() as tasks:
            tasks.start(wait_long(ended, "a"))
            await asyncio.sleep(0)
            raise KeyError

    with pytest.raises(KeyError):
        await run()
    assert ended == ["a"]


@pytest.mark.parametrize("late", range(8))
async def test_a_cancellation_comes_through_whenever_it_comes(late: int) -> None:
    """Before the error, with it, and at each step after it."""
    rounds = itertools.count()
    now = asyncio.Event()

    async def again_and_again() -> None:
        while True:  # as a loop that keeps a link
            next(rounds)
            try:
                async with Together() as tasks:
                    tasks.start(wait_long([], "a"))
                    tasks.start(fail(now, ValueError("link")))
            except ValueError:
                await asyncio.sleep(3600)

    task = asyncio.create_task(again_and_again())
    await asyncio.sleep(0)
    now.set()
    for _ in range(late):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=5)
    assert task.cancelled(), "it went on"
    assert next(rounds) == 1
