"""Names of everything the cloud keeps in Redis.

All keys of one session share the hash tag `{tenant:session}`, so the log's script touches one slot
of a Redis Cluster. What spans sessions (the index of a tenant, the lists of active sessions) lies
under tags of its own and is written by separate commands *before* the session itself: after a crash
in between they name a session that is missing or clean, which readers skip.
"""

from __future__ import annotations

from binascii import crc_hqx
from dataclasses import dataclass, fields
from functools import lru_cache

from segue_contract.ids import SessionName
from segue_contract.limits import ACTIVE_SHARDS, SESSION_CACHE

_SLOTS = 16384


@dataclass(frozen=True)
class SessionKeys:
    """The keys of one session, in the order in which the script takes them."""

    log: str
    meta: str
    producers: str
    turns: str
    devices: str
    snapshot: str

    @staticmethod
    @lru_cache(SESSION_CACHE)  # they are asked for with every append
    def of(session: SessionName) -> SessionKeys:
        tag = f"segue:{{{session}}}"
        return SessionKeys(*(f"{tag}:{one.name}" for one in fields(SessionKeys)))

    def staged(self, nonce: str) -> SessionKeys:
        """The keys under which an import is written before it becomes the session."""
        return SessionKeys(*(f"{key}:{nonce}" for key in self.all))

    @property
    def all(self) -> tuple[str, ...]:
        return (self.log, self.meta, self.producers, self.turns, self.devices, self.snapshot)

    @property
    def tail_channel(self) -> str:
        """Where the log's script publishes each new tail: a channel named as its meta."""
        return self.meta

    @staticmethod
    def session_of(key: str) -> SessionName:
        """Whose `key` it is."""
        return SessionName.parse(key[key.index("{") + 1 : key.index("}")])


def index_key(tenant: str) -> str:
    """Sorted set: a tenant's sessions by their last write, ms (to ACTIVE_REFRESH_S)."""
    return f"segue:index:{{{tenant}}}"


def active_key(shard: int) -> str:
    """Sorted set: "tenant:session" by the time when a writer last named it, ms."""
    return f"segue:active:{{{shard}}}"


def running_key(shard: int, model: str) -> str:
    """Sorted set: sessions in which a turn of `model` runs, by when to look at its lease, ms."""
    return f"segue:running:{{{shard}}}:{model}"


# Sorted set: what was revoked lately, JSON of [tenant, session or "beginning*", device], by the
# time before which tokens are void, ms. The mark that counts lies in each session's meta; this
# tells the instances of it.
REVOKED_KEY = "segue:revoked"


def void_key(tenant: str, device: str) -> str:
    """Hash: "beginning*" by the time before which the device's tokens are void for all sessions
    whose names begin so, ms: of those that are made later no meta says it."""
    return f"segue:void:{{{tenant}:{device}}}"


# 32 random bytes, the same for all instances of a store. Who knows it can forge what is published.
SECRET_KEY = "segue:secret"


# Devices' logins at the broker, as `logins.lua` says.
LOGIN_OWNERS_KEY = "segue:{logins}:owners"
LOGIN_ENDS_KEY = "segue:{logins}:ends"
LOGIN_GONE_KEY = "segue:{logins}:gone"


def beat_channel(name: str) -> str:
    """Where a listener named so hears what it publishes itself."""
    return f"segue:beat:{name}"


def active_shard(session: SessionName) -> int:
    return crc_hqx(str(session).encode(), 0) % ACTIVE_SHARDS


def key_slot(key: str) -> int:
    """The Cluster slot of `key`: CRC-16/XMODEM of its hash tag, modulo 16384."""
    start = key.find("{")
    end = key.find("}", start + 1)
    tag = key[start + 1 : end] if start >= 0 and end > start + 1 else key
    return crc_hqx(tag.encode(), 0) % _SLOTS
