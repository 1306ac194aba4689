"""All benchmarks: what each is called, which program runs it, and the bars that its figures have to reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attrs import field, frozen


@frozen
class Bar:
    """A bound of one figure.

    Attributes:
        text: for people.
        figure: where the figure stands in the result, parts joined by ``/``.
        least: the figure must be at least this.
        most: or at most this.
    """

    text: str
    figure: str
    least: float | None = None
    most: float | None = None

    def judge(self, result: Mapping[str, Any]) -> tuple[float | None, bool]:
        """The figure, None if there is none, and whether it reaches the bar."""
        found: Any = result
        for part in self.figure.split("/"):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is None:
            return None, False
        return found, (self.least is None or found >= self.least) and (self.most is None or found <= self.most)


@frozen
class Benchmark:
    """One row of the page.

    Attributes:
        name: for ``script/bench`` and the results.
        title: what is measured.
        program: file in this directory, without ``.py``.
        arguments: of the program, for this row.
        bars: what must be reached.
    """

    name: str
    title: str
    program: str
    arguments: Sequence[str] = ()
    bars: Sequence[Bar] = field(factory=tuple)

    def judged(self, result: Mapping[str, Any]) -> Iterator[tuple[Bar, float | None, bool]]:
        """Each bar with the figure of a result, and whether it is reached."""
        for bar in self.bars:
            yield bar, *bar.judge(result)


def _ratio(least: float, of: str, goal: float | None = None) -> Bar:
    wish = f" (goal {goal:.2f})" if goal else ""
    return Bar(f"{least:.2f} of {of}{wish}", "ratio/median", least=least)


_ONE_JOB_BARS = (
    Bar("4,000 elements/s (goal 6,000)", "ours/median", least=4000),
    Bar("0.22 ms CPU of the daemon each (goal 0.15)", "cpu ms each, ours/daemon", most=0.22),
)
_MANY_JOBS_BARS = (
    Bar("2,500 jobs/s (goal 4,000)", "ours/median", least=2500),
    Bar("0.40 ms CPU of the daemon each (goal 0.25)", "cpu ms each, ours/daemon", most=0.40),
)
_LOG_BARS = (
    Bar("60 MiB of logs for 100,000 elements", "logs of 100,000 elements/MiB", most=60.0),
    Bar("3 inodes of logs for a job", "logs of 100,000 elements/inodes", most=3.0),
)

_PROTOCOL_CLIENTS = {"ssh": "sftp and rclone", "https": "curl and rclone", "xroot": "xrdcp and xrdfs"}
_PROTOCOL_KINDS = {
    "small": ("small_files", "COPY of small files of 1 KiB by {}"),
    "large": ("large_file", "COPY of one large file by {}"),
    "list": ("list_tree", "LIST of a tree by {}"),
}


def _of_protocols() -> Iterator[Benchmark]:
    """Rows of the protocols besides GridFTP, each with and without a delay."""
    for protocol, clients in _PROTOCOL_CLIENTS.items():
        for kind, (name, title) in _PROTOCOL_KINDS.items():
            for delay in (0, 20):
                yield Benchmark(
                    f"{protocol}_{name}" + ("_delayed" if delay else ""),
                    title.format(protocol.upper())
                    + (f", over a line with a round trip of {delay} ms" if delay else ""),
                    "protocol_files",
                    ("--protocol", protocol, "--kind", kind, "--delay", str(delay)),
                    (_ratio(0.90, f"the best of {clients}", 1.50),),
                )


def _through_the_service() -> Iterator[Benchmark]:
    """Rows of copies between GridFTP and other protocols."""
    for source, destination, kind in (
        ("gridftp", "ssh", "large"),
        ("ssh", "gridftp", "large"),
        ("gridftp", "file", "large"),
        ("file", "gridftp", "large"),
        ("gridftp", "ssh", "small"),
        ("ssh", "gridftp", "small"),
    ):
        what = "one large file" if kind == "large" else "small files of 1 KiB"
        yield Benchmark(
            f"{source}_to_{destination}_{kind}",
            f"COPY of {what} from {source.upper()} to {destination.upper()}, through the service",
            "relay_files",
            ("--source", source, "--destination", destination, "--kind", kind),
            (_ratio(0.80, "what the slower end gives alone"),),
        )


def _of_s3() -> Iterator[Benchmark]:
    """Rows of S3, against a server that keeps files and one that keeps objects in memory."""
    for server in ("rclone", "moto"):
        for name, title, files, kib, least in (
            ("small_files", "10,000 files of 1 KiB", 10_000, 1, 1.00),
            ("large_file", "one file of 4 GiB", 1, 4 * 1024 * 1024, 0.95),
        ):
            yield Benchmark(
                f"s3_{name}_{server}",
                f"COPY of {title} to S3, to the server of {server}",
                "s3_files",
                ("--server", server, *(() if files > 1 else ("--files", "1", "--folders", "1", "--kib", str(kib)))),
                (_ratio(least, "rclone"),),
            )


def _far_away() -> Iterator[Benchmark]:
    """Rows of small files between GridFTP servers that are far away."""
    for round_trip_ms, files in ((20, 4000), (100, 2000)):
        far = ("--round-trip-ms", str(round_trip_ms), "--files", str(files))
        yield Benchmark(
            f"small_files_{round_trip_ms}ms",
            f"COPY of {files:,} files of 1 KiB, {round_trip_ms} ms from any answer",
            "copy_files",
            far,
            (_ratio(1.00, "the best bare list mode", 2.00),),
        )
        yield Benchmark(
            f"small_files_checksum_{round_trip_ms}ms",
            f"The same, checksums proven at both ends, {round_trip_ms} ms from any answer",
            "copy_files",
            ("--verify", "checksum", *far),
            (_ratio(1.00, "the best bare list mode that proves checksums", 2.00),),
        )


_ALL = (
    Benchmark(
        "small_files",
        "COPY of 10,000 files of 1 KiB in 100 directories, one job, its listing included",
        "copy_files",
        (),
        (_ratio(0.85, "the best bare list mode", 1.00),),
    ),
    Benchmark(
        "small_files_checksum",
        "The same, checksums proven at both ends (the default)",
        "copy_files",
        ("--verify", "checksum"),
        (_ratio(1.40, "the best bare list mode that proves checksums", 1.80),),
    ),
    *_far_away(),
    Benchmark(
        "many_jobs",
        "COPY of 10,000 files of 1 KiB as 10 jobs of 4 users at once, against one job",
        "many_jobs",
        (),
        (_ratio(0.90, "the one-job rate"),),
    ),
    Benchmark(
        "large_file",
        "COPY of one file of 4 GiB",
        "copy_files",
        ("--kind", "large"),
        (_ratio(1.00, "bare globus-url-copy"),),
    ),
    Benchmark(
        "medium_files",
        "COPY of 100 files of 16 MiB",
        "copy_files",
        ("--kind", "medium"),
        (_ratio(1.20, "the best bare list mode"),),
    ),
    Benchmark(
        "list_tree",
        "LIST of 10,000 files in 500 directories",
        "list_tree",
        (),
        (_ratio(1.50, "the fastest bare listing", 3.00),),
    ),
    Benchmark(
        "sync_checksum",
        "COPY with sync=checksum of 10,000 unchanged files of 1 KiB, not one byte moved",
        "sync_checksum",
        (),
        (_ratio(0.15, "the bare listing of both sides"),),
    ),
    Benchmark(
        "remove_tree",
        "REMOVE of that tree",
        "remove_tree",
        (),
        (Bar("faster than gfal-rm -r", "ratio/median", least=1.0),),
    ),
    Benchmark(
        "one_copy",
        "COPY of one file of 1 KiB on an idle daemon, submission to DONE",
        "one_copy",
        (),
        (Bar("p50 within 15 ms of a warm agent without the queue (goal 8)", "p50 over bare (ms)", most=15.0),),
    ),
    Benchmark(
        "dummy_one_job", "10,000 elements of no work in one job", "dummy_elements", (), (*_ONE_JOB_BARS, *_LOG_BARS)
    ),
    Benchmark(
        "dummy_many_jobs",
        "2,000 jobs of one element of no work",
        "dummy_elements",
        ("--shape", "jobs"),
        _MANY_JOBS_BARS,
    ),
    Benchmark(
        "cluster",
        "Elements of no work with 1, 2 and 3 daemons on one PostgreSQL, against one on SQLite",
        "cluster",
        ("--shape", "zero"),
        (Bar("CPU each with one daemon within 1.5 of SQLite's", "cpu each, of SQLite's/1", most=1.5),),
    ),
    Benchmark(
        "cluster_jobs",
        "Jobs of one element of no work with 1, 2 and 3 daemons on one PostgreSQL, against one on SQLite",
        "cluster",
        ("--shape", "jobs"),
        (Bar("CPU each with one daemon within 1.5 of SQLite's", "cpu each, of SQLite's/1", most=1.5),),
    ),
    Benchmark(
        "cluster_rate",
        "Elements that sleep, with 1, 2 and 3 daemons on one PostgreSQL",
        "cluster",
        ("--shape", "sleep", "--sqlite", "0"),
        (
            Bar("0.9 of twice the rate with two", "rate, of one daemon's/2", least=1.8),
            Bar("0.9 of three times the rate with three", "rate, of one daemon's/3", least=2.7),
        ),
    ),
    Benchmark(
        "claim_rate",
        "Claims with 1,000,000 elements queued, against 1,000",
        "claim_rate",
        (),
        (_ratio(0.90, "the rate with few"),),
    ),
    Benchmark(
        "history",
        "Work beside 10,000,000 elements of history, against an empty database",
        "history",
        (),
        (_ratio(0.90, "the rate in an empty database"),),
    ),
    Benchmark(
        "post_list",
        "POST /list over mTLS, 16 kept connections",
        "rest_rates",
        ("--route", "list"),
        (_ratio(0.85, "a bare Klein route with one SQLite insert", 1.00),),
    ),
    Benchmark(
        "get_job",
        "GET /jobs/N over mTLS, 16 kept connections",
        "rest_rates",
        ("--route", "job"),
        (_ratio(0.70, "a bare Klein route with cached identity"),),
    ),
    Benchmark(
        "elements_answer",
        "GET /jobs/N/elements of 100,000 elements",
        "elements_answer",
        (),
        (
            Bar("first byte under 100 ms", "first byte (ms)/median", most=100.0),
            Bar("memory of the daemon grows by less than 50 MiB", "growth of the daemon (MiB)/max", most=50.0),
        ),
    ),
    Benchmark(
        "web_job_page",
        "The page of a job of 100,000 elements, and of one that runs",
        "web_job_page",
        (),
        (
            Bar("first view under 300 ms", "first view (ms)/median", most=300.0),
            Bar("first view under 200 KB", "KB of a first view", most=200.0),
        ),
    ),
    Benchmark(
        "idle_connections",
        "Latency of a client while others hold 2,000 idle TLS connections and 50 send a body by the byte",
        "idle_connections",
        (),
        (Bar("within 2x", "ratio/median", least=0.5),),
    ),
    Benchmark(
        "sse_listeners",
        "Latency of a client while 1,000 others listen to events, and a job ends each second",
        "sse_listeners",
        (),
        (
            Bar("within 2x", "ratio/median", least=0.5),
            Bar("growth of the daemon under 50 MiB", "growth of the daemon (MiB)", most=50.0),
        ),
    ),
    Benchmark(
        "queued_memory",
        "Memory of the daemon with 1,000,000 elements queued",
        "queued_memory",
        (),
        (Bar("under 170 MiB", "peak MiB/daemon", most=170.0),),
    ),
    Benchmark(
        "compared_memory",
        "Memory of the daemon while 1,000,000 files are compared with as many at the destination",
        "queued_memory",
        ("--compare", "yes"),
        (Bar("under 250 MiB", "peak MiB/daemon", most=250.0),),
    ),
    Benchmark(
        "reactor_lag",
        "How late the reactor is at worst while 100,000 elements are inserted",
        "reactor_lag",
        (),
        (Bar("under 30 ms", "ours/median", most=30.0),),
    ),
    *_of_protocols(),
    *_through_the_service(),
    *_of_s3(),
    Benchmark(
        "fts_files",
        "COPY of 10,000 files of 1 KiB by an FTS3 on the same machine, another daemon of the service",
        "fts_files",
        (),
        (_ratio(0.30, "the service itself"),),
    ),
)

#: Name → benchmark, in the order of the page.
CATALOGUE: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
