"""The SDK for code without an event loop.

Written by `scripts/sync-client`: change what it is made of.

    with segue.SyncClient("127.0.0.1:7411", device="phone") as client:
        session = client.session("trip")
        with session.run("Plan a day in Paris.", max_tokens=200) as turn:
            for event in turn:
                print(event.text, end="")

One thread of each client runs everything; any number of threads may use it. Ctrl-C ends the wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from segue._portal import Portal
from segue.client import Client
from segue.events import (
    Ended,
    Entry,
    Imported,
    OfflineTurn,
    Reply,
    SessionInfo,
    Snapshot,
    Timing,
    TurnEvent,
)
from segue.follow import Follower
from segue.options import Timeout
from segue.session import Session
from segue.turn import Turn
from segue_contract.errors import SegueError
from segue_contract.limits import MAX_SESSIONS_LISTED, ClientLimits
from segue_contract.sync.export import Export
from segue_contract.sync.ops import Op
from segue_contract.sync.state import Cursor, SessionState


class SyncClient:
    """One device.

        with segue.SyncClient("127.0.0.1:7411", device="phone") as client:
            session = client.session("trip")

    Args:
        address: "host:port" of an edge node or of the cloud, or several in order of preference:
            where one fails, the next one goes on. None: SEGUE_URL, else what `segue login` keeps,
            else the edge of this machine.
        device: this device's name, the same each time; "": a fresh one.
        limits: other bounds than the usual ones.
        token: shown with each call; a function is asked each time, on the client's own thread
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

    _portal: Portal
    _inner: Client

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
        self._portal = Portal()
        self._owner = True
        self._inner = self._portal.run(
            lambda: Client(
                address,
                device=device,
                limits=limits,
                token=token,
                tls_ca=tls_ca,
                tls_cert=tls_cert,
                tls_key=tls_key,
                timeout=timeout,
                max_retries=max_retries,
                find_edges=find_edges,
            )
        )

    @classmethod
    def _of(cls, portal: Portal, inner: Client) -> SyncClient:
        made = cls.__new__(cls)
        made._portal, made._inner = portal, inner
        made._owner = False
        return made

    def _close(self) -> None:
        if self._portal.closed:
            return
        try:
            self._portal.call(self._inner.close)
        finally:
            if self._owner:
                self._portal.close()

    @property
    def device(self) -> str:
        return self._inner.device

    @property
    def addresses(self) -> tuple[str, ...]:
        return self._inner.addresses

    def __enter__(self) -> SyncClient:
        """Connect.

        Raises:
            Unreachable: no address answers.
            InvalidArgument: it is a copy, and what it was copied from was not entered.
        """
        self._portal.call(self._inner.__aenter__)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def with_options(
        self, *, timeout: Timeout | float | None = None, max_retries: int | None = None
    ) -> SyncClient:
        """This client with other options: a copy that shares its connections, and lives no longer.

            client.with_options(timeout=2.0, max_retries=3).sessions()

        None leaves what this client has.
        """
        return SyncClient._of(
            self._portal,
            self._portal.run(
                lambda: self._inner.with_options(timeout=timeout, max_retries=max_retries)
            ),
        )

    def close(self) -> None:
        """Leave. Turns that run go on; followed sessions end. Of a copy: nothing happens."""
        self._close()

    def session(self, name: str, *, must_exist: bool = False, model: str = "") -> SyncSession:
        """Open a session, or create it.

        Args:
            must_exist: raise UnknownSession instead of creating it.
            model: raise UnknownModel where the node serves another one.
        """
        return SyncSession._of(
            self._portal,
            self._portal.call(
                lambda: self._inner.session(name, must_exist=must_exist, model=model)
            ),
        )

    def sessions(self, max_sessions: int = 100) -> list[SessionInfo]:
        """The sessions there are, newest first, `max_sessions` at most."""
        return self._portal.call(lambda: self._inner.sessions(max_sessions))

    def all_sessions(self, page: int = MAX_SESSIONS_LISTED) -> Iterator[SessionInfo]:
        """All sessions, newest first, asked for in pages.

        One that is written to meanwhile comes to the front: it may come twice, or, where it had not
        been reached, not at all.
        """
        return self._portal.iterate(lambda: self._inner.all_sessions(page))

    def delete_session(self, name: str) -> bool:
        """Delete all of a session, for all devices; who follows it gets SessionDeleted.

        Returns:
            False where there is none of that name.

        Raises:
            SessionBusy: a turn runs in it.
        """
        return self._portal.call(lambda: self._inner.delete_session(name))

    def revoke(self, session: str, device: str) -> float:
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
        return self._portal.call(lambda: self._inner.revoke(session, device))

    def expire_sessions(self, idle_s: float) -> list[str]:
        """Delete all sessions that nobody wrote to, opened or used for `idle_s` (1 or more).

        Returns:
            The names of those that are gone.
        """
        return self._portal.call(lambda: self._inner.expire_sessions(idle_s))

    def export_session(self, name: str, file: str | Path) -> Export:
        """Write a session, as it is now, into one file, which is there whole or not at all.

        Raises:
            InvalidArgument: the file cannot be written.
            SessionBusy: the session changes faster than it is read.
        """
        return self._portal.call(lambda: self._inner.export_session(name, file))

    def import_session(self, file: str | Path, name: str = "") -> Imported:
        """Make a session of an exported file, under its old name or `name`.

        Raises:
            BadExport: the file is none, or was changed. Nothing is written then.
            SessionNotEmpty: there is a session of that name with entries.
            OutcomeUnknown: the connection broke; the session is there whole, or not at all.
        """
        return self._portal.call(lambda: self._inner.import_session(file, name))


class SyncSession:
    """Made by `SyncClient.session`.

    Attributes:
        name, device: as given.
        model: what the session is served with. role, instance: who opened it for us.
        created: this call made the session.
        max_context_tokens: prompt, history and reply together may be this long.
        offline_turns: what the edge that opened it had yet to bring into the log, or could not.
    """

    _portal: Portal
    _inner: Session

    @classmethod
    def _of(cls, portal: Portal, inner: Session) -> SyncSession:
        made = cls.__new__(cls)
        made._portal, made._inner = portal, inner
        return made

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def device(self) -> str:
        return self._inner.device

    @property
    def model(self) -> str:
        return self._inner.model

    @property
    def role(self) -> str:
        return self._inner.role

    @property
    def instance(self) -> str:
        return self._inner.instance

    @property
    def created(self) -> bool:
        return self._inner.created

    @property
    def max_context_tokens(self) -> int:
        return self._inner.max_context_tokens

    @property
    def offline_turns(self) -> tuple[OfflineTurn, ...]:
        return self._inner.offline_turns

    @property
    def tail(self) -> Cursor:
        return self._inner.tail

    def with_options(
        self, *, timeout: Timeout | float | None = None, max_retries: int | None = None
    ) -> SyncSession:
        """This session with other options, as `SyncClient.with_options`."""
        return SyncSession._of(
            self._portal,
            self._portal.run(
                lambda: self._inner.with_options(timeout=timeout, max_retries=max_retries)
            ),
        )

    def run(
        self,
        prompt: str,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        plan: str = "",
        when_busy: str = "wait",
        turn: str = "",
        timeout: Timeout | float | None = None,
        max_retries: int | None = None,
    ) -> SyncTurn:
        """One turn, for `with session.run("...") as turn`.

        Args:
            max_tokens: tokens of the reply at most.
            temperature: 0 always takes the likeliest token.
            top_p, top_k, min_p: which tokens may be drawn; 1, 0 and 0 mean all.
            seed: of what is drawn at a temperature above 0; None: a fresh one. Equal seeds draw
                equal tokens from equal logits, on any machine. Edge and cloud compute slightly
                different logits: at temperature 0.8 some 3 to 5 % of tokens differ between them
                (the default model), and behind the first of these the replies are different ones.
            stop: texts that end the reply (and are left out of it).
            plan: forces who computes what ("edge", "ship", "text"); "" leaves it to the planner.
            when_busy: "wait" for the session's running turn, or "refuse" with SessionBusy.
            turn: an id of your own; a known one joins that turn instead of running again.
            timeout, max_retries: for this turn, else the session's. A turn is asked for again as
                long as it was not accepted; what is lost afterwards is always joined again.

        Raises:
            EmptyPrompt, PromptTooLong, BadSampling, InvalidArgument: before anything is sent.
        """
        return SyncTurn._of(
            self._portal,
            self._portal.run(
                lambda: self._inner.run(
                    prompt,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=top_k,
                    min_p=min_p,
                    seed=seed,
                    stop=stop,
                    plan=plan,
                    when_busy=when_busy,
                    turn=turn,
                    timeout=timeout,
                    max_retries=max_retries,
                )
            ),
        )

    def stop(self, turn: str = "") -> bool:
        """Cancel the running turn (or `turn`), whoever started it.

        Returns:
            Whether one was running.
        """
        return self._portal.call(lambda: self._inner.stop(turn))

    def follow(self, from_offset: int = 0) -> SyncFollower:
        """The session, live: `for item in session.follow()`.

        The first item is a `Snapshot`; then comes an `Entry` for every later offset, once and in
        order, until you leave the loop.

        Args:
            from_offset: 0 folds everything so far into the snapshot. N: the snapshot is the state
                at N (or the first later one that the log still has), and entries follow one by one.
        """
        return SyncFollower._of(
            self._portal, self._portal.run(lambda: self._inner.follow(from_offset))
        )

    def read(self, from_offset: int = 0) -> list[Snapshot | Entry]:
        """The log after `from_offset`, up to now.

        A `Snapshot` stands for entries that were compacted, or replaces all where the log's
        generation changed.
        """
        return self._portal.call(lambda: self._inner.read(from_offset))

    def state(self) -> SessionState:
        """The whole session, folded now: turns with prompts and replies, values, claims."""
        return self._portal.call(lambda: self._inner.state())

    def dismiss(self, *turns: str) -> int:
        """The user knows that the log refused these messages for good: the edge that keeps them
        for it (`offline_turns`, `SyncTurn.settled`) need not tell of them again.

        Args:
            turns: ids of turns of this device.

        Returns:
            How many the node that serves this session now had kept until then.

        Raises:
            Unreachable: no node answers.
        """
        return self._portal.call(lambda: self._inner.dismiss(*turns))

    def append(self, *ops: Op) -> Cursor:
        """Append ops of this device, each once, all or none; `id`, `device`, `at_ms` are filled in.

        Returns:
            The place of the first one.

        Raises:
            InvalidArgument: no op, more than one message takes, or of a kind that only a turn's
                owner writes.
            OutcomeUnknown: it was sent, and no answer came in time: the log says whether it is
                there.
        """
        return self._portal.call(lambda: self._inner.append(*ops))

    def set(self, name: str, value: bytes | str) -> Cursor:
        """Set a named value of the session; the last writer by log order wins."""
        return self._portal.call(lambda: self._inner.set(name, value))


class SyncTurn:
    """Made by `SyncSession.run`; use it with `with`, and iterate over its events.

    Entering waits until the turn was accepted. From then on it runs to its end: leaving the block
    early, or losing the connection, never cancels it; `stop` does. Where the stream breaks, the
    turn is joined again, at the next address if need be, and goes on without a token lost or
    doubled. The next event tells `Rewound` where previews had to be taken back.

    Attributes:
        id: the turn's id in the session log.
        timing: what this device measured.
    """

    _portal: Portal
    _inner: Turn

    @classmethod
    def _of(cls, portal: Portal, inner: Turn) -> SyncTurn:
        made = cls.__new__(cls)
        made._portal, made._inner = portal, inner
        return made

    @property
    def id(self) -> str:
        return self._inner.id

    @property
    def timing(self) -> Timing:
        return self._inner.timing

    def __enter__(self) -> SyncTurn:
        """Start the turn and wait until it is accepted.

        Raises:
            SessionBusy: another turn runs, and `when_busy` is "refuse".
            Overloaded, PromptTooLong, UnknownModel, ...: what the node refused it for.
            Unreachable: no node could be reached.
            DeadlineExceeded: it took longer than `timeout` allows.
        """
        self._portal.call(self._inner.__aenter__)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._portal.leave(lambda: self._inner.__aexit__(exc_type, exc, trace))

    def __iter__(self) -> Iterator[TurnEvent]:
        return self._portal.iterate(lambda: self._inner)

    @property
    def text(self) -> str:
        """The reply so far."""
        return self._inner.text

    @property
    def tokens(self) -> tuple[int, ...]:
        return self._inner.tokens

    @property
    def durable_index(self) -> int:
        """Tokens of the reply, from the first on, that the session log holds."""
        return self._inner.durable_index

    @property
    def ended(self) -> Ended | None:
        return self._inner.ended

    @property
    def address(self) -> str:
        """The node that serves this turn to us now."""
        return self._inner.address

    def settled(self) -> Iterator[TurnEvent]:
        """What the log makes of a reply that ended out of its reach; for after its end.

        Where the log keeps what was shown: `Durable`, and an `Ended` that is durable. Where it has
        other tokens: `Rewound` and these first. Where it refused the message for good: `Ended` with
        the error. Nothing where the end was durable. It waits until the edge that served the turn
        has a cloud again, however long that takes: to `close` the client ends it.
        """
        return self._portal.iterate(lambda: self._inner.settled())

    def result(self) -> Reply:
        """Wait for the end and return the whole reply.

        Raises:
            TurnFailed: the turn ended with an error; `fields["code"]` says which.
        """
        return self._portal.call(lambda: self._inner.result())

    def stop(self) -> bool:
        """Cancel this turn, for everyone. False: it was not running (any more)."""
        return self._portal.call(lambda: self._inner.stop())


class SyncFollower:
    """Iterate over it: `for item in session.follow()`. Leaving the loop ends it.

    Attributes:
        live: what brings new entries now: "mqtt" or "grpc"; "" before the first item.
    """

    _portal: Portal
    _inner: Follower

    @classmethod
    def _of(cls, portal: Portal, inner: Follower) -> SyncFollower:
        made = cls.__new__(cls)
        made._portal, made._inner = portal, inner
        return made

    def __iter__(self) -> Iterator[Snapshot | Entry]:
        return self._portal.iterate(lambda: self._inner.__aiter__())

    @property
    def live(self) -> str:
        return self._inner.live

    @property
    def unauthentic(self) -> int:
        """Messages that came over MQTT and that no cloud had sealed; none of them was taken."""
        return self._inner.unauthentic

    @property
    def mqtt_refusal(self) -> SegueError | None:
        """Why the broker does not take this device, which then follows over gRPC; None: it does, or
        was not reached."""
        return self._inner.mqtt_refusal

    @property
    def cursor(self) -> Cursor:
        """Everything up to here was yielded or folded into a snapshot."""
        return self._inner.cursor

    @property
    def state(self) -> SessionState:
        """The session folded so far. It changes as items come; do not change it yourself."""
        return self._inner.state

    def close(self) -> None:
        """End the iteration, whoever runs it; nothing further comes."""
        return self._portal.call(lambda: self._inner.aclose())
