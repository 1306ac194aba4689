"""TCP ports of loopback: reserve one for a server, and see on which ones a process listens."""

from __future__ import annotations

import socket
from pathlib import Path

# The state of a listening socket in /proc/net/tcp.
_LISTEN = "0A"


def reserve_port() -> int:
    """A free port of 127.0.0.1, which the kernel gives to no other program while this process lives.

    A socket stays bound to it and never listens: connections are refused until a server listens there, as every server
    that sets SO_REUSEADDR can, again and again. A port that is only found free may be given to any connection of any
    program before its server starts, or while that is stopped.
    """
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        port = int(bound.getsockname()[1])
        # The descriptor stays open until the process ends; programs that it starts do not inherit it.
        bound.detach()
    return port


def listens(pid: int, port: int) -> bool:
    """Whether a process of ours, and not another one, listens on a TCP port."""
    return port in _ports(pid, "tcp") or port in _ports(pid, "tcp6")


def _ports(pid: int, table: str) -> list[int]:
    try:
        sockets = {str(entry.readlink()) for entry in Path("/proc", str(pid), "fd").iterdir()}
        lines = Path("/proc/net", table).read_text().splitlines()[1:]
    except OSError:
        # It has ended, or closed what was read; or there is no IPv6.
        return []
    found = []
    for line in lines:
        _, local, _, state, *rest = line.split()
        if state == _LISTEN and f"socket:[{rest[5]}]" in sockets:
            found.append(int(local.rpartition(":")[2], 16))
    return found
