"""The file of contexts on this machine: read with care, replaced as a whole, for its user alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from segue._contexts import Contexts, format_contexts, parse_contexts
from segue_contract.errors import InvalidArgument
from segue_contract.limits import MAX_CONFIG_BYTES

PATH_VARIABLE = "SEGUE_CONFIG"


def config_path(env: Mapping[str, str]) -> Path:
    """SEGUE_CONFIG, else `segue/config.toml` in the user's folder of settings."""
    if given := env.get(PATH_VARIABLE, ""):
        return Path(given)
    if os.name == "nt" and (roaming := env.get("APPDATA", "")):
        return Path(roaming) / "segue" / "config.toml"
    base = env.get("XDG_CONFIG_HOME", "")
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".config"
    return folder / "segue" / "config.toml"


def read_contexts(path: Path) -> Contexts:
    """No file: no contexts.

    Raises:
        InvalidArgument: it cannot be read, is no such file, others may write it, or read a token
            in it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(MAX_CONFIG_BYTES + 1).decode()
    except FileNotFoundError:
        return Contexts()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"{path} cannot be read: {type(error).__name__}.",
            hint=f"Mend or remove it; {PATH_VARIABLE} names another one.",
        ) from error
    try:
        if len(text) > MAX_CONFIG_BYTES:
            raise InvalidArgument(f"It has more than {MAX_CONFIG_BYTES} bytes.")
        found = parse_contexts(text)
    except InvalidArgument as error:
        raise InvalidArgument(f"{path}: {error.message}", hint=error.hint) from error
    secret = any(context.token for context in found.contexts.values())
    if secret and os.name == "posix" and mode & 0o077:
        raise InvalidArgument(
            f"{path} holds a token, and others on this machine may read it.",
            hint=f"chmod 600 {path}",
        )
    if found.contexts and os.name == "posix" and mode & 0o022:
        raise InvalidArgument(
            f"{path} says where tokens go and what is run for them, and others on this machine may "
            "write it.",
            hint=f"chmod 600 {path}",
        )
    return found


def write_contexts(path: Path, contexts: Contexts) -> None:
    """Replace the file: whole, or not at all. Raises InvalidArgument."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        file = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w", encoding="utf-8") as out:
            out.write(format_contexts(contexts))
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise InvalidArgument(
            f"{path} cannot be written: {error.strerror}.",
            hint=f"{PATH_VARIABLE} names another file.",
        ) from error
