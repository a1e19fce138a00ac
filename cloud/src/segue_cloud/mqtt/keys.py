"""The keys that authenticate what is published: of one secret, which lies in the store."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from segue_contract.ids import SessionName
from segue_contract.limits import SESSION_CACHE
from segue_contract.topics import live_key

_SECRET_BYTES = 32


class Secrets(Protocol):
    async def agree_secret(self, ours: bytes) -> bytes: ...


class LiveKeys:
    """All instances of a store have the same; `agree` now and then, since a store may lose its
    secret, and the instances that run would go on with it while a new one makes another."""

    def __init__(self, store: Secrets, random_bytes: Callable[[int], bytes] = os.urandom) -> None:
        self._store = store
        self._secret = random_bytes(_SECRET_BYTES)
        self._agreed = False
        self._agreeing = asyncio.Lock()
        self._keys: OrderedDict[tuple[SessionName, int], bytes] = OrderedDict()

    async def agree(self) -> None:
        """Have the secret that the store has, or give it ours. Raises StoreUnavailable."""
        secret = await self._store.agree_secret(self._secret)
        if secret != self._secret:
            self._secret = secret
            self._keys.clear()
        self._agreed = True

    async def secret(self) -> bytes:
        """Raises StoreUnavailable."""
        if not self._agreed:
            async with self._agreeing:
                if not self._agreed:
                    await self.agree()
        return self._secret

    async def of(self, session: SessionName, generation: int) -> bytes:
        """See `live_key`. Raises StoreUnavailable."""
        secret = await self.secret()
        key = self._keys.get((session, generation))
        if key is None:
            key = self._keys[session, generation] = live_key(secret, session, generation)
            if len(self._keys) > SESSION_CACHE:
                self._keys.popitem(last=False)
        return key
