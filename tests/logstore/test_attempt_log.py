"""A log that grows too long: head and tail are kept, the file stays good for tail -F, and shows life."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pdm.workqueue.logstore.attempt_log import AttemptLog

LEFT_OUT = re.compile(r"\[log\] left out (\d+) lines \((\d+) bytes\)")


def test_head_and_tail_are_kept(make_logs: Any) -> None:
    logs = make_logs(head_bytes=2000, tail_bytes=1000)
    logs.store.open(logs.ref, "first")
    for number in range(10_000):
        logs.store.write(logs.ref, f"line {number}")
    assert logs.close("last").complete
    lines = logs.lines()
    assert lines[:3] == ["first", "line 0", "line 1"]
    assert lines[-3:] == ["line 9998", "line 9999", "last"]
    (where,) = [number for number, line in enumerate(lines) if LEFT_OUT.match(line)]
    left_out = int(LEFT_OUT.match(lines[where]).group(1))  # type: ignore[union-attr]
    assert left_out + len(lines) - 3 == 10_000
    assert logs.file.stat().st_size < 3300


def test_a_log_that_just_fits_has_no_gap(make_logs: Any) -> None:
    logs = make_logs(head_bytes=75, tail_bytes=150)
    logs.store.open(logs.ref, "x" * 40)
    logs.store.write(logs.ref, "y" * 40)
    logs.store.write(logs.ref, "z" * 40)
    logs.close("last")
    assert logs.lines() == ["x" * 40, "y" * 40, "z" * 40, "last"]


def test_a_long_log_shows_life(make_logs: Any) -> None:
    logs = make_logs(head_bytes=120, tail_bytes=240)
    logs.store.open(logs.ref, "first")
    for number in range(60):
        logs.clock.seconds += 1
        logs.store.write(logs.ref, f"line {number}")
    logs.flush()
    lives = [line for line in logs.lines() if line.startswith("[log] the log is long")]
    # 5, 15, 35 seconds after the head was full
    assert [line.partition("newest: ")[2].partition("Z ")[2] for line in lives] == ["line 7", "line 17", "line 37"]
    logs.close()
    assert logs.lines()[-2:] == ["line 59", "end"]


def test_a_year_of_life_is_bounded(make_logs: Any) -> None:
    logs = make_logs(head_bytes=100, tail_bytes=100)
    logs.store.open(logs.ref, "first")
    for _ in range(1000):
        logs.clock.seconds += 1000
        logs.store.write(logs.ref, "x" * 5000)
    logs.close()
    assert logs.file.stat().st_size < 1000 * 600


def test_reading_a_running_long_log_shows_its_newest_lines(make_logs: Any) -> None:
    logs = make_logs(head_bytes=200, tail_bytes=200)
    logs.store.open(logs.ref, "first")
    for number in range(100):
        logs.store.write(logs.ref, f"line {number}")
    text = logs.reactor.wait(logs.store.read(logs.ref))
    assert "Z first\n" in text
    assert text.endswith("Z line 99\n")
    assert LEFT_OUT.search(text)
    logs.close()
    assert len([line for line in logs.lines() if LEFT_OUT.match(line)]) == 1


def test_tail_follows_to_the_end(make_logs: Any, tmp_path: Path) -> None:
    """The real tail, started before the file is there, shows head, gap, tail and the last line."""
    logs = make_logs(head_bytes=500, tail_bytes=300)
    shown = tmp_path / "shown"
    with (
        shown.open("wb") as out,
        subprocess.Popen(
            ["tail", "-n", "+1", "-s", "0.02", "-F", str(logs.file)], stdout=out, stderr=subprocess.DEVNULL
        ) as tail,
    ):
        try:
            logs.store.open(logs.ref, "first")
            for number in range(500):
                logs.store.write(logs.ref, f"line {number}")
                if number % 100 == 0:
                    logs.flush()
            logs.close("last")
            until = time.monotonic() + 20
            while not shown.read_bytes().endswith(b"last\n") and time.monotonic() < until:
                time.sleep(0.01)
        finally:
            tail.kill()
    assert shown.read_bytes() == logs.file.read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 400), max_size=120),
    head=st.integers(1, 3000),
    tail=st.integers(1, 1500),
    writes=st.sets(st.integers(0, 120)),
)
def test_any_log_is_bounded_and_accounts_for_every_line(
    sizes: list[int], head: int, tail: int, writes: set[int]
) -> None:
    log = AttemptLog(b"", head, tail)
    given_lines = [b"%d:" % number + b"x" * size + b"\n" for number, size in enumerate(sizes)]
    written = []
    for number, line in enumerate(given_lines):
        log.add(line, b"", 0.0)
        if number in writes and log.is_due:
            written.append(log.take())
    log.add_last(b"last\n", b"")
    written.append(log.take())
    lines = b"".join(written).splitlines(keepends=True)
    assert lines[-1] == b"last\n"
    notes = [line for line in lines if line.startswith(b"[log]")]
    kept = [line for line in lines[:-1] if line not in notes]
    left_out = len(given_lines) - len(kept)
    if left_out:
        (note,) = notes
        match = LEFT_OUT.match(note.decode())
        assert match is not None
        begin, end = kept[: lines.index(note)], kept[lines.index(note) :]
        assert int(match.group(1)) == left_out
        assert int(match.group(2)) == sum(map(len, given_lines)) - sum(map(len, kept))
        assert begin == given_lines[: len(begin)]
        assert end == given_lines[len(given_lines) - len(end) :]
        assert sum(map(len, begin)) <= head
        # The newest line is kept even where it alone is longer than the tail.
        assert sum(map(len, end)) <= max(tail, len(given_lines[-1]))
    else:
        assert kept == given_lines
        assert notes == []
