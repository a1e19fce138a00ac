"""How a build step, a process of its own, tells its parent how far it is: JSON lines on stdout.

    {"event": "progress", "done": 0.4, "what": "Dequantising layer 12 of 30"}
    {"event": "error", "code": "model_build_failed", "message": "...", "hint": "..."}

A step ends with exit status 0, or with one error line and status 1.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable

from segue_contract.errors import ModelBuildFailed, SegueError

Progress = Callable[[float, str], None]


def tell(done: float, what: str) -> None:
    """Report the share `done` in [0, 1] of this step, and `what` it does now."""
    _line({"event": "progress", "done": round(min(max(done, 0.0), 1.0), 4), "what": what})


def run_step(step: Callable[[], None]) -> int:
    """Run `step`; every failure becomes one error line. Returns the exit status."""
    try:
        step()
    except SegueError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail(ModelBuildFailed("The build was interrupted.", hint="Start it again."))
    except (OSError, MemoryError) as error:
        _fail(explain_os_error(error))
    except Exception as error:
        # Libraries raise anything: some wrap the system's "disk full" in errors of their own.
        _fail(explain_os_error(error))
    else:
        return 0
    return 1


def explain_os_error(error: BaseException) -> ModelBuildFailed:
    """A build failure in words a user can act on; a full disk is recognised by name."""
    text = " ".join(str(error).split())[:500] or type(error).__name__
    number = getattr(error, "errno", None)
    if number == errno.EDQUOT or "quota" in text.lower():
        return ModelBuildFailed(
            f"The disk quota is used up: {text}.", hint="Free some space and build again."
        )
    if number in (errno.ENOSPC, errno.EFBIG) or names_full_disk(text):
        return disk_full(text)
    if isinstance(error, MemoryError):
        return ModelBuildFailed("The build ran out of memory.", hint="Close other programs.")
    return ModelBuildFailed(f"{type(error).__name__}: {text}.", hint="Nothing was left half-built.")


def disk_full(text: str) -> ModelBuildFailed:
    return ModelBuildFailed(
        f"The disk is full: {text}.",
        hint="Free some space, or set SEGUE_MODEL_HOME to a folder on a larger disk.",
    )


def names_full_disk(text: str) -> bool:
    """Whether the last words of a program say so."""
    lowered = text.lower()
    return any(sign in lowered for sign in ("no space left", "os error 28", "file too large"))


def _fail(error: SegueError) -> None:
    _line({"event": "error", "code": error.code, "message": error.message, "hint": error.hint})


def _line(value: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()
