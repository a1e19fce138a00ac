"""`segue.testing.FakeNode`: what an app's unit tests see through the SDK's own client."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import segue
from segue import errors
from segue.events import Durable, Ended, Entry, Frame, Rewound, Snapshot, Started
from segue.testing import Fail, FakeNode, Pause, Preview, Rewind, Wait
from segue.testing._log import MemoryLog
from segue.testing._service import MemoryService
from segue_contract.limits import MAX_SESSIONS_LISTED
from segue_contract.sync.ops import Feedback, Set, TurnEnded, encode_op
from segue_contract.v1 import agent_pb2


@pytest.fixture(autouse=True)
async def in_time() -> AsyncIterator[None]:
    async with asyncio.timeout(60):
        yield


async def test_a_turn_and_what_another_device_sees_of_it() -> None:
    async with (
        FakeNode(replies=["Paris, of course."]) as node,
        node.client("phone") as phone,
        node.client("laptop") as laptop,
    ):
        session = await phone.session("trip")
        seen = (await laptop.session("trip")).follow()
        async with session.run("Where to?") as turn:
            events = [event async for event in turn]
        assert [type(event) for event in events] == [Started, Frame, Frame, Frame, Ended]
        assert turn.text == "Paris, of course."
        assert turn.ended is not None
        assert (turn.ended.reason, turn.ended.usage.completion_tokens) == ("stop", 3)
        told = ""
        async for item in seen:
            told += item.text
            if isinstance(item, Snapshot):
                told += "".join(one.text for one in item.state.turns)
                if item.state.turns and item.state.turns[-1].ended:
                    break
            if isinstance(item, Entry) and isinstance(item.op, TurnEnded):
                break
        assert told == "Paris, of course."
        assert node.prompts == ["Where to?"]
        (state,) = node.state("trip").turns
        assert (state.prompt, state.text, state.device) == ("Where to?", turn.text, "phone")


async def test_values_go_to_every_device() -> None:
    async with FakeNode() as node, node.client("phone") as phone, node.client("tv") as tv:
        session = await phone.session("trip")
        follower = (await tv.session("trip")).follow()
        items = aiter(follower)
        assert isinstance(await anext(items), Snapshot)
        await asyncio.gather(*(session.set("n", str(n)) for n in range(5)))
        await session.append(Feedback(id="", turn="t", value="good"))
        seen = [await anext(items) for _ in range(6)]
        assert [item.offset for item in seen] == [1, 2, 3, 4, 5, 6]
        assert (await (await tv.session("trip")).state()).values == {"n": b"4"}
        await follower.aclose()


async def test_previews_are_confirmed_or_taken_back() -> None:
    script = [Preview("Lon don"), Rewind(), Preview("Par is"), " it is."]
    async with FakeNode([script]) as node, node.client("phone") as client:
        session = await client.session("trip")
        async with session.run("go") as turn:
            events = [event async for event in turn]
        shown = ""
        for event in events:
            if isinstance(event, Rewound):
                assert event.index == 0
                shown = ""
            shown += event.text
        assert shown == turn.text == "Par is it is."
        assert [event.durable for event in events if isinstance(event, Frame)] == [
            False, False, False, False, True, True,
        ]  # fmt: skip
        assert any(isinstance(event, Durable) and event.next_index == 2 for event in events)
        assert node.state("trip").turns[0].text == turn.text


async def test_replies_of_every_kind() -> None:
    gate = asyncio.Event()
    gate.set()
    replies = [
        lambda prompt: f"You said {prompt}.",
        ["a", Pause(0.0), " b", Wait(gate), " c"],
        "x",
        ["half ", Fail(errors.EngineGone("gone"))],
        "one two three four",
    ]
    async with FakeNode(replies) as node, node.client("phone") as client:
        session = await client.session("trip")

        async def ask(prompt: str, **options: int) -> segue.Reply:
            async with session.run(prompt, **options) as turn:  # type: ignore[arg-type]
                return await turn.result()

        assert (await ask("hi")).text == "You said hi."
        assert (await ask("hi")).text == "a b c"
        assert (await ask("hi")).text == "x"
        with pytest.raises(errors.TurnFailed) as caught:
            await ask("hi")
        assert caught.value.fields["code"] == "engine_gone"
        cut = await ask("hi", max_tokens=2)
        assert (cut.text, cut.reason) == ("one two", "length")
        with pytest.raises(errors.TurnFailed, match="no reply left"):
            await ask("hi")
        node.replies.append("more")
        assert (await ask("hi")).text == "more"


async def test_turns_wait_are_refused_and_stopped() -> None:
    gate = asyncio.Event()
    async with FakeNode([["one", Wait(gate)], "two"]) as node, node.client("phone") as client:
        session = await client.session("trip")
        async with session.run("first") as first:
            with pytest.raises(errors.SessionBusy):
                async with session.run("no", when_busy="refuse"):
                    pass
            with pytest.raises(errors.SessionBusy):
                await client.delete_session("trip")

            async def second() -> str:
                async with session.run("second") as turn:
                    return (await turn.result()).text

            waiting = asyncio.create_task(second())
            await node.until(lambda: bool(node.state("trip").waiting))
            assert await session.stop()
            assert (await first.result()).reason == "cancelled"
            assert await waiting == "two"
        assert not await session.stop()
        async with session.run("first", turn=first.id) as again:  # known: joined, not run again
            assert (await again.result()).text == "one"
        assert node.prompts == ["first", "second"]


async def test_a_turn_runs_on_and_is_joined_again_after_a_break() -> None:
    gate = asyncio.Event()
    async with FakeNode([["one", Wait(gate), " two"]]) as node, node.client("phone") as client:
        session = await client.session("trip")
        async with session.run("go") as turn:
            async for event in turn:
                if isinstance(event, Frame) and event.index == 0:
                    node.disconnect()
                    gate.set()
                    await node.until(lambda: node.state("trip").turns[0].ended)
                    node.reconnect()
        assert turn.text == "one two"


async def test_errors_on_demand() -> None:
    async with FakeNode(["yes"]) as node, node.client("phone") as client:
        session = await client.session("trip")
        node.fail_next("Append", errors.QuotaExceeded("Too fast.", retry_after_s=0.01))
        with pytest.raises(errors.QuotaExceeded) as caught:
            await session.set("a", "1")
        assert caught.value.retry_after_s == 0.01
        node.fail_next("RunTurn", errors.Overloaded("Full.", retry_after_s=0.01), times=2)
        async with session.run("go", max_retries=2) as turn:
            assert (await turn.result()).text == "yes"
        with pytest.raises(errors.InvalidArgument, match="no verb"):
            node.fail_next("Nonsense", errors.Overloaded("x"))
        node.disconnect()
        with pytest.raises(errors.Unreachable):
            await client.sessions()
        node.reconnect()
        assert len(await client.sessions()) == 1


async def test_entries_are_lost_as_in_a_failover() -> None:
    async with FakeNode() as node, node.client("phone") as client:
        session = await client.session("trip")
        for n in range(3):
            await session.set("n", str(n))
        items = aiter(session.follow())
        assert (await anext(items)).offset == 3
        node.lose_entries("trip", 2)
        item = await anext(items)
        assert isinstance(item, Snapshot)
        assert item.lost is not None
        assert (item.lost.first, item.lost.last) == (2, 3)
        assert item.state.values == {"n": b"0"}
        await session.set("n", "again")
        assert (await anext(items)).offset == 2


async def test_sessions_are_listed_deleted_exported_imported_revoked(tmp_path: Path) -> None:
    async with FakeNode(["yes"] * 3) as node, node.client("phone") as client:
        for name in ("a", "b", "c"):
            session = await client.session(name)
            async with session.run(f"about {name}") as turn:
                await turn.result()
        listed = [one async for one in client.all_sessions(page=2)]
        assert {(one.session, one.title, one.turns) for one in listed} == {
            ("a", "about a", 1), ("b", "about b", 1), ("c", "about c", 1),
        }  # fmt: skip
        assert len(listed) <= MAX_SESSIONS_LISTED
        await client.export_session("a", tmp_path / "a.segue")
        made = await client.import_session(tmp_path / "a.segue", "copy")
        assert (made.session, made.turns) == ("copy", 1)
        state = await (await client.session("copy")).state()
        assert state.turns[0].text == "yes"
        with pytest.raises(errors.SessionNotEmpty):
            await client.import_session(tmp_path / "a.segue", "b")

        items = aiter((await client.session("b")).follow())
        await anext(items)
        assert await client.delete_session("b")
        assert not await client.delete_session("b")
        with pytest.raises(errors.SessionDeleted):
            await anext(items)
        with pytest.raises(errors.UnknownSession):
            await client.session("b", must_exist=True)

        async with node.client("lost") as lost:
            theirs = await lost.session("c")
            items = aiter(theirs.follow())
            await anext(items)
            await client.revoke("c", "lost")
            with pytest.raises(errors.Revoked):
                await anext(items)
            with pytest.raises(errors.Revoked):
                await theirs.set("a", "1")


async def test_a_closed_node_leaves_nothing_behind() -> None:
    before = asyncio.all_tasks()
    async with FakeNode([["one ", Wait(asyncio.Event())]]) as node:
        client = node.client("phone")
        session = await client.session("trip")
        async with session.run("go"):
            pass
        items = aiter(session.follow())
        await anext(items)
    with pytest.raises(StopAsyncIteration):
        await anext(items)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == before


def test_it_answers_every_verb_of_the_device_api() -> None:
    verbs = agent_pb2.DESCRIPTOR.services_by_name["Agent"].methods_by_name
    assert [verb for verb in verbs if not hasattr(MemoryService, verb)] == []


def test_it_needs_neither_pytest_nor_a_stack() -> None:
    code = (
        "import sys, asyncio; from segue.testing import FakeNode\n"
        "async def main():\n"
        "    async with FakeNode(['hi']) as node, node.client('phone') as client:\n"
        "        await client.session('trip')\n"
        "asyncio.run(main()); print(' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"pytest", "segue.local", "segue.local.stack", "numpy", "structlog"}


async def test_a_turn_of_a_closed_client_is_told_at_once() -> None:
    """It was joined again for half a minute; what waited for its settling went on for ever."""
    async with FakeNode([["one", Wait(asyncio.Event())]]) as node:
        client = node.client("phone")
        session = await client.session("trip")
        async with session.run("go") as turn, asyncio.timeout(20):
            reading = asyncio.create_task(turn.result())
            await node.until(lambda: bool(node.state("trip").turns[0].tokens))
            await client.close()
            with pytest.raises(errors.Unreachable, match="closed"):
                await reading


@pytest.mark.parametrize("pattern", ["*", "tr*"])
async def test_a_device_is_revoked_for_all_sessions_of_a_kind(pattern: str) -> None:
    async with FakeNode() as node, node.client("phone") as phone, node.client("tv") as tv:
        session = await tv.session("trip")
        await phone.revoke(pattern, "tv")
        with pytest.raises(errors.Revoked):
            await session.set("a", "1")
        with pytest.raises(errors.Revoked):
            await tv.session("tram")  # also those that it would make
        assert [one.session for one in await phone.sessions()] == ["trip"]
        await (await phone.session("trip")).set("a", "1")


def test_a_repeated_batch_is_known_and_other_ops_under_its_numbers_are_not() -> None:
    log = MemoryLog("trip")
    epoch = log.new_epoch("p")
    one, two, other = (
        encode_op(Set(id=name, name="n", value=b"v", device="d")) for name in ("1", "2", "3")
    )
    assert log.append_of("p", epoch, 1, [one]) == 1
    assert log.append_of("p", epoch, 2, [two]) == 2
    assert log.append_of("p", epoch, 1, [one]) == 1
    with pytest.raises(errors.OutcomeUnknown):
        log.append_of("p", epoch, 2, [other])
    assert log.tail.offset == 2
