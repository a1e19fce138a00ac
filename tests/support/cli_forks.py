"""`segue ARGUMENTS` again and again, each in a fork of a process that has imported the cloud: its
imports take longer than what it then refuses.

Reads {"arguments": [...], "env": {...}} and answers {"code": ..., "said": ...}, line by line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from typing import Any

import segue_cloud.app
import segue_cloud.engine.torch_engine
import segue_cloud.turns.manager  # noqa: F401 - each of them for what it imports
from segue.cli import main as segue


def run_as_child(asked: dict[str, Any], said: int) -> None:
    """Does not return: the exit status is that of the command."""
    code = 1
    try:
        for stream in (1, 2):
            os.dup2(said, stream)
        os.environ.update(asked["env"])
        segue(asked["arguments"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    for line in sys.stdin:
        with tempfile.TemporaryFile() as said:
            child = os.fork()
            if not child:
                run_as_child(json.loads(line), said.fileno())
            _, status = os.waitpid(child, 0)
            said.seek(0)
            answer = {"code": os.waitstatus_to_exitcode(status), "said": said.read().decode()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
