"""`FakeNode` for tests without an event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType

from segue._portal import Portal
from segue.errors import SegueError
from segue.options import Timeout
from segue.sync import SyncClient
from segue.testing.fake_node import FakeNode
from segue.testing.script import Reply
from segue_contract.limits import ClientLimits
from segue_contract.sync.state import SessionState


class SyncFakeNode:
    """`with SyncFakeNode(["Hello!"]) as node: with node.client("phone") as client: ...`

    The methods are those of `FakeNode`; all clients run on its one thread.
    """

    def __init__(self, replies: Iterable[Reply] = (), *, model: str = "fake") -> None:
        self._portal = Portal()
        self._node = self._portal.run(lambda: FakeNode(replies, model=model))
        self.replies, self.prompts = self._node.replies, self._node.prompts

    def __enter__(self) -> SyncFakeNode:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if not self._portal.closed:
            try:
                self._portal.call(self._node.close)
            finally:
                self._portal.close()

    def client(
        self,
        device: str = "",
        *,
        limits: ClientLimits = ClientLimits(),
        timeout: Timeout | float | None = None,
        max_retries: int | None = None,
    ) -> SyncClient:
        """A client of this node; use it with `with`."""

        def made() -> SyncClient:
            inner = self._node.client(
                device, limits=limits, timeout=timeout, max_retries=max_retries
            )
            return SyncClient._of(self._portal, inner)

        return self._portal.run(made)

    def state(self, session: str) -> SessionState:
        return self._portal.run(lambda: self._node.state(session))

    def until(self, session: str, condition: Callable[[SessionState], bool]) -> None:
        """Wait until it holds of the session; it is asked whenever a log changes.

        node.until("trip", lambda state: state.turns[-1].ended)
        """
        node = self._node
        self._portal.call(lambda: node.until(lambda: condition(node.state(session))))

    def fail_next(self, verb: str, error: SegueError, *, times: int = 1) -> None:
        self._portal.run(lambda: self._node.fail_next(verb, error, times=times))

    def break_connections(self) -> None:
        self._portal.run(self._node.break_connections)

    def disconnect(self) -> None:
        self._portal.run(self._node.disconnect)

    def reconnect(self) -> None:
        self._portal.run(self._node.reconnect)

    def lose_entries(self, session: str, count: int) -> None:
        self._portal.run(lambda: self._node.lose_entries(session, count))
