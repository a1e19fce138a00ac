"""The process of one rank above the first: does what it is told until nobody is left to tell it.

    python -m segue_cloud.engine.tensor_parallel.rank SOCKET RANK

It ends when the socket does, and the system ends it with its parent (`servers.process`).
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from segue_contract.limits import START_TIMEOUT_S

CONNECTED = "rank connected"


def main() -> None:
    """Connect first, which is quick; torch is imported only then."""
    path, rank = Path(sys.argv[1]), int(sys.argv[2])
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(START_TIMEOUT_S)
    connection.connect(str(path))
    os.write(1, f"{CONNECTED}\n".encode())

    from segue_cloud.engine.tensor_parallel.serve import serve

    serve(connection, rank, path.parent)


if __name__ == "__main__":
    main()
