"""Copies of the FILE helper, as a real process: what arrives, what is refused, and what is never left behind."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from pdm.workqueue.wire.agent_events import CancelledEvent, DoneEvent, ProgressEvent
from pdm.workqueue.wire.agent_requests import CancelRequest, CopyItem, CopyRequest, TimeLimits
from tests.helpers.driver import ODD_NAMES, HelperProcess, adler, copy_item, fault, outcomes, put, tree


def item(source: Path, destination: Path, key: int = 1, attempt: int = 1) -> CopyItem:
    return copy_item(key, source.as_uri(), destination.as_uri(), source.stat().st_size, attempt)


def test_odd_names_and_missing_directories(file_helper: HelperProcess, site: Path) -> None:
    files = [put(site / "from" / os.fsdecode(name), name) for name in (*ODD_NAMES, b"n" * 255)]
    items = [item(file, site / "to" / "deep" / file.name, key) for key, file in enumerate(files)]
    done = file_helper.copy(items)
    assert tree(site / "to" / "deep") == tree(site / "from")
    for key, file in enumerate(files):
        content = file.read_bytes()
        assert done[key] == DoneEvent(1, key, len(content), len(content), adler(content))


@pytest.mark.parametrize("verify", ["checksum", "size"])
@pytest.mark.parametrize("size", [0, 1, 1024 * 1024, 3 * 1024 * 1024 + 1])
def test_every_size_arrives(file_helper: HelperProcess, site: Path, verify: str, size: int) -> None:
    content = os.urandom(size)
    done = file_helper.copy([item(put(site / "f", content), site / "g")], verify=verify)
    assert (site / "g").read_bytes() == content
    assert done[1] == DoneEvent(1, 1, size, size, adler(content) if verify == "checksum" else None)


@pytest.mark.parametrize(
    ("overwrite", "there", "expected", "transferred"),
    [
        ("never", b"same one", b"same one", 0),
        ("never", b"an other", b"an other", "EXISTS"),
        ("never", b"longer than it", b"longer than it", "EXISTS"),
        ("different", b"same one", b"same one", 0),
        ("different", b"an other", b"same one", 8),
        ("always", b"same one", b"same one", 8),
        ("always", b"an other", b"same one", 8),
    ],
)
def test_what_is_at_the_destination(
    file_helper: HelperProcess, site: Path, overwrite: str, there: bytes, expected: bytes, transferred: int | str
) -> None:
    source, destination = put(site / "f", b"same one"), put(site / "to" / "g", there)
    outcome = file_helper.copy([item(source, destination)], overwrite)[1]
    assert tree(site / "to") == {"g": expected}
    if isinstance(transferred, str):
        assert fault(outcome) == ("destination", transferred)
    else:
        assert outcome == DoneEvent(1, 1, 8, transferred, adler(b"same one"), already_there=not transferred)


def test_a_large_directory_is_looked_into_once(file_helper: HelperProcess, site: Path) -> None:
    files = [put(site / "from" / f"f{number}", b"%d" % number) for number in range(20)]
    put(site / "to" / "f3", b"3")
    put(site / "to" / "f4", b"x")
    outcome = file_helper.copy([item(file, site / "to" / file.name, key) for key, file in enumerate(files)])
    assert outcome[3] == DoneEvent(1, 3, 1, 0, adler(b"3"), already_there=True)
    assert fault(outcome[4]) == ("destination", "EXISTS")
    assert sum(isinstance(event, DoneEvent) for event in outcome.values()) == 19


def test_one_bad_file_fails_alone(file_helper: HelperProcess, site: Path) -> None:
    good = put(site / "f")
    (site / "directory").mkdir()
    os.mkfifo(site / "pipe")
    gone = copy_item(3, (site / "gone").as_uri(), (site / "to" / "3").as_uri(), 7)
    items = [
        item(good, site / "to" / "1", 1),
        item(good, site / "directory", 2),
        gone,
        item(good, good / "below", 4),
        copy_item(5, (site / "directory").as_uri(), (site / "to" / "5").as_uri(), 0),
        copy_item(6, (site / "pipe").as_uri(), (site / "to" / "6").as_uri(), 0),
        copy_item(7, good.as_uri(), (site / "to" / ("n" * 256)).as_uri(), 7),
        copy_item(8, good.as_uri(), (site / "to" / "8").as_uri(), 8),
    ]
    outcome = file_helper.copy(items)
    assert isinstance(outcome[1], DoneEvent)
    assert {key: fault(outcome[key]) for key in range(2, 9)} == {
        2: ("destination", "IS_A_DIRECTORY"),
        3: ("source", 2),
        4: ("destination", "NOT_A_DIRECTORY"),
        5: ("source", 21),
        6: ("source", "UNSUPPORTED"),
        7: ("destination", 36),
        8: ("source", "SIZE_CHANGED"),
    }
    assert tree(site / "to") == {"1": b"content"}


def test_what_earlier_attempts_left_goes_first(file_helper: HelperProcess, site: Path) -> None:
    third = item(put(site / "f"), site / "to" / "g", attempt=3)
    for url in third.stale:
        put(site / "to" / url.rpartition("/")[2], b"half of it")
    assert isinstance(file_helper.copy([third])[1], DoneEvent)
    assert tree(site / "to") == {"g": b"content"}


def test_a_full_disk_leaves_nothing(file_helper: HelperProcess, site: Path) -> None:
    # The limit on the size of files gives the same kind of refusal in the middle of a write as a full disk.
    source, big = put(site / "f", bytes(4 * 1024 * 1024)), 1024 * 1024
    resource.prlimit(file_helper.process.pid, resource.RLIMIT_FSIZE, (big, big))
    for verify in ("checksum", "size"):
        outcome = file_helper.copy([item(source, site / "to" / "g")], verify=verify)[1]
        assert fault(outcome) == ("destination", errno.EFBIG)
        assert not outcome.leftover  # type: ignore[union-attr]
    assert tree(site / "to") == {}


def test_a_cancelled_copy_leaves_nothing(file_helper: HelperProcess, site: Path) -> None:
    source = site / "sparse"
    source.touch()
    os.truncate(source, 1 << 40)
    request = CopyRequest(
        1,
        [item(source, site / "to" / "g", 1), item(source, site / "to" / "h", 2)],
        "never",
        "checksum",
        TimeLimits(),
    )
    file_helper.send(request)
    while not isinstance(file_helper.event(), ProgressEvent):
        pass
    file_helper.send(CancelRequest(1))
    outcome = outcomes(file_helper.rest(1))
    assert outcome == {1: CancelledEvent(1, 1), 2: CancelledEvent(1, 2)}
    assert tree(site / "to") == {}


def test_too_slow_a_copy_is_given_up(file_helper: HelperProcess, site: Path) -> None:
    source = site / "sparse"
    source.touch()
    os.truncate(source, 1 << 40)
    outcome = file_helper.copy([item(source, site / "g")], total_s=0.2, least_rate=1e15)[1]
    assert fault(outcome) == ("transfer", "TIMEOUT")
    assert [path.name for path in site.iterdir()] == ["sparse"]


@pytest.mark.parametrize("destination", ["../out/x", "link/x", "directory/../../out/x"])
def test_nothing_is_written_outside(file_helper: HelperProcess, site: Path, destination: str) -> None:
    out = site.parent / "out"
    out.mkdir()
    (site / "link").symlink_to(out)
    (site / "directory").mkdir()
    url = f"{site.as_uri()}/{destination}"
    outcome = file_helper.copy([copy_item(1, put(site / "f").as_uri(), url, 7)], "always")[1]
    assert fault(outcome)[0] == "destination"
    assert fault(outcome)[1] in {"PERMISSION_DENIED", "NOT_A_DIRECTORY"}
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("target", ["../secret", "../out", "{outside}", "up/../../secret"])
def test_nothing_is_read_outside(file_helper: HelperProcess, site: Path, target: str) -> None:
    secret = put(site.parent / "secret", b"secret")
    (site.parent / "out").symlink_to(secret)
    (site / "up").mkdir()
    (site / "link").symlink_to(target.format(outside=secret))
    outcome = file_helper.copy([copy_item(1, (site / "link").as_uri(), (site / "g").as_uri(), 6)])[1]
    assert fault(outcome) == ("source", "PERMISSION_DENIED")
    assert not (site / "g").exists()


def test_links_inside_are_followed(file_helper: HelperProcess, site: Path) -> None:
    put(site / "directory" / "f")
    (site / "relative").symlink_to("directory/../directory/f")
    (site / "absolute").symlink_to(site / "directory" / "f")
    (site / "by").symlink_to("directory")
    sources = [site / "relative", site / "absolute", site / "by" / "f"]
    outcome = file_helper.copy([item(source, site / "to" / f"{key}", key) for key, source in enumerate(sources)])
    assert all(isinstance(event, DoneEvent) for event in outcome.values())
    assert tree(site / "to") == {"0": b"content", "1": b"content", "2": b"content"}
