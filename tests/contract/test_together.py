"""Tasks that end together: with the first error, and never in place of a cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import itertools

import pytest

from segue_contract.transport.together import Together, end


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


async def slow_to_end(go_on: asyncio.Event, ended: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        while not go_on.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await go_on.wait()
        ended.append("slow")


async def test_who_ends_tasks_may_be_cancelled_itself() -> None:
    go_on, ended = asyncio.Event(), list[str]()
    tasks = [asyncio.create_task(slow_to_end(go_on, ended)) for _ in range(2)]
    await asyncio.sleep(0)

    async def close() -> None:
        await end(*tasks)
        ended.append("went on")

    closing = asyncio.create_task(close())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.sleep(0)
    assert not closing.done()
    go_on.set()
    await asyncio.wait({closing}, timeout=5)
    assert closing.cancelled()
    assert ended == ["slow", "slow"]


async def test_tasks_end_however_they_do() -> None:
    async def fails() -> None:
        raise ValueError

    failed, over = asyncio.create_task(fails()), asyncio.create_task(asyncio.sleep(0))
    await asyncio.wait({failed, over})
    late = asyncio.create_task(wait_long([], "a"))
    await end(failed, over, late)
    assert (failed.done(), over.done(), late.cancelled()) == (True, True, True)
    assert isinstance(failed.exception(), ValueError)
    await end()
