"""Clients that hold connections and give nothing: others are served, and they are cut."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService
from tests.support.variants import usual

_PATH = "/workqueue/api/v1.0"
_GIVE_UP_S = 20.0
_numbers = itertools.count(1)

Start = Callable[..., TestService]


@pytest.fixture
def start(open_directory: Path) -> Iterator[Start]:
    """Start a daemon with some settings of its section ``[server]``."""
    with contextlib.ExitStack() as stack:

        def started(**server: str) -> TestService:
            service = TestService(open_directory / f"instance{next(_numbers)}")
            service.init(server=server)
            return stack.enter_context(service.running())

        yield started


@pytest.fixture(scope="module")
def impatient(open_directory: Path) -> Iterator[TestService]:
    """A daemon that waits for a request no longer than a second."""
    service = TestService(open_directory / "impatient")
    service.init(server={"request_timeout": "1s"})
    with service.running():
        yield service


@pytest.fixture
def held() -> Iterator[contextlib.ExitStack]:
    """What the attacker holds."""
    with contextlib.ExitStack() as stack:
        yield stack


def plain(service: TestService, held: contextlib.ExitStack, source: str = "127.0.0.1") -> socket.socket:
    assert service.url is not None
    port = int(service.url.rpartition(":")[2])
    return held.enter_context(socket.create_connection(("127.0.0.1", port), _GIVE_UP_S, (source, 0)))


def shaken(service: TestService, held: contextlib.ExitStack, user: str | None = None) -> ssl.SSLSocket:
    """A connection after its handshake."""
    context = ssl.create_default_context(cafile=service.environment("admin")["PDM_CA"])
    if user is not None:
        context.load_cert_chain(*service.credentials(user))
    return held.enter_context(context.wrap_socket(plain(service, held), server_hostname="localhost"))


def is_cut(connection: socket.socket) -> bool:
    """Whether the service has closed it; waits for it."""
    try:
        return not connection.recv(1)
    except ConnectionError:
        return True


def is_open(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        return bool(connection.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False


def serves(service: TestService) -> bool:
    return service.call("admin", "GET", "/whoami")[0] == 200


def test_a_body_that_comes_by_the_byte_is_cut_off(impatient: TestService, held: contextlib.ExitStack) -> None:
    slow = shaken(impatient, held, "admin")
    slow.sendall(
        f"POST {_PATH}/list HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        "Content-Length: 5000\r\n\r\n".encode()
    )
    slow.settimeout(0.1)
    received, give_up_at = b"", time.monotonic() + _GIVE_UP_S
    while not received:
        assert time.monotonic() < give_up_at
        # Each byte is a sign of life; that is not enough.
        slow.sendall(b" ")
        with contextlib.suppress(TimeoutError):
            received = slow.recv(65536)
        assert serves(impatient)
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["type"].endswith(":too-slow")
    slow.settimeout(_GIVE_UP_S)
    assert is_cut(slow)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n"])
def test_a_handshake_that_does_not_come_to_its_end_is_cut_off(
    impatient: TestService, held: contextlib.ExitStack, sent: bytes
) -> None:
    half = plain(impatient, held)
    half.sendall(sent)
    assert is_cut(half)
    assert serves(impatient)


def test_a_kept_connection_may_be_silent_for_longer_than_a_request_may_take(
    impatient: TestService, held: contextlib.ExitStack
) -> None:
    kept = shaken(impatient, held, "admin")
    request = f"GET {_PATH}/whoami HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    for pause_s in (0.0, 2.0):
        time.sleep(pause_s)
        kept.sendall(request)
        assert kept.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.full
def test_where_there_is_no_room_the_silent_ones_make_it(start: Start, held: contextlib.ExitStack) -> None:
    service = start(connections="20")
    kept = shaken(service, held, "admin")
    kept.sendall(f"GET {_PATH}/whoami HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert kept.recv(65536).startswith(b"HTTP/1.1 200 ")
    # Their owners are unknown: they are closed before the authenticated one.
    silent = [shaken(service, held) for _ in range(30)]
    assert is_open(kept)
    assert [is_open(one) for one in silent] == [False] * 11 + [True] * 19
    assert serves(service)
    assert "closing those silent for longest" in service.tail()


@pytest.mark.full
def test_one_address_cannot_take_all(start: Start, held: contextlib.ExitStack) -> None:
    service = start(connections="20", connections_per_address="5")
    mine = [shaken(service, held) for _ in range(5)]
    assert is_cut(plain(service, held))
    assert all(is_open(one) for one in mine)
    assert is_open(plain(service, held, "127.0.0.2"))


@pytest.mark.full
def test_a_flood_of_connections_is_refused_before_the_handshakes(start: Start, held: contextlib.ExitStack) -> None:
    service = start(new_connections="1")
    # The rate allows ten at once; none of them is closed by its owner.
    flood = [plain(service, held) for _ in range(40)]
    assert sum(is_open(one) for one in flood) <= 20
    assert is_open(plain(service, held, "127.0.0.2"))
    assert "opens more than 1 connections a second" in service.tail()


#: What an attack may send, and by how much the daemon may grow: a leak grows by what is sent, or by more.
_SENT, _GROWTH_KB = 48 * 1024 * 1024, 16 * 1024
_TRAILERS = (
    f"POST {_PATH}/list HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n".encode(),
    b"X-Trailer: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 400,
)
_NO_CERTIFICATE: dict[str, tuple[bytes, bytes]] = {
    "trailers without end": _TRAILERS,
    "a trailer line without end": (_TRAILERS[0], b"a" * 16384),
    "headers without end": (b"GET / HTTP/1.1\r\n", b"X-Header: aaaaaaaaaaaaaaaa\r\n" * 500),
    "a header line without end": (b"GET / HTTP/1.1\r\nX-Header: ", b"a" * 16384),
    "a folded header without end": (b"GET / HTTP/1.1\r\nX-Header: a\r\n", b" a\r\n" * 4000),
    "a chunk extension without end": (_TRAILERS[0][:-3] + b"1;", b"a" * 16384),
    "empty lines": (b"", b"\r\n" * 8192),
    "answers that nobody reads": (b"", f"GET {_PATH}/health HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 200),
    "problems that nobody reads": (b"", b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n" * 300),
    "refusals that nobody reads": (b"", f"GET {_PATH}/jobs HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() * 200),
    "a body without a certificate": (
        f"POST {_PATH}/list HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n".encode(),
        b" " * 16384,
    ),
}


@pytest.fixture(scope="module")
def patient(open_directory: Path) -> Iterator[TestService]:
    service = TestService(open_directory / "patient")
    service.init()
    with service.running():
        yield service


def memory_kb(service: TestService) -> int:
    assert service.process is not None
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


@pytest.mark.parametrize("attack", usual(_NO_CERTIFICATE, ["headers without end", "answers that nobody reads"]))
def test_a_connection_without_a_certificate_takes_little_memory(
    patient: TestService, held: contextlib.ExitStack, attack: str
) -> None:
    opening, more = _NO_CERTIFICATE[attack]
    connection = shaken(patient, held)
    assert serves(patient)
    before, sent, give_up_at = memory_kb(patient), 0, time.monotonic() + 5
    # What the service does not read fills the buffers of the system, and then stops us: that is the bound.
    connection.settimeout(1.0)
    try:
        connection.sendall(opening)
        while sent < _SENT and time.monotonic() < give_up_at:
            connection.sendall(more)
            sent += len(more)
    except OSError:
        pass
    assert memory_kb(patient) - before < _GROWTH_KB
    assert serves(patient)


@pytest.mark.parametrize(
    "bad",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 700 + b"\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nA: " + b"a" * 20000 + b"\r\n\r\n",
        _TRAILERS[0] + _TRAILERS[1] * 5,
        _TRAILERS[0][:-3] + b"zz\r\n",
    ],
    ids=["request line", "700 headers", "no colon", "long header", "trailers", "chunk length"],
)
def test_what_is_no_request_is_answered_400_and_leaves_no_error(
    patient: TestService, held: contextlib.ExitStack, bad: bytes
) -> None:
    connection = shaken(patient, held)
    # In two pieces, a moment apart: the second one comes when the connection is being closed.
    connection.sendall(bad[:-5])
    time.sleep(0.1)
    with contextlib.suppress(OSError):
        connection.sendall(bad[-5:] + b"A: b\r\n" * 10)
    received = b""
    with contextlib.suppress(OSError):
        while piece := connection.recv(65536):
            received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["type"].endswith(":invalid-input")
    assert "Traceback" not in patient.tail()
    assert "AttributeError" not in patient.tail()


@pytest.mark.full
def test_connections_without_a_certificate_are_few(start: Start, held: contextlib.ExitStack) -> None:
    service = start(anonymous_connections="3")
    request = f"GET {_PATH}/health HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    known = shaken(service, held, "admin")
    strangers = [shaken(service, held) for _ in range(5)]
    for connection in [known, *strangers]:
        connection.sendall(request)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert is_cut(strangers[0])
    assert is_cut(strangers[1])
    assert all(map(is_open, [known, *strangers[2:]]))
