"""One large answer: ``GET /jobs/N/elements`` of all elements of a job, over mutual TLS.

How soon its first byte comes, how long it takes in all, and how much the memory of the daemon grows. The first byte of
a bare Klein route, asked for in turn, tells what of it is the way there.
"""

from __future__ import annotations

import ssl
import time

import msgspec
from attrs import frozen
from caller import API, tls_context
from figures import BenchmarkError, spread
from meter import memory_mib, reset_peak
from rest_floor import serving
from rest_load import connect, get
from rig import file_system, options_of, report, rig, run

_PIECE = 1024 * 1024


@frozen
class Answer:
    """A whole answer, and when it came (seconds after the request)."""

    first_byte_s: float
    all_s: float
    body: bytes


def ask(connection: ssl.SSLSocket, path: str) -> Answer:
    """One request on a connection that serves no other.

    Raises:
        BenchmarkError: the status is not 200, or the answer ends early.
    """
    request = get("localhost", path).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    began = time.perf_counter()
    connection.sendall(request)
    pieces = [connection.recv(1)]
    first = time.perf_counter() - began
    while piece := connection.recv(_PIECE):
        pieces.append(piece)
    whole = time.perf_counter() - began
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    if b" 200 " not in head[:16]:
        raise BenchmarkError(f"not answered with 200: {head[:300]!r}")
    return Answer(first, whole, _joined(body) if b"chunked" in head.lower() else body)


def _joined(body: bytes) -> bytes:
    """The content of a body in chunks."""
    at = 0
    pieces: list[bytes] = []
    while True:
        end = body.find(b"\r\n", at)
        length = int(body[at:end], 16) if end >= 0 else -1
        if length == 0:
            return b"".join(pieces)
        if length < 0 or len(body) < end + length + 4:
            raise BenchmarkError("the answer ended early")
        pieces.append(body[end + 2 : end + 2 + length])
        at = end + length + 4


def main() -> None:
    options = options_of(__doc__ or "", elements=(100_000, 20_000), rounds=(7, 3))
    with (
        rig() as on,
        on.caller("admin") as caller,
        serving(on.service.directory / "certificates", on.directory / "floor.sqlite") as floor,
    ):
        # They never run to an end, so that nothing but the answers happens.
        job = caller.submit(
            "copy", src_siteid=1, src_filepath="/tree", dst_siteid=2, dst_filepath="/copy", protocol="DUMMY",
            extra_opts={"dummy": {"files": options.elements, "hang": True}},
        )  # fmt: skip
        caller.wait(job["id"], 300, lambda seen: seen["num_elements"] == options.elements + 1)
        caller.wait_until_listed(job["id"])
        context = tls_context(on.service, "admin")
        answers, floors, growths = [], [], []
        cpu = 0.0
        for _ in range(options.rounds):
            with connect(on.service.url or "", context) as connection:
                before = memory_mib(on.pid, "VmRSS")
                reset_peak(on.pid)
                cpu_before = on.meter.cpu().daemon
                answers.append(answer := ask(connection, f"{API}/jobs/{job['id']}/elements"))
                cpu += on.meter.cpu().daemon - cpu_before
                growths.append(memory_mib(on.pid, "VmHWM") - before)
            found = msgspec.json.decode(answer.body)
            if [element["id"] for element in found] != list(range(options.elements + 1)):
                raise BenchmarkError(f"the answer has {len(found)} elements, or not in their order")
            with connect(floor.url, context) as connection:
                floors.append(ask(connection, "/jobs/1").first_byte_s)
        first = [answer.first_byte_s * 1000 for answer in answers]
        figures = {
            "unit": "ms to the first byte",
            "ratio": spread([bare * 1000 / ours for bare, ours in zip(floors, first, strict=True)]),
            "ours": spread(first),
            "bare": spread([bare * 1000 for bare in floors]),
            "bare is": "the first byte of a bare Klein route",
            "first byte (ms)": spread(first),
            "all of it (s)": spread([answer.all_s for answer in answers]),
            "elements/s": spread([options.elements / answer.all_s for answer in answers]),
            "MiB of the answer": len(answers[0].body) / 1024**2,
            "growth of the daemon (MiB)": spread(growths),
            "cpu ms each, ours": {"daemon": cpu / options.rounds / options.elements * 1000},
            "peak MiB": {"daemon": before + growths[-1]},
            "database on": file_system(on.directory),
        }
    report(options, figures)


if __name__ == "__main__":
    run(main)
