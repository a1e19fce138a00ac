"""Appends while links are cut and calls cancelled: what was acknowledged, and what is there."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from random import Random

import segue
from segue.errors import SegueError
from segue_contract.sync.ops import Set
from tests.support.slow_proxy import SlowProxy

WRITERS = 6
MAX_BATCH = 40
_CUT_AFTER_S = 0.05, 0.25
_CANCELLED = 0.1  # of the calls
_DELAY_S = 0.001


@dataclass(frozen=True)
class Outcome:
    """Ids of ops. `moved`: not at the offset that the device was told."""

    acknowledged: int
    missing: list[str]
    doubled: list[str]
    moved: list[str]


async def append_under_faults(address: str, session: str, calls: int, random: Random) -> Outcome:
    """`calls` appends of up to `MAX_BATCH` ops each, by three clients of one device with two open
    sessions each; connections are cut at every step, calls cancelled."""
    told: dict[str, int] = {}
    host_port = int(address.rsplit(":", 1)[1])
    async with SlowProxy(host_port, lambda: random.uniform(0, _DELAY_S)) as proxy:
        through = f"127.0.0.1:{proxy.port}"
        clients = [segue.Client(through, device="phone") for _ in range(WRITERS // 2)]
        sessions = [
            one
            for client in clients
            for one in await asyncio.gather(client.session(session), client.session(session))
        ]

        ended = asyncio.Event()

        async def cut() -> None:
            while True:
                await asyncio.sleep(random.uniform(*_CUT_AFTER_S))
                await ended.wait()  # a call since the last cut: on a slow machine, too, they get on
                ended.clear()
                proxy.cut()

        async def write(number: int, writer: segue.Session) -> None:
            for count in range(calls // WRITERS):
                ids = [f"w{number}.{count}.{n}" for n in range(random.randint(1, MAX_BATCH))]
                ops = [Set(id=one, name=f"w{number}", value=b"1") for one in ids]
                call = asyncio.ensure_future(writer.append(*ops))
                if random.random() < _CANCELLED:
                    await asyncio.wait([call], timeout=random.uniform(0, 3 * _DELAY_S))
                    call.cancel()
                try:
                    first = (await call).offset
                except (SegueError, asyncio.CancelledError):
                    continue  # nobody was told that it is there
                finally:
                    ended.set()
                told.update((one, first + place) for place, one in enumerate(ids))

        cutting = asyncio.ensure_future(cut())
        await asyncio.gather(*(write(number, one) for number, one in enumerate(sessions)))
        cutting.cancel()
        for client in clients:
            await client.close()
    return await _look(address, session, told)


async def _look(address: str, session: str, told: dict[str, int]) -> Outcome:
    """What the log has, entry by entry: it must not be folded meanwhile."""
    async with segue.Client(address, device="reader") as reader:
        log = await (await reader.session(session)).read()
    places: dict[str, int] = {}
    times: Counter[str] = Counter()
    for entry in log:
        assert isinstance(entry, segue.Entry), "the log was folded: nothing can be said of it"
        places[entry.op.id] = entry.offset
        times[entry.op.id] += 1
    return Outcome(
        acknowledged=len(told),
        missing=[one for one in told if one not in places],
        doubled=[one for one, count in times.items() if count > 1],
        moved=[one for one, at in told.items() if places.get(one, at) != at],
    )
