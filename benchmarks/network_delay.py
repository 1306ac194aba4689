"""Delay between programs of one machine: every packet of the loopback interface is held back for a while.

Linux has ``tc qdisc … netem`` for this, but not every kernel does. Here the kernel hands each packet to a queue
(iptables, NFQUEUE) and a process lets it go on when its time has come: the whole of TCP, handshakes and windows
included, sees the delay. All of it is in a network namespace of this process and its children, so that nothing else
on the machine is slowed. Needs root, iproute2 and iptables.
"""

from __future__ import annotations

import atexit
import collections
import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Collection

from figures import BenchmarkError

_CLONE_NEWNET = 0x40000000
_QUEUE = 7
#: Packets that may be held back at once.
_MOST_PACKETS = 200_000
_RECEIVE_BUFFER = 64 * 1024 * 1024
_SO_RCVBUFFORCE, _SOL_NETLINK, _NETLINK_NO_ENOBUFS = 33, 270, 5
_NETLINK_NETFILTER = 12
#: Message types of the subsystem NFNL_SUBSYS_QUEUE.
_PACKET, _CONFIG, _VERDICT_BATCH = 0x300, 0x302, 0x303
_CFG_COMMAND, _CFG_PARAMS, _CFG_LENGTH, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5
_BIND, _COPY_META, _GSO = 1, 1, 4
_VERDICT_HEADER, _ACCEPT = 2, 1
_REQUEST = 1
_NETLINK_HEADER, _NETFILTER_HEADER, _ATTRIBUTE_HEADER = 16, 4, 4


def enter_namespace() -> None:
    """Move this process, and what it starts from now on, into a network of its own with nothing but loopback.

    Raises:
        BenchmarkError: the machine does not allow it.
    """
    if shutil.which("iptables-legacy") is None or shutil.which("ip") is None:
        raise BenchmarkError("a delay of the network needs the packages iptables and iproute2")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        why = os.strerror(ctypes.get_errno())
        raise BenchmarkError(f"a delay of the network needs a network namespace: {why}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def delay_loopback(round_trip_s: float, but: Collection[int]) -> None:
    """Hold back every TCP packet of the namespace for half a round trip, until this process ends.

    Args:
        round_trip_s: seconds from a packet to its answer.
        but: ports that answer at once.
    """
    delayer = subprocess.Popen([sys.executable, __file__, str(round_trip_s / 2)], stdout=subprocess.PIPE)
    atexit.register(delayer.kill)
    assert delayer.stdout is not None
    if delayer.stdout.readline() != b"ready\n":
        raise BenchmarkError("packets cannot be held back: the kernel gives them to no queue")
    for rule in (
        *(["--sport", str(port), "-j", "ACCEPT"] for port in but),
        *(["--dport", str(port), "-j", "ACCEPT"] for port in but),
        ["-j", "NFQUEUE", "--queue-num", str(_QUEUE)],
    ):
        subprocess.run(["iptables-legacy", "-A", "OUTPUT", "-p", "tcp", *rule], check=True)


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE_HEADER + len(value)
    return struct.pack("=HH", length, kind) + value + b"\0" * (-length % 4)


def _message(kind: int, *attributes: bytes) -> bytes:
    body = struct.pack("!BBH", 0, 0, _QUEUE) + b"".join(attributes)
    return struct.pack("=IHHII", _NETLINK_HEADER + len(body), kind, _REQUEST, 0, 0) + body


def _hold_back(seconds: float) -> None:
    """Let packets go on in their order, each so many seconds after it came."""
    queue = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    queue.bind((0, 0))
    queue.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
    queue.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
    for attributes in (
        (_attribute(_CFG_COMMAND, struct.pack("!BBH", _BIND, 0, socket.AF_INET)),),
        (_attribute(_CFG_PARAMS, struct.pack("!IB", 0, _COPY_META)),),
        (_attribute(_CFG_LENGTH, struct.pack("!I", _MOST_PACKETS)),),
        # Segments that the network card would cut stay whole.
        (_attribute(_CFG_FLAGS, struct.pack("!I", _GSO)), _attribute(_CFG_MASK, struct.pack("!I", _GSO))),
    ):
        queue.send(_message(_CONFIG, *attributes))
    print("ready", flush=True)
    held: collections.deque[tuple[float, int]] = collections.deque()
    queue.setblocking(False)
    while True:
        now = time.monotonic()
        last = None
        while held and held[0][0] <= now:
            last = held.popleft()[1]
        if last is not None:
            header = struct.pack("!II", _ACCEPT, last)
            queue.send(_message(_VERDICT_BATCH, _attribute(_VERDICT_HEADER, header)))
        queue.settimeout(max(held[0][0] - time.monotonic(), 1e-5) if held else None)
        try:
            data = queue.recv(65536)
        except TimeoutError:
            continue
        due = time.monotonic() + seconds
        while data:
            length, kind = struct.unpack_from("=IH", data)
            if kind == _PACKET:
                # The first attribute is the header of the packet, which begins with its number.
                at = _NETLINK_HEADER + _NETFILTER_HEADER + _ATTRIBUTE_HEADER
                held.append((due, struct.unpack_from("!I", data, at)[0]))
            data = data[(length + 3) & ~3 :]


if __name__ == "__main__":
    _hold_back(float(sys.argv[1]))
