"""A token that a command prints, asked again before it runs out."""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from collections.abc import Callable

from segue._renewing import expires_s
from segue_contract.errors import InvalidArgument, Unauthenticated
from segue_contract.limits import MAX_TOKEN_BYTES, RENEW_LEAD_S, TOKEN_COMMAND_TIMEOUT_S


class TokenCommand:
    """Call it for the token, from any thread. It waits for the command only where there is none
    that is still good; `refresh` beforehand keeps an event loop from that.

    Args:
        command: a program and its arguments, as a shell would split them; no shell runs it.

    Raises:
        InvalidArgument: there is no program in it.
    """

    def __init__(
        self,
        command: str,
        *,
        now_s: Callable[[], float] = time.time,
        run: Callable[[list[str]], str] | None = None,
    ) -> None:
        try:
            self._arguments = shlex.split(command)
        except ValueError as error:
            raise InvalidArgument("The token's command has an open quote.") from error
        if not self._arguments:
            raise InvalidArgument("The token's command is empty.")
        self._now_s = now_s
        self._run = run or _printed
        self._token = ""
        self._ends_s = self._renew_s = float("-inf")
        self._asking = threading.Lock()

    def __call__(self) -> str:
        """Raises Unauthenticated: the command gives none."""
        now, token = self._now_s(), self._token
        if now >= self._ends_s:
            self.refresh()
            return self._token
        if now >= self._renew_s and not self._asking.locked():
            threading.Thread(target=self._refresh_quietly, name="token", daemon=True).start()
        return token

    def refresh(self) -> None:
        """Ask the command where the token runs out soon. Raises Unauthenticated."""
        with self._asking:
            now = self._now_s()
            if now < self._renew_s:
                return  # another thread just did
            token = self._run(self._arguments).strip()
            if not token or len(token) > MAX_TOKEN_BYTES:
                raise Unauthenticated("The command for the token printed none.")
            self._token, self._ends_s = token, expires_s(token)
            left_s = self._ends_s - now
            self._renew_s = self._ends_s - min(2 * RENEW_LEAD_S, left_s / 2)

    def forget(self) -> None:
        """A node refused the token: one that does not say when it ends may have ended."""
        if self._ends_s == float("inf"):
            self._ends_s = self._renew_s = float("-inf")

    def _refresh_quietly(self) -> None:
        try:
            self.refresh()
        except Unauthenticated:
            pass  # the one we have is good yet; after its end the error is told


def _printed(arguments: list[str]) -> str:
    """Standard output of a program. Its standard error is the user's."""
    hint = "`segue config show` says which command it is."
    try:
        done = subprocess.run(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=TOKEN_COMMAND_TIMEOUT_S,
            check=True,
        )
        return done.stdout.decode()
    except subprocess.TimeoutExpired:
        text = f"The command for the token took longer than {TOKEN_COMMAND_TIMEOUT_S:g} s."
        raise Unauthenticated(text, hint=hint) from None  # it holds the output so far
    except subprocess.CalledProcessError as error:
        text = f"The command for the token ended with exit code {error.returncode}."
        raise Unauthenticated(text, hint=hint) from None  # its output is nobody's business
    except (OSError, UnicodeDecodeError) as error:
        text = f"The command for the token cannot be used: {type(error).__name__}."
        raise Unauthenticated(text, hint=hint) from None
