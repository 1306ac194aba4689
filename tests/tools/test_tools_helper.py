"""The tools helper on the real grid: what the tools do well, what they do not, and what they say that is not so."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from pdm.testgrid import TestGrid
from pdm.workqueue.wire.agent_events import CancelledEvent, DoneEvent, LogEvent
from pdm.workqueue.wire.agent_requests import CancelRequest, CopyRequest, PathItem, RemoveRequest
from tests.grid.agent_sites import Sites
from tests.helpers.driver import (
    LIMITS,
    ODD_NAMES,
    HelperProcess,
    assert_checked,
    check_items,
    copy_item,
    entries,
    outcomes,
    tree,
)
from tests.protocols.places import owner
from tests.support.variants import usual
from tests.tools.conftest import helper_as, judged, log_of

pytestmark = pytest.mark.grid
WithTool = Callable[[str, str], HelperProcess]


def processes(name: str, under: int) -> list[int]:
    """Running programs of a name that a process has started."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            stat = (directory / "stat").read_text()
            parent = int(stat.rpartition(")")[2].split()[1])
            arguments = (directory / "cmdline").read_bytes().split(b"\0")
            if parent == under and arguments[0].endswith(name.encode()):
                found.append(int(directory.name))
    return found


def wait_for_tool(helper: HelperProcess, name: str = "globus-url-copy") -> int:
    give_up_at = time.monotonic() + 30
    while not (found := processes(name, helper.process.pid)):
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    return found[0]


def wait_for_bytes(sites: Sites) -> None:
    give_up_at = time.monotonic() + 30
    while sites.arriving() < 3_000_000:
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


# -- copies


def test_files_of_odd_names_go_by_one_process_and_each_has_its_own_lines(shared: HelperProcess, sites: Sites) -> None:
    items = []
    for key, name in enumerate(ODD_NAMES):
        source = sites.put(sites.a / os.fsdecode(name), b"content %d" % key)
        items.append(sites.item(source, sites.b / "new" / os.fsdecode(name), key))
    events = shared.run(CopyRequest(shared.new_id(), items, "never", "checksum", LIMITS))
    assert all(isinstance(event, DoneEvent) for event in outcomes(events).values())
    assert tree(sites.b / "new") == tree(sites.a)
    commands = [event.text for event in events if isinstance(event, LogEvent) and event.text.startswith("$ ")]
    assert commands == [f"$ globus-url-copy -c -fast -vb -f (a list of {len(items)} pairs of URLs)"]
    for item in items:
        log = log_of(events, item.key)
        assert any(line.startswith("Source: gsiftp://") for line in log)
        assert any(line.endswith(item.temporary.rpartition("/")[2]) and line.startswith("  ") for line in log)
        assert any(f"renamed to {item.destination}" in line for line in log)


def test_files_are_checked_where_they_are(shared: HelperProcess, sites: Sites) -> None:
    items = check_items(sites.url, sites.b)
    sites.put(sites.b / "another")
    before = tree(sites.b)
    assert_checked(shared.check(items), "destination", judged)
    assert tree(sites.b) == before


def test_a_missing_an_unreadable_and_a_good_source_in_one_list(shared: HelperProcess, sites: Sites) -> None:
    if not owner():
        pytest.skip("only root can make files of other accounts")
    secret = sites.put(sites.a / "secret")
    good = sites.put(sites.a / "good")
    os.chown(secret, 0, 0)
    secret.chmod(0o600)
    items = [
        sites.item(sites.a / "none", sites.b / "none", 1),
        sites.item(secret, sites.b / "secret", 2),
        sites.item(good, sites.b / "good", 3),
    ]
    found = shared.copy(items)
    assert judged(found[1]) == "source NOT_FOUND"
    assert judged(found[2]) == "source PERMISSION_DENIED"
    assert isinstance(found[3], DoneEvent)
    # The tool leaves an empty file of each that it could not read.
    assert tree(sites.b) == {"good": b"content"}


def test_what_is_there_is_not_overwritten(shared: HelperProcess, sites: Sites) -> None:
    """The tool would, without a word."""
    source, there = sites.put(sites.a / "file"), sites.put(sites.b / "file", b"another")
    assert judged(shared.copy([sites.item(source, there)])[1]) == "destination EXISTS"
    assert there.read_bytes() == b"another"
    assert isinstance(shared.copy([sites.item(source, there)], "always")[1], DoneEvent)
    done = shared.copy([sites.item(source, there)])[1]
    assert isinstance(done, DoneEvent) and done.already_there


#: What a tool does besides its work → what must become of the copy. ``$T`` is where the file arrives.
LIES = {
    "it damages the file": (
        '"$REAL" "$@"; printf X | dd of="$T" conv=notrunc status=none',
        "transfer CHECKSUM_MISMATCH",
    ),
    "it cuts the file short": ('"$REAL" "$@"; truncate -s 3 "$T"', "transfer CHECKSUM_MISMATCH"),
    "it makes an empty file": ('"$REAL" "$@"; : > "$T"', "transfer CHECKSUM_MISMATCH"),
    "it does nothing": ("true", "transfer CHECKSUM_MISMATCH"),
    "it fails after the work": ('"$REAL" "$@"; echo "error: something"; exit 1', "DONE"),
    "it dies of SIGABRT after the work": ('"$REAL" "$@"; kill -ABRT $$', "DONE"),
    "it is killed after half of the work": ('"$REAL" "$@"; truncate -s 3 "$T"; kill -KILL $$', "service CRASHED"),
}


@pytest.mark.parametrize("verify", ["checksum", pytest.param("size", marks=pytest.mark.full)])
@pytest.mark.parametrize("lie", usual(LIES, ["it damages the file", "it dies of SIGABRT after the work"]))
def test_only_our_own_proof_counts(lie: str, verify: str, with_tool: WithTool, sites: Sites) -> None:
    script, expected = LIES[lie]
    if verify == "size" and lie == "it damages the file":
        pytest.skip("with verify=size only sizes are compared")
    source = sites.put(sites.a / "file", b"the content of it")
    item = sites.item(source, sites.b / "file")
    temporary = sites.b / item.temporary.rpartition("/")[2]
    helper = with_tool("globus-url-copy", f"T={temporary}; {script.replace('$T', '$T')}")
    found = helper.copy([item], verify=verify)[1]
    assert ("DONE" if isinstance(found, DoneEvent) else judged(found)) == expected
    assert tree(sites.b) == ({"file": b"the content of it"} if expected == "DONE" else {})


def test_the_tool_is_killed(own: HelperProcess, sites: Sites) -> None:
    """Its file is CRASHED, as after a killed helper, and is retried; the rest of its list continues."""
    huge, small = sites.huge(), sites.put(sites.a / "small")
    number = own.new_id()
    items = [sites.item(huge, sites.b / "huge", 1), sites.item(small, sites.b / "small", 2)]
    own.send(CopyRequest(number, items, "never", "checksum", LIMITS))
    pid = wait_for_tool(own)
    wait_for_bytes(sites)
    os.kill(pid, signal.SIGKILL)
    found = outcomes(own.rest(number))
    assert judged(found[1]) == "service CRASHED"
    assert isinstance(found[2], DoneEvent)
    assert tree(sites.b) == {"small": b"content"}


def test_a_cancel_ends_the_tool_within_a_second(own: HelperProcess, sites: Sites) -> None:
    number = own.new_id()
    own.send(CopyRequest(number, [sites.item(sites.huge(), sites.b / "huge")], "never", "checksum", LIMITS))
    pid = wait_for_tool(own)
    wait_for_bytes(sites)
    asked_at = time.monotonic()
    own.send(CancelRequest(number))
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() - asked_at < 1.0
        time.sleep(0.01)
    ended = outcomes(own.rest(number))[1]
    assert isinstance(ended, CancelledEvent) and not ended.leftover
    assert tree(sites.b) == {}


@pytest.mark.full
def test_one_file_of_a_list_is_cancelled_and_the_others_arrive(own: HelperProcess, sites: Sites) -> None:
    huge, small = sites.huge(), sites.put(sites.a / "small")
    number = own.new_id()
    items = [sites.item(huge, sites.b / "huge", 1), sites.item(small, sites.b / "small", 2)]
    own.send(CopyRequest(number, items, "never", "checksum", LIMITS))
    wait_for_tool(own)
    wait_for_bytes(sites)
    own.send(CancelRequest(number, [1]))
    found = outcomes(own.rest(number))
    assert isinstance(found[1], CancelledEvent)
    assert isinstance(found[2], DoneEvent)
    assert tree(sites.b) == {"small": b"content"}


@pytest.mark.full
def test_a_tool_that_makes_no_progress_is_ended(with_tool: WithTool, sites: Sites) -> None:
    source = sites.put(sites.a / "file")
    script = 'echo "Source: x"; echo "Dest:   y"; echo "  z"; sleep 100'
    helper = with_tool("globus-url-copy", script)
    assert (
        judged(helper.copy([sites.item(source, sites.b / "file")], stall_s=10.0, total_s=8.0)[1]) == "transfer TIMEOUT"
    )


@pytest.mark.full
def test_a_full_disk(shared: HelperProcess, sites: Sites) -> None:
    small = sites.b / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(small)], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        sites.grid.give(small)
        source = sites.put(sites.a / "file", b"x" * 3_000_000)
        for _ in range(5):
            found = shared.copy([sites.item(source, small / "file")])[1]
            # The source may be heard first: its data connection was cut. It is tried again.
            if judged(found) == "destination NO_SPACE":
                break
        assert judged(found) == "destination NO_SPACE"
        assert tree(small) == {}
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)


# -- listings


def test_a_listing_is_put_right(shared: HelperProcess, sites: Sites) -> None:
    """gfal-ls shows links as what they lead to and pipes as files, and breaks off at a name that is not UTF-8."""
    directory = sites.a / "tree"
    sites.put(directory / "file")
    sites.put(directory / "sub" / "deep")
    (directory / "to sub").symlink_to("sub")
    os.mkfifo(directory / "pipe")
    events = shared.list(sites.url(directory))
    kinds = {path: entry.type for path, entry in entries(events).items()}
    assert kinds == {"file": "file", "sub": "directory", "sub/deep": "file", "to%20sub": "link", "pipe": "other"}
    log = log_of(events, 0)
    assert f"$ gfal-ls -al --time-style full-iso {sites.url(directory)}" in log
    assert any(line.startswith("-rw-") and line.endswith(" file\t") for line in log)
    assert any("b'to sub' is a link: gfal-ls calls it a directory" in line for line in log)

    sites.put(directory / os.fsdecode(b"\xe9"))
    sites.put(directory / "new\nline")
    events = shared.list(sites.url(directory))
    assert {"%E9", "new%0Aline", "sub/deep"} <= set(entries(events))
    assert any("gfal-ls stopped after" in line for line in log_of(events, 0))


def test_a_missing_directory(shared: HelperProcess, sites: Sites) -> None:
    assert judged(shared.list(sites.url(sites.a / "none"))[-1]) == "source NOT_FOUND"


# -- removals, new names, new directories


def test_files_are_removed_by_one_process_and_looked_for(shared: HelperProcess, sites: Sites) -> None:
    files = [sites.put(sites.b / f"file {number}") for number in range(5)]
    kept = sites.put(sites.b / "sub" / "kept")
    items = [PathItem(key, sites.url(file)) for key, file in enumerate(files)]
    items += [
        PathItem(7, sites.url(sites.b / "gone")),
        PathItem(8, sites.url(sites.b / "gone too"), again=True),
        # The tool ends at the first that it cannot remove, and says nothing of the rest.
        PathItem(9, sites.url(sites.b / "sub")),
        PathItem(10, sites.url(sites.put(sites.b / "last"))),
    ]
    events = shared.run(RemoveRequest(shared.new_id(), items, LIMITS))
    found = outcomes(events)
    assert all(isinstance(found[key], DoneEvent) for key in (0, 1, 2, 3, 4, 8, 10))
    assert judged(found[7]) == "source NOT_FOUND"
    assert judged(found[9]) == "source IS_A_DIRECTORY"
    assert f"{sites.url(files[0])}\tDELETED" in log_of(events, 0)
    assert tree(sites.b) == {"sub/kept": b"content"} and kept.exists()


@pytest.mark.full
def test_a_directory_that_is_not_empty_stays(shared: HelperProcess, sites: Sites) -> None:
    """The tool removes directories only with all that is in them."""
    sites.put(sites.b / "sub" / "kept")
    found = shared.remove(PathItem(1, sites.url(sites.b / "sub"), directory=True))
    assert judged(found[1]) == "source NOT_EMPTY"
    assert tree(sites.b) == {"sub/kept": b"content"}


@pytest.mark.parametrize("word", ["DELETED", "MISSING"])
@pytest.mark.full
def test_a_removal_that_was_none(word: str, with_tool: WithTool, sites: Sites) -> None:
    file = sites.put(sites.b / "file")
    script = f'for one; do :; done; while read -r url; do printf \'%s\\t{word}\\n\' "$url"; done < "$one"'
    found = with_tool("gfal-rm", script).remove(PathItem(1, sites.url(file)))
    assert judged(found[1]) == "source SERVER_ERROR"
    assert file.exists()


def test_a_new_name_replaces_nothing_unasked(shared: HelperProcess, sites: Sites) -> None:
    """gfal-rename replaces without a word."""
    file, there = sites.put(sites.b / "file"), sites.put(sites.b / "there", b"another")
    assert judged(shared.rename(sites.url(file), sites.url(there))) == "destination EXISTS"
    assert isinstance(shared.rename(sites.url(file), sites.url(there), "always"), DoneEvent)
    assert tree(sites.b) == {"there": b"content"}
    assert judged(shared.rename(sites.url(file), sites.url(sites.b / "new"))) == "source NOT_FOUND"


@pytest.mark.full
def test_a_rename_that_was_none(with_tool: WithTool, sites: Sites) -> None:
    file = sites.put(sites.b / "file")
    found = with_tool("gfal-rename", "exit 0").rename(sites.url(file), sites.url(sites.b / "new"))
    assert judged(found) == "destination SERVER_ERROR"


def test_a_new_directory(shared: HelperProcess, sites: Sites) -> None:
    """gfal-mkdir -p calls a file a directory that is made; some servers make those above unasked."""
    file = sites.put(sites.b / "file")
    url = sites.url
    assert isinstance(shared.make(url(sites.b / "new"))[0], DoneEvent)
    assert judged(shared.make(url(sites.b / "new"))[0]) == "destination EXISTS"
    assert judged(shared.make(url(file), parents=True)[0]) == "destination NOT_A_DIRECTORY"
    assert judged(shared.make(url(sites.b / "no" / "new"))[0]) == "destination NOT_FOUND"
    assert isinstance(shared.make(url(sites.b / "no" / "new"), parents=True)[0], DoneEvent)
    assert (sites.b / "no" / "new").is_dir()


@pytest.mark.full
def test_a_directory_that_was_not_made(with_tool: WithTool, sites: Sites) -> None:
    found = with_tool("gfal-mkdir", "exit 0").make(sites.url(sites.b / "new"))
    assert judged(found[0]) == "destination SERVER_ERROR"


# -- what is refused


@pytest.mark.full
def test_credentials(grid: TestGrid, sites: Sites) -> None:
    item = sites.item(sites.put(sites.a / "file"), sites.b / "file")
    with helper_as(grid, X509_USER_PROXY="") as helper:
        assert judged(helper.copy([item])[1]).endswith("CREDENTIAL_MISSING")
    with helper_as(grid, X509_USER_PROXY=str(grid.users["alice"].files.expired_proxy)) as helper:
        assert judged(helper.copy([item])[1]) == "service CREDENTIAL_EXPIRED"
        assert judged(helper.list(sites.url(sites.a))[-1]) == "service CREDENTIAL_EXPIRED"


@pytest.mark.full
def test_no_sftp_and_no_local_disk(shared: HelperProcess, sites: Sites) -> None:
    """gfal2 checks no host keys and loses bytes on their way to SFTP servers; the disk has its roots."""
    source = sites.url(sites.put(sites.a / "file"))
    for url in ("sftp://localhost:22/x", f"file://{sites.b}/x"):
        assert judged(shared.copy([copy_item(1, source, url, 7)])[1]).endswith("UNSUPPORTED")
        assert judged(shared.remove(PathItem(1, url))[1]).endswith("UNSUPPORTED")
