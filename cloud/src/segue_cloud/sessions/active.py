"""The sessions that somebody wrote to lately: where the fan-out's sweep looks for what was left
undone, and which of them went idle. Named by whoever writes, before the write; see `keys.py`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from segue_cloud.sessions import scripts
from segue_cloud.sessions.keys import SessionKeys, active_key, active_shard
from segue_cloud.sessions.scripts import Command
from segue_cloud.sessions.wire import Wire
from segue_contract.ids import SessionName
from segue_contract.limits import ACTIVE_REFRESH_S, ACTIVE_SHARDS, SESSION_CACHE

ACTIVE = scripts.load("active.lua")


class ActiveSessions:
    """All of this store's, of all instances; and which of them this process named of late."""

    def __init__(self, wire: Wire, monotonic: Callable[[], float]) -> None:
        self._wire = wire
        self._monotonic = monotonic
        self._named: OrderedDict[SessionName, float] = OrderedDict()  # when
        self._looked_at = 0  # where the sweep goes on, in each list

    def fresh(self, session: SessionName) -> bool:
        """This process named it so lately that it need not again."""
        named = self._named.get(session)
        return named is not None and self._monotonic() - named < ACTIVE_REFRESH_S

    def touch(self, session: SessionName) -> Command:
        """What names it. Say `touched` once that was sent, with the time before."""
        return ACTIVE.call((active_key(active_shard(session)),), "touch", str(session))

    def touched(self, session: SessionName, at: float) -> None:
        self._named[session] = at
        self._named.move_to_end(session)
        while len(self._named) > SESSION_CACHE:
            self._named.popitem(last=False)

    async def take_dirty(self, max_sessions: int, older_than_s: float) -> list[SessionName]:
        """As the store port says; each call looks at the next `max_sessions` active sessions."""
        each = -(-max_sessions // ACTIVE_SHARDS)
        start, stop = self._looked_at, self._looked_at + each - 1
        shards = await self._wire.call_each(
            *(("ZREVRANGE", active_key(shard), start, stop) for shard in range(ACTIVE_SHARDS))
        )
        more = any(len(shard) == each for shard in shards)
        self._looked_at = stop + 1 if more else 0
        active = [SessionName.parse(member.decode()) for shard in shards for member in shard]
        if not active:
            return []
        now, *since = await self._wire.call_each(
            ("TIME",), *(("HGET", SessionKeys.of(one).meta, "da") for one in active)
        )
        latest_ms = int(now[0]) * 1000 + int(now[1]) // 1000 - older_than_s * 1000
        dirty = [
            one
            for one, at in zip(active, since, strict=True)
            if at is not None and 0 < int(at) <= latest_ms
        ]
        return dirty[:max_sessions]

    async def take_idle(self, max_sessions: int, idle_s: float) -> list[SessionName]:
        """As the store port says. A dirty one stays in the lists, for the sweep to find."""
        each = -(-max_sessions // ACTIVE_SHARDS)
        idle_ms = int(idle_s * 1000)
        shards = await self._wire.call_each(
            *(
                ACTIVE.call((active_key(shard),), "idle", idle_ms, each)
                for shard in range(ACTIVE_SHARDS)
            )
        )
        idle = [SessionName.parse(member.decode()) for shard in shards for member in shard]
        if not idle:
            return []
        dirty = await self._wire.call_each(
            *(("HGET", SessionKeys.of(one).meta, "da") for one in idle)
        )
        members: dict[int, list[str]] = {}
        commands: list[Command] = []
        for session, since in zip(idle, dirty, strict=True):
            shard = active_shard(session)
            if since is not None and int(since) > 0:
                commands.append(self.touch(session))
            else:
                members.setdefault(shard, []).append(str(session))
        touched = len(commands)
        for shard, names in members.items():
            commands.append(ACTIVE.call((active_key(shard),), "take", idle_ms, *names))
        taken = (await self._wire.call_each(*commands))[touched:]
        return [SessionName.parse(member.decode()) for shard in taken for member in shard]
