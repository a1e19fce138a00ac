"""The sessions in which a turn runs, so that orphans are found at a cost in orphans.

Named by whoever claims a turn, before the claim, and now and then while it runs; forgotten by
whoever looks and finds that nothing runs. A look falls on the end of a turn's lease, so each turn
is looked at about once in the time of a lease, by one instance of all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from segue_cloud.sessions import scripts
from segue_cloud.sessions.keys import SessionKeys, active_shard, running_key
from segue_cloud.sessions.scripts import Command
from segue_cloud.sessions.wire import Wire
from segue_contract.ids import SessionName
from segue_contract.limits import ACTIVE_SHARDS, RECOVERY_SWEEP_S

RUNNING = scripts.load("running.lua")

_HIDE_MS = int(RECOVERY_SWEEP_S * 1000)


class RunningTurns:
    """Of one model: an instance takes over only turns that it can go on with."""

    def __init__(self, wire: Wire, model: str) -> None:
        self._wire = wire
        self._model = model

    async def name(self, sessions: Sequence[SessionName], look_in_s: float) -> None:
        """A turn runs, or is about to run, in each; its lease is worth a look in `look_in_s`.

        Raises:
            StoreUnavailable.
        """
        shards: defaultdict[int, list[str]] = defaultdict(list)
        for session in sessions:
            shards[active_shard(session)].append(str(session))
        if shards:
            await self._wire.call_each(
                *(
                    self._call(shard, "name", int(look_in_s * 1000), *members)
                    for shard, members in shards.items()
                )
            )

    async def due(self, most: int) -> list[SessionName]:
        """Up to `most` sessions whose turn has an owner no more, those that wait longest first.

        Others are not told of them for a moment. Raises StoreUnavailable.
        """
        each = -(-most // 4)  # orphans of one dead instance are spread over the shards
        shards = await self._wire.call_each(
            *(self._call(shard, "due", each, _HIDE_MS) for shard in range(ACTIVE_SHARDS))
        )
        looked = [
            (shard, hidden, SessionName.parse(member.decode()))
            for shard, (_, hidden, members) in enumerate(shards)
            for member in members
        ]
        if not looked:
            return []
        (seconds, micros), *found = await self._wire.call_each(
            ("TIME",),
            *(("HMGET", SessionKeys.of(one).meta, "cur", "lease") for _, _, one in looked),
        )
        now = int(seconds) * 1000 + int(micros) // 1000
        orphans: list[tuple[int, SessionName]] = []
        results: list[Command] = []
        for (shard, hidden, session), (current, lease) in zip(looked, found, strict=True):
            ends = int(lease or 0)
            if not current:
                results.append(self._call(shard, "looked", str(session), hidden, 0))
            elif ends > now:
                results.append(self._call(shard, "looked", str(session), hidden, ends + 1))
            else:
                orphans.append((ends, session))
        orphans.sort()
        for _, session in orphans[most:]:  # no room for it here: others may have some
            shard = active_shard(session)
            results.append(self._call(shard, "name", 0, str(session)))
        if results:
            await self._wire.call_each(*results)
        return [session for _, session in orphans[:most]]

    def _call(self, shard: int, verb: str, *args: str | int) -> Command:
        return RUNNING.call((running_key(shard, self._model),), verb, *args)
