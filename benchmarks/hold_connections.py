"""A client that holds TLS connections and gives nothing; a process of its own for `idle_connections`.

Arguments: URL, PEM of the authority, how many idle connections, how many that send a body by the byte. Prints a line
when all are there; ends with its input.
"""

from __future__ import annotations

import contextlib
import resource
import select
import ssl
import sys

from caller import API
from rest_load import connect

_BETWEEN_BYTES_S = 0.05
_HEAD = (
    f"POST {API}/list HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
).encode()


def main() -> None:
    url, authority, idle, slow = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    context = ssl.create_default_context(cafile=authority)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(url, context)) for _ in range(idle + slow)]
        for one in held[:slow]:
            one.sendall(_HEAD)
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], _BETWEEN_BYTES_S)[0]:
            for one in held[:slow]:
                # Who is cut off for it has nothing to send any more.
                with contextlib.suppress(OSError):
                    one.sendall(b" ")


if __name__ == "__main__":
    main()
