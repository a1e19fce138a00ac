"""The chat: its room, its plain face through a pipe, and its terminal face by keys."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

import segue
from segue.cli._chat_terminal import TerminalScreen
from segue.cli._chat_text import body, clean, footer
from segue.cli._room import Room, Talk
from segue_contract.plan import PlanReport, encode_plan
from segue_contract.sync import ops
from segue_contract.v1.agent_pb2 import OfflineTurn, RunTurnRequest
from tests.support.fake_agent import FakeAgent, FakeLog, Step, Wait, ended, frame, started
from tests.support.said_ops import begins

WAIT_S = 20.0


class Script(list[str]):
    """A screen that keeps what it was told, and wakes who waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.woken = asyncio.Event()
        self.room: Room | None = None
        self.live: list[str] = []
        self.footers: dict[str, str] = {}

    def history(self, talks: Sequence[Talk]) -> None:
        self.footers.update({talk.turn: footer(talk) for talk in talks})
        self.extend(f"history {talk.device}: {talk.prompt} -> {talk.text}" for talk in talks)
        self.woken.set()

    def changed(self) -> None:
        if self.room is not None:
            self.live += [talk.text for talk in self.room.live.values()]
        self.woken.set()

    def finished(self, talk: Talk) -> None:
        self.footers[talk.turn] = footer(talk)
        self.append(f"finished {talk.device}: {talk.prompt} -> {talk.text} ({talk.reason})")
        self.woken.set()

    def note(self, text: str) -> None:
        self.append(f"note {text}")
        self.woken.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                self.woken.clear()
                await self.woken.wait()


@asynccontextmanager
async def room_of(agent: FakeAgent, device: str) -> AsyncIterator[tuple[Room, Script]]:
    async with segue.Client(agent.address, device=device) as client:
        screen = Script()
        room = Room(await client.session("trip"), screen, {"max_tokens": 50})
        screen.room = room
        task = asyncio.create_task(room.follow())
        try:
            await screen.until(room.arrived.is_set)
            yield room, screen
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def write_turn(log: FakeLog, turn: str, device: str, prompt: str, *words: str) -> None:
    log.append(*begins(turn, device, prompt))
    for index, word in enumerate(words):
        log.append(
            ops.Frame(
                id=f"{turn}{index}", turn=turn, epoch=1, index=index, tokens=(1,), pieces=(word,)
            )
        )


def end_turn(log: FakeLog, turn: str, reason: str = "stop") -> None:
    log.append(ops.TurnEnded(id=f"{turn}e", turn=turn, epoch=1, reason=reason))


async def test_history_then_the_others_live() -> None:
    log = FakeLog("trip")
    write_turn(log, "t1", "phone", "Hello?", "Hi", " you")
    end_turn(log, "t1")
    write_turn(log, "t2", "phone", "And now?", "Wait")
    async with FakeAgent(log) as agent, room_of(agent, "laptop") as (room, screen):
        assert list(screen) == ["history phone: Hello? -> Hi you"]
        assert list(room.live) == ["t2"]
        log.append(ops.Frame(id="f", turn="t2", epoch=1, index=1, tokens=(2,), pieces=(" a bit",)))
        await screen.until(lambda: "Wait a bit" in screen.live)
        end_turn(log, "t2", "cancelled")
        await screen.until(lambda: len(screen) > 1)
        assert screen[1] == "finished phone: And now? -> Wait a bit (cancelled)"
        assert not room.live


async def test_the_line_above_which_the_model_forgets_is_shown_when_it_moves() -> None:
    log = FakeLog("trip")
    for number in (1, 2):
        write_turn(log, f"t{number}", "phone", f"Question {number}", "Yes")
        end_turn(log, f"t{number}")

    def asked(turn: str, context_from: str) -> None:
        log.append(
            ops.UserMessage(id=f"{turn}u", turn=turn, device="phone", text=f"Question {turn}"),
            ops.TurnStarted(id=f"{turn}s", turn=turn, epoch=1, context_from=context_from),
        )
        end_turn(log, turn)

    def notes(screen: Script) -> list[str]:
        return [line for line in screen if line.startswith("note")]

    asked("t3", "t2")
    async with FakeAgent(log) as agent, room_of(agent, "laptop") as (_room, screen):
        await screen.until(lambda: len(notes(screen)) == 1)
        assert "before “Question 2”" in notes(screen)[0]
        asked("t4", "t2")
        asked("t5", "t5")
        await screen.until(lambda: len(notes(screen)) == 2)
        assert "before “Question t5”" in notes(screen)[1]


async def test_what_was_said_offline_beside_others_is_shown_as_a_branch() -> None:
    log = FakeLog("trip")

    def says(turn: str, device: str, prompt: str, follows: str | None = None) -> None:
        log.append(*begins(turn, device, prompt, follows))
        end_turn(log, turn)

    says("t1", "phone", "Hello?")
    says("t2", "laptop", "To Rome?")
    says("t3", "phone", "To Paris?", follows="t1")
    async with FakeAgent(log) as agent, room_of(agent, "laptop") as (_room, screen):
        says("t4", "laptop", "And then?")
        says("t5", "phone", "By train?", follows="t3")
        says("t6", "phone", "Or by bus?", follows="t5")
        await screen.until(lambda: any("Or by bus" in line for line in screen))
    notes = [line for line in screen if line.startswith("note")]
    (note,) = notes
    assert "phone said “By train?” offline, while laptop said “And then?”: a branch" in note
    assert screen.footers == {
        "t1": "",
        "t2": "",
        "t3": "a branch, said offline beside 1 of others",
        "t4": "",
        "t5": "a branch, said offline beside 1 of others",
        "t6": "a branch, said offline beside 1 of others",
    }


async def test_what_the_log_made_of_an_offline_message_is_shown_where_it_is_another() -> None:
    log = FakeLog("trip")
    back = asyncio.Event()
    outcomes = {
        "kept": [frame(0, "Hi you"), ended(2)],
        "other": [frame(0, "Good day to you"), ended(4)],
        "refused": [ended(2, reason="error", durable=False, error_message="No room.")],
    }

    def script(request: RunTurnRequest) -> Sequence[Step]:
        said = [started(request.turn, 0), frame(0, "Hi you", epoch=0, durable=False)]
        if not request.must_exist:
            return [*said, ended(2, durable=False)]
        return [Wait(back), *said, *outcomes[request.prompt]]

    async with FakeAgent(log, script) as agent, room_of(agent, "laptop") as (room, screen):
        for prompt in outcomes:
            await room.say(prompt)
        assert list(screen) == [
            f"finished laptop: {prompt} -> Hi you  (stop)" for prompt in outcomes
        ]
        assert all("said offline" in line for line in screen.footers.values())
        del screen[:]
        back.set()
        await screen.until(lambda: len(screen) == 3)
    assert screen.index("note The log keeps another reply to “other”:") + 1 == screen.index(
        "finished laptop: other -> Good day to you  (stop)"
    )
    assert "note The log refused “refused” for good. No room." in screen


async def test_messages_of_ours_that_the_log_has_not_are_told_at_the_start() -> None:
    log = FakeLog("trip")
    async with FakeAgent(log) as agent:
        for turn, device, code in (("a", "laptop", ""), ("b", "laptop", "x"), ("c", "phone", "x")):
            agent.offline_turns.append(
                OfflineTurn(
                    turn=turn,
                    device=device,
                    title=f"Message {turn}",
                    error_code=code,
                    error_message="No." if code else "",
                )
            )
        async with room_of(agent, "laptop") as (_room, screen):
            notes = [line for line in screen if line.startswith("note")]
            assert await asyncio.wait_for(agent.dismissed.get(), 10) == "b"
            assert agent.dismissed.empty()
    assert notes == [
        "note The log refused “Message b” for good. No.",
        "note 1 of your messages wait for the cloud to come back.",
    ]


async def test_a_message_that_waits_on_another_device_is_shown_until_it_begins_or_is_gone() -> None:
    log = FakeLog("trip")
    write_turn(log, "t1", "phone", "Plan a day.", "First,")

    def waits(turn: str, prompt: str) -> None:
        log.append(ops.TurnWaiting(id=f"{turn}.waiting", device="phone", turn=turn, text=prompt))

    waits("t2", "And then?")
    async with FakeAgent(log) as agent, room_of(agent, "laptop") as (room, screen):
        await screen.until(lambda: "t2" in room.live)
        waits("t3", "Never mind.")
        await screen.until(lambda: "t3" in room.live)
        assert [(talk.prompt, talk.waiting) for talk in room.live.values()] == [
            ("Plan a day.", False),
            ("And then?", True),
            ("Never mind.", True),
        ]
        await room.stop()
        assert agent.stops[-1].turn == "t1", "the one that runs, by its id: no other that begins"
        log.append(ops.TurnWithdrawn(id="t3.withdrawn", turn="t3"))
        await screen.until(lambda: "t3" not in room.live)
        end_turn(log, "t1")
        write_turn(log, "t2", "phone", "And then?", "Then")
        await screen.until(lambda: "t2" in room.live and room.live["t2"].text == "Then")
        assert not room.live["t2"].waiting


async def test_own_turn_is_shown_once_though_the_log_has_it_too() -> None:
    log = FakeLog("trip")

    def script(request: object) -> Sequence[Step]:
        turn = str(getattr(request, "turn", ""))
        write_turn(log, turn, "laptop", "Hello?", "Hi ", "you ")
        end_turn(log, turn)
        return [started(turn), frame(0, "Hi"), frame(1, "you"), ended(2)]

    async with FakeAgent(log, script) as agent, room_of(agent, "laptop") as (room, screen):
        await room.say("Hello?")
        write_turn(log, "t9", "phone", "Me too", "Yes")
        end_turn(log, "t9")
        await screen.until(lambda: len(screen) > 1)
        assert list(screen) == [
            "finished laptop: Hello? -> Hi you  (stop)",
            "finished phone: Me too -> Yes (stop)",
        ]


async def test_refusals_and_bad_input_are_notes() -> None:
    log = FakeLog("trip")
    busy = segue.errors.SessionBusy("Another turn runs.", hint="Wait for it.")
    async with (
        FakeAgent(log, lambda _: [busy]) as agent,
        room_of(agent, "laptop") as (room, screen),
    ):
        await room.say("Hello?")
        await room.say("")
        assert list(screen) == [
            "note Another turn runs. Wait for it.",
            "note The prompt is empty. Say something.",
        ]
        assert not room.live


def test_footer_says_who_was_first_and_how_fast() -> None:
    talk = Talk("t", "phone", "Hello?", 0.0, pieces=["\n\nHi", "\x1b[31m!\n"], reason="length")
    talk.timing.saw(0.21, 1, "edge")
    talk.timing.saw(1.21, 21, "cloud")
    talk.plan = PlanReport(shape="ship")
    assert footer(talk) == (
        "cut at the token limit · first token by edge in 210 ms · 20 tokens/s · 21 tokens"
        " · plan ship"
    )
    assert body(talk) == "Hi[31m!"
    assert clean("a\x9bb\x00\tc\r\n") == "ab\tc\n"


async def test_plain_chat_through_a_pipe() -> None:
    log = FakeLog("trip")
    write_turn(log, "t1", "phone", "Hello?", "Hi")
    end_turn(log, "t1")
    plan = encode_plan(PlanReport(shape="text"))
    async with FakeAgent(
        log, lambda r: [started(r.turn), frame(0, "Fine thanks"), ended(2, plan=plan)]
    ) as agent:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "segue", "chat", "--session", "trip", "--device", "laptop"),
            *("--address", agent.address),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(b"How are you?\n\nBye\n"), 60)
    assert process.returncode == 0, err.decode()
    text = out.decode()
    assert text.startswith("phone> Hello?\nHi\n[")
    assert text.count("laptop> ") == 2
    assert "laptop> How are you?\nFine thanks \n[first token by cloud" in text
    assert "plan text]" in text
    assert [run.prompt for run in agent.runs] == ["How are you?", "Bye"]
    assert err == b""


class Printed(io.StringIO):
    """What was printed; wakes whoever waits for some of it."""

    def __init__(self) -> None:
        super().__init__()
        self.woken = asyncio.Event()

    def write(self, text: str) -> int:
        self.woken.set()
        return super().write(text)

    async def until(self, text: str) -> None:
        while text not in self.getvalue():
            self.woken.clear()
            await self.woken.wait()


async def test_terminal_keys_ask_stop_and_leave() -> None:
    shown, go_on = asyncio.Event(), asyncio.Event()

    class Watched(TerminalScreen):
        def changed(self) -> None:
            super().changed()
            if any(talk.text for talk in room.live.values()):
                shown.set()

    printed = Printed()
    console = Console(file=printed, width=80, highlight=False)
    steps = [started("t"), frame(0, "One"), Wait(go_on), ended(1, reason="cancelled")]
    with create_pipe_input() as keys:
        async with (
            asyncio.timeout(WAIT_S),
            FakeAgent(FakeLog("trip"), lambda _: steps) as agent,
            segue.Client(agent.address, device="laptop") as client,
        ):
            screen = Watched(console=console, keys=keys, output=DummyOutput())
            room = Room(await client.session("trip"), screen, {})
            running = asyncio.create_task(screen.run(room, "edge fake"))
            keys.send_text("/help\rCount.\r")
            await shown.wait()
            keys.send_text("\x03")
            await agent.stop_asked.wait()
            assert not running.done()
            go_on.set()
            await printed.until("first token by")
            keys.send_text("\x03")
            await running
    text = printed.getvalue()
    assert "session trip · you are laptop" in text
    assert "/plan NAME" in text
    assert "laptop › Count.\nOne\nstopped · first token by cloud" in text
