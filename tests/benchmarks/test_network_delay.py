"""The delay of all packets of a network namespace."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
_ROUND_TRIP_S = 0.3
#: Prints seconds: to connect, to be answered, and to be answered at a port that is left out.
_PROGRAM = """
import socket, threading, time
from figures import BenchmarkError
from network_delay import delay_loopback, enter_namespace

def serve(listener):
    while True:
        connection, _ = listener.accept()
        connection.sendall(connection.recv(1))
        connection.close()

try:
    enter_namespace()
    far, near = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    delay_loopback({round_trip_s}, [near.getsockname()[1]])
except BenchmarkError as error:
    print("not here:", error)
    raise SystemExit
for listener in (far, near):
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
    began = time.monotonic()
    with socket.create_connection(listener.getsockname()) as connection:
        print(time.monotonic() - began)
        began = time.monotonic()
        connection.sendall(b"x")
        connection.recv(1)
        print(time.monotonic() - began)
"""


def test_every_answer_takes_a_round_trip_but_at_ports_left_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(round_trip_s=_ROUND_TRIP_S)],
        env={"PYTHONPATH": str(_BENCHMARKS), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("not here"):
        pytest.skip(done.stdout)
    connect_s, answer_s, near_connect_s, near_answer_s = map(float, done.stdout.split())
    assert connect_s >= _ROUND_TRIP_S
    assert answer_s >= _ROUND_TRIP_S
    assert near_connect_s < _ROUND_TRIP_S
    assert near_answer_s < _ROUND_TRIP_S
