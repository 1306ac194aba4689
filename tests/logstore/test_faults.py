"""Full and missing disks: no caller waits for ever, and every lost line is reported."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import gatherResults
from twisted.logger import LogEvent

from pdm.workqueue.logstore.attempt_log import LogRef


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system; the test with a limit on file sizes runs everywhere")
    directory = tmp_path / "small"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode(errors='replace').strip()}")
    yield directory
    subprocess.run(["umount", directory], check=True)


@pytest.fixture
def file_size_limit() -> Iterator[int]:
    """No file of this process grows beyond 20 kB: a write that goes over is cut short, the next fails."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield 20_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def _complaints(logs: Any, lost_errors: list[LogEvent]) -> list[str]:
    logs.reactor.run_handed()
    told = [event["complaint"] for event in lost_errors]
    lost_errors.clear()
    return told


def test_a_full_disk(make_logs: Any, small_disk: Path, lost_errors: list[LogEvent]) -> None:
    logs = make_logs(small_disk / "logs")
    logs.store.open(logs.ref, "first")
    logs.flush()
    (small_disk / "fill").write_bytes(b"x" * (64 * 1024 - 5 * 4096))
    for number in range(3000):
        logs.store.write(logs.ref, f"{number} " + "y" * 40)
    assert not logs.close("outcome=DONE").complete
    (told,) = _complaints(logs, lost_errors)
    assert "abcdef0123/log could not be written: No space left on device; failed writes: " in told
    assert logs.store.errors >= 1


def test_a_full_disk_fails_thousands_but_complains_once(
    make_logs: Any, small_disk: Path, lost_errors: list[LogEvent]
) -> None:
    logs = make_logs(small_disk / "logs")
    refs = [LogRef("abcdef0123", element, 1) for element in range(2000)]
    for ref in refs:
        logs.store.open(ref, "first " + "y" * 100)
    closed_logs = logs.reactor.wait(gatherResults([logs.store.close(ref, "last") for ref in refs]))
    incomplete = [closed for closed in closed_logs if not closed.complete]
    assert len(incomplete) > 1000
    assert logs.store.errors >= len(incomplete)
    assert len(_complaints(logs, lost_errors)) == 1


def test_space_comes_back(make_logs: Any, file_size_limit: int, lost_errors: list[LogEvent]) -> None:
    """A write that was cut in the middle of a line, then a failed one; later lines say what is missing."""
    logs = make_logs()
    logs.store.open(logs.ref, "first")
    logs.flush()
    text = "\n".join(f"line {number} " + "y" * 40 for number in range(1000))
    logs.store.write(logs.ref, text)
    logs.flush()
    assert logs.file.stat().st_size == file_size_limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    logs.store.write(logs.ref, "space again")
    assert not logs.close("outcome=DONE").complete, "lines are missing: that is not complete"
    lines = logs.lines()
    assert lines[-2:] == ["space again", "outcome=DONE"]
    # The half line at the old end counts as lost, and the note begins on a line of its own.
    whole = [line for line in lines if line.startswith("line ") and line.endswith(" " + "y" * 40)]
    assert 200 < len(whole) < 1000
    assert lines[-3] == f"[log] {1000 - len(whole)} lines could not be written: File too large"
    assert "File too large" in _complaints(logs, lost_errors)[0]


def test_a_directory_that_is_a_file(logs: Any, lost_errors: list[LogEvent]) -> None:
    (logs.directory / "ab").write_text("in the way")
    logs.store.open(logs.ref, "first")
    assert not logs.close().complete
    assert "could not be written: Not a directory" in _complaints(logs, lost_errors)[0]


def test_a_link_is_not_followed(logs: Any, tmp_path: Path, lost_errors: list[LogEvent]) -> None:
    other = tmp_path / "other"
    other.write_text("precious\n")
    logs.file.parent.mkdir(parents=True)
    logs.file.symlink_to(other)
    logs.store.open(logs.ref, "first")
    assert not logs.close().complete
    assert other.read_text() == "precious\n"
    assert "Too many levels of symbolic links" in _complaints(logs, lost_errors)[0]


def test_directories_removed_under_a_running_log_are_made_again(logs: Any) -> None:
    logs.store.open(logs.ref, "first")
    logs.flush()
    logs.file.unlink()
    logs.file.parent.rmdir()
    logs.file.parent.parent.rmdir()
    logs.store.write(logs.ref, "second")
    assert logs.close().complete
    assert logs.lines() == ["second", "end"]


def test_a_fault_in_the_thread_ends_neither_it_nor_the_wait(
    logs: Any, monkeypatch: pytest.MonkeyPatch, lost_errors: list[LogEvent]
) -> None:
    from pdm.workqueue.logstore.writer import JobFile

    def broken(self: JobFile, logs: object) -> None:
        raise RuntimeError("a fault of ours")

    logs.store.open(logs.ref, "first")
    with monkeypatch.context() as patch:
        patch.setattr(JobFile, "append", broken)
        assert not logs.close().complete
    (told,) = _complaints(logs, lost_errors)
    assert told == "a fault of the log store: RuntimeError: a fault of ours"
    logs.store.open(logs.ref, "again")
    assert logs.close().complete


def test_a_directory_that_cannot_be_made(make_logs: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        make_logs(tmp_path / "file" / "logs")
