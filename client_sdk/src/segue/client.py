"""The entrance: one device, the nodes it may talk to, and one MQTT connection."""

from __future__ import annotations

import asyncio
import copy
import os
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from segue._access import Access, read_access
from segue._config_file import config_path, read_contexts
from segue._finding import Finding
from segue._nodes import Nodes
from segue._renewing import keep_renewed
from segue._settings import find_settings
from segue._tails import Tails
from segue._transfer import export_session, import_session
from segue.errors import InvalidArgument
from segue.events import Imported, SessionInfo
from segue.follow import Follower, Where
from segue.options import Options, Timeout
from segue.session import Session
from segue_contract.identity.principal import check_session_pattern
from segue_contract.ids import check_id, new_id
from segue_contract.limits import MAX_COUNT, MAX_SESSIONS_LISTED, ClientLimits
from segue_contract.sync.export import Export
from segue_contract.sync.state import Cursor
from segue_contract.transport.together import end
from segue_contract.v1 import agent_pb2 as pb

if TYPE_CHECKING:
    from segue._mqtt import Broker


class Client:
    """One device.

        async with segue.Client("127.0.0.1:7411", device="phone") as client:
            session = await client.session("trip")

    Args:
        address: "host:port" of an edge node or of the cloud, or several in order of preference:
            where one fails, the next one goes on. None: SEGUE_URL, else what `segue login` keeps,
            else the edge of this machine.
        device: this device's name, the same each time; "": a fresh one.
        limits: other bounds than the usual ones.
        token: shown with each call; a function is asked each time, on the event loop's thread
            (everything of the client stands still while it blocks: let it give what the app
            fetched before), and streams that go on are renewed with what it gives. None:
            SEGUE_TOKEN; where no `address` is given, else what `segue login` keeps. "": none. It
            leaves this machine over TLS only.
        tls_ca: PEM file of the authorities whose nodes are believed, or "system" for the public
            ones: TLS is on. None: SEGUE_CA, else alike. "": off.
        tls_cert, tls_key: PEM files, where nodes ask for a client certificate. None: SEGUE_CERT,
            SEGUE_KEY. Files are read for each new connection.
        timeout: of all calls; a number is the `total` of a `Timeout`.
        max_retries: how often a call is repeated after all addresses were tried: where none can
            be reached or has room, or the error says when to come back (`retry_after_s`), which is
            then waited for. None: for 2.5 s in calls of an open session, else not.
        find_edges: ask the nodes which edges there are (`segue edge --public-url`), measure how far
            each is, and use the nearest one; a clearly nearer one is moved to, and running turns
            end where they are. The addresses that were given are measured, too.

    Raises:
        InvalidArgument: an address or the name cannot be one, a file is missing its partner, the
            token would travel unencrypted, or the file of `segue login` cannot be used.

    Attributes:
        device, addresses: what it uses.
    """

    def __init__(
        self,
        address: str | Sequence[str] | None = None,
        *,
        device: str = "",
        limits: ClientLimits = ClientLimits(),
        token: str | Callable[[], str] | None = None,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
        timeout: Timeout | float | None = None,
        max_retries: int | None = None,
        find_edges: bool = False,
    ) -> None:
        settings = find_settings(
            os.environ, lambda: read_contexts(config_path(os.environ)), address=address
        )
        access = read_access(
            settings, token=token, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key
        )
        if address is None:
            address = settings.addresses
        addresses = (address,) if isinstance(address, str) else tuple(address)
        options = Options().changed(timeout, max_retries)
        self._begin(access, addresses, device, limits, options, find_edges)

    @classmethod
    def _over(
        cls,
        access: Access,
        addresses: Sequence[str],
        *,
        device: str = "",
        limits: ClientLimits = ClientLimits(),
        timeout: Timeout | float | None = None,
        max_retries: int | None = None,
    ) -> Client:
        """A client that asks neither the environment nor a file; for `segue.testing`."""
        client = cls.__new__(cls)
        options = Options().changed(timeout, max_retries)
        client._begin(access, addresses, device, limits, options)
        return client

    def _begin(
        self,
        access: Access,
        addresses: Sequence[str],
        device: str,
        limits: ClientLimits,
        options: Options,
        find_edges: bool = False,
    ) -> None:
        self.device = check_id(device, "device") if device else new_id("device-", os.urandom)
        self.addresses = tuple(addresses)
        self._access = access
        self._nodes = Nodes(self.addresses, access=access, options=options)
        self._original: Client | None = None  # of a copy
        self._entered = False
        self._limits = limits
        self._brokers: dict[tuple[str, str], Broker] = {}  # by URL, and session or ""
        self._tails = Tails(self._nodes, self.device)
        self._followers: weakref.WeakSet[Follower] = weakref.WeakSet()
        self._renewing: asyncio.Task[None] | None = None
        self._finding = Finding(self._nodes, self.addresses) if find_edges else None
        self._looking: asyncio.Task[None] | None = None

    def with_options(
        self, *, timeout: Timeout | float | None = None, max_retries: int | None = None
    ) -> Client:
        """This client with other options: a copy that shares its connections, and lives no longer.

            await client.with_options(timeout=2.0, max_retries=3).sessions()

        None leaves what this client has.
        """
        twin = copy.copy(self)
        twin._nodes = self._nodes.with_options(self._nodes.options.changed(timeout, max_retries))
        twin._original = self._original or self
        return twin

    async def __aenter__(self) -> Client:
        """Connect.

        Raises:
            Unreachable: no address answers.
            InvalidArgument: it is a copy, and what it was copied from was not entered.
        """
        if self._original is not None:
            if not self._original._entered:
                raise InvalidArgument(
                    "A copy of a client was entered, and the client was not: nothing would renew "
                    "its token, or close it.",
                    hint="Write `async with segue.Client(...) as client:`, then with_options.",
                )
            return self
        self._entered = True
        try:
            await self._access.prepare()
            await self._nodes.connect()
            if self._access.renews and self._access.token is not None:
                work = keep_renewed(self._access.token, self._renew)
                self._renewing = asyncio.create_task(work, name="token")
            if self._finding is not None:
                await self._finding.first()
                self._looking = asyncio.create_task(self._finding.run(), name="nearest edge")
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Leave. Turns that run go on; followed sessions end. Of a copy: nothing happens."""
        if self._original is not None:
            return
        if self._renewing is not None:
            await end(self._renewing)
        if self._looking is not None:
            await end(self._looking)
        for follower in list(self._followers):
            await follower.aclose()
        await self._tails.close()
        for broker in self._brokers.values():
            await broker.close()
        self._brokers.clear()
        await self._nodes.close()

    async def _renew(self) -> None:
        await self._nodes.everywhere("Renew", pb.RenewRequest())

    async def session(self, name: str, *, must_exist: bool = False, model: str = "") -> Session:
        """Open a session, or create it.

        Args:
            must_exist: raise UnknownSession instead of creating it.
            model: raise UnknownModel where the node serves another one.
        """
        request = pb.OpenSessionRequest(
            session=check_id(name, "session"),
            device=self.device,
            model=model,
            must_exist=must_exist,
            producer=new_id("p", os.urandom),
        )
        reply: pb.OpenSessionReply = await self._nodes.unary("OpenSession", request)
        return Session(
            self._nodes, reply, self.device, self._follow, request.producer, self._limits
        )

    async def sessions(self, max_sessions: int = 100) -> list[SessionInfo]:
        """The sessions there are, newest first, `max_sessions` at most."""
        if max_sessions < 1:
            raise InvalidArgument(f"max_sessions is {max_sessions}.", hint="Use 1 or more.")
        found: list[SessionInfo] = []
        async for one in self.all_sessions(min(max_sessions, MAX_SESSIONS_LISTED)):
            found.append(one)
            if len(found) == max_sessions:
                break
        return found

    async def all_sessions(self, page: int = MAX_SESSIONS_LISTED) -> AsyncIterator[SessionInfo]:
        """All sessions, newest first, asked for in pages.

        One that is written to meanwhile comes to the front: it may come twice, or, where it had not
        been reached, not at all.
        """
        after = ""
        while True:
            reply: pb.ListSessionsReply = await self._nodes.unary(
                "ListSessions", pb.ListSessionsRequest(max_sessions=page, after=after)
            )
            for one in reply.sessions:
                yield SessionInfo(
                    session=one.session,
                    cursor=Cursor(one.tail.generation, one.tail.offset),
                    updated_ms=one.updated_ms,
                    title=one.title,
                    turns=one.turns,
                    running_turn=one.running_turn,
                )
            after = reply.next
            if not after:
                return

    async def delete_session(self, name: str) -> bool:
        """Delete all of a session, for all devices; who follows it gets SessionDeleted.

        Returns:
            False where there is none of that name.

        Raises:
            SessionBusy: a turn runs in it.
        """
        request = pb.DeleteSessionRequest(session=check_id(name, "session"))
        reply: pb.DeleteSessionReply = await self._nodes.unary("DeleteSession", request)
        return bool(reply.deleted)

    async def revoke(self, session: str, device: str) -> float:
        """Make void what tokens a device has for a session now; its streams end. Tokens that are
        issued for it half a minute later count. Needs the right "admin".

        Args:
            session: its name; or the beginning of names and "*": for all such sessions, also those
                that the device would make. "*": the device as a whole.

        Returns:
            Unix seconds, before which its tokens are void.

        Raises:
            PermissionDenied, UnknownSession.
        """
        request = pb.RevokeRequest(
            session=check_session_pattern(session), revoked=check_id(device, "device")
        )
        reply: pb.RevokeReply = await self._nodes.unary("Revoke", request)
        return float(reply.before_ms) / 1000

    async def expire_sessions(self, idle_s: float) -> list[str]:
        """Delete all sessions that nobody wrote to, opened or used for `idle_s` (1 or more).

        Returns:
            The names of those that are gone.
        """
        if not 1 <= idle_s <= MAX_COUNT / 1000:
            raise InvalidArgument(f"idle_s is {idle_s}.", hint="Use seconds, 1 or more.")
        gone: list[str] = []
        more = True
        while more:
            reply: pb.ExpireSessionsReply = await self._nodes.unary(
                "ExpireSessions", pb.ExpireSessionsRequest(idle_s=int(idle_s))
            )
            gone += reply.deleted
            more = reply.more
        return gone

    async def export_session(self, name: str, file: str | Path) -> Export:
        """Write a session, as it is now, into one file, which is there whole or not at all.

        Raises:
            InvalidArgument: the file cannot be written.
            SessionBusy: the session changes faster than it is read.
        """
        return await export_session(self._nodes, name, Path(file))

    async def import_session(self, file: str | Path, name: str = "") -> Imported:
        """Make a session of an exported file, under its old name or `name`.

        Raises:
            BadExport: the file is none, or was changed. Nothing is written then.
            SessionNotEmpty: there is a session of that name with entries.
            OutcomeUnknown: the connection broke; the session is there whole, or not at all.
        """
        return await import_session(self._nodes, Path(file), name)

    def _follow(self, mqtt_url: str, where: Where) -> Follower:
        broker = self._broker(mqtt_url, where)
        follower = Follower(self._nodes, broker, where, self._tails, self._limits)
        self._followers.add(follower)
        return follower

    def _broker(self, url: str, where: Where) -> Broker | None:
        """One connection per broker, or session where each has a login; None where only gRPC
        carries the live view."""
        session = where.name.session if where.needs_login else ""
        if url and (url, session) not in self._brokers:
            from segue._mqtt import Broker  # aiomqtt is loaded only where a session is followed

            async def admit(user: str) -> pb.OpenSessionReply:
                request = pb.OpenSessionRequest(
                    session=session,
                    device=self.device,
                    must_exist=True,
                    wants_login=True,
                    mqtt_user=user,
                )
                reply: pb.OpenSessionReply = await self._nodes.unary("OpenSession", request)
                return reply

            try:
                broker = Broker(url, self._access.tls, admit=admit if session else None)
            except InvalidArgument:
                return None  # a kind of broker that we do not speak to
            self._brokers[url, session] = broker
        return self._brokers.get((url, session))
