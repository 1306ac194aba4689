"""``pdm`` as users of ``cp``, ``ls`` and ``rm`` type it: several sources, patterns, directories as destinations."""

from __future__ import annotations

import grp
import json
import os
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService
from tests.support.commands import pdm


@pytest.fixture
def source(directory: Path) -> Path:
    """A tree of its own at site 1; at the site it is ``/<its name>``."""
    (directory / "sub").mkdir()
    (directory / "x.root").write_bytes(b"1" * 3000)
    (directory / "y.root").write_bytes(b"2")
    (directory / "[odd]*").write_bytes(b"3")
    (directory / ".hidden.root").write_bytes(b"4")
    (directory / "sub" / "z").write_bytes(b"5")
    return directory


@pytest.fixture
def target(service: TestService, source: Path) -> Path:
    """A directory at site 2 of the same name, which is not there yet."""
    return service.directory / "storage" / "b" / source.name


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_several_sources_and_patterns_keep_their_names(service: TestService, source: Path, target: Path) -> None:
    place, there = f"1:/{source.name}", f"2:/{target.name}"
    missing = pdm(service, "cp", f"{place}/*.root", f"{place}/sub", there, code=2)
    assert "is no existing directory" in missing.stderr and "Let it end in /" in missing.stderr
    done = pdm(service, "cp", "-r", f"{place}/*.root", f"{place}/sub", f"{there}/")
    assert len(re.findall(r"^job \d+ submitted: ", done.stderr, re.MULTILINE)) == 3
    assert names(target) == {"x.root", "y.root", "sub"}
    pdm(service, "cp", rf"{place}/\[odd\]\*", there + "/")
    assert (target / "[odd]*").read_bytes() == b"3"
    numbers = pdm(service, "cp", f"{place}/sub/", f"{place}/.h*", there, "--no-wait").stdout.split()
    ended = json.loads(pdm(service, "wait", *numbers, "-F", "json").stdout)
    assert [job["status"] for job in ended] == ["DONE", "DONE"]
    assert names(target) == {"x.root", "y.root", "sub", "[odd]*", "z", ".hidden.root"}


def test_a_file_goes_into_a_directory_that_is_there(service: TestService, source: Path, target: Path) -> None:
    target.mkdir()
    done = pdm(service, "cp", f"1:/{source.name}/x.root", f"2:/{target.name}")
    assert f"{target.name}/ is a directory: the file goes into it" in done.stderr
    assert "failed 1" not in done.stderr
    assert names(target) == {"x.root"}
    # The content of a directory: twice is once.
    for _ in range(2):
        pdm(service, "cp", f"1:/{source.name}", f"2:/{target.name}")
    assert names(target) == names(source)


@pytest.mark.full
def test_a_site_alone_is_its_default_directory(service: TestService, source: Path, target: Path) -> None:
    pdm(service, "cp", f"1:/{source.name}", "local-b:")
    assert names(target) == names(source)
    assert f"{source.name}/\n" in pdm(service, "ls", "local-b").stdout


def test_nothing_that_matches_is_an_error_that_says_so(service: TestService, source: Path, target: Path) -> None:
    for command in (["cp", f"1:/{source.name}/*.dat", f"2:/{target.name}/"], ["rm", f"1:/{source.name}/*.dat"]):
        done = pdm(service, *command, code=3)
        assert "*.dat: nothing matches" in done.stderr
        assert not target.exists()


@pytest.mark.full
def test_several_are_removed_renamed_and_made(service: TestService, source: Path) -> None:
    place = f"1:/{source.name}"
    pdm(service, "mkdir", f"{place}/new", f"{place}/newer")
    pdm(service, "mv", f"{place}/x.root", f"{place}/y.root", f"{place}/new")
    assert names(source / "new") == {"x.root", "y.root"}
    done = pdm(service, "rm", f"{place}/new/x.root", f"{place}/none", code=6)
    assert "NOT_FOUND" in done.stderr
    pdm(service, "rm", "-r", f"{place}/ne*")
    assert names(source) == {"sub", "[odd]*", ".hidden.root"}


@pytest.mark.full
def test_statuses_of_several_jobs(service: TestService) -> None:
    numbers = pdm(service, "mkdir", "1:/a", "1:/b", "--protocol", "dummy", "--no-wait").stdout.split()
    pdm(service, "wait", *numbers, "999999999", code=6)
    shown = pdm(service, "status", *numbers).stdout
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("job ")] == numbers
    found = json.loads(pdm(service, "status", *numbers, "-F", "json").stdout)
    assert [job["id"] for job in found] == [int(number) for number in numbers]


@pytest.mark.full
def test_long_listings_have_human_sizes(service: TestService, source: Path) -> None:
    place = f"1:/{source.name}"
    by = f"{pwd.getpwuid(os.getuid()).pw_name}  {grp.getgrgid(os.getgid()).gr_name}"
    shown = pdm(service, "ls", "-l", place).stdout
    assert re.search(rf"^-rw\S+  {by}  2\.9 KiB  \S+ \S+  x\.root$", shown, re.MULTILINE)
    shown = pdm(service, "ls", "-lb", f"{place}/x.*").stdout
    assert re.search(rf"^-rw\S+  {by}  3000  \S+ \S+  /\S+/x\.root$", shown)
    assert pdm(service, "ls", "--depth", "0", place).stdout == f"{source.name}/\n"
    assert "sub/z" in pdm(service, "ls", "--depth", "2", place).stdout
    both = pdm(service, "ls", place + "/sub", place + "/none", code=6)
    assert both.stdout == f"local-a:/{source.name}/sub:\nz\n"
    assert "NOT_FOUND" in both.stderr


def test_below_an_escaped_path_entries_keep_their_directories(service: TestService, source: Path) -> None:
    (source / "[dir]" / "deep").mkdir(parents=True)
    (source / "[dir]" / "deep" / "file").touch()
    shown = pdm(service, "ls", "-R", rf"1:/{source.name}/\[dir\]").stdout
    assert shown.splitlines() == ["deep/", "deep/file"]


def test_stat_and_du(service: TestService, source: Path) -> None:
    place = f"1:/{source.name}"
    shown = pdm(service, "stat", f"{place}/x.root").stdout
    assert re.match(rf"local-a:/{source.name}/x\.root\n  type  file\n  size  2\.9 KiB \(3000 bytes\)\n", shown)
    assert json.loads(pdm(service, "stat", f"{place}/x.root", "-F", "json").stdout)["size"] == 3000
    totals = [line.split() for line in pdm(service, "du", "-b", "--depth", "1", place).stdout.splitlines()[1:]]
    assert totals == [
        ["3004", "5", "1", f"local-a:/{source.name}"],
        ["1", "1", "0", f"local-a:/{source.name}/sub"],
    ]


@pytest.mark.parametrize(
    ("typed", "words"),
    [("locala:/x", "Did you mean local-a?"), ("nowhere:/x", "no site nowhere. Known sites: ")],
)
def test_a_site_that_is_not_there(service: TestService, typed: str, words: str) -> None:
    assert words in pdm(service, "ls", typed, code=3).stderr


def test_the_doctor_finds_all_well_or_says_what_to_do(service: TestService) -> None:
    shown = pdm(service, "doctor").stdout
    assert re.search(r"^server +https://\S+, version \S+, certificate\s+valid \d+ d", shown, re.MULTILINE)
    assert re.search(r"^clock +agrees with that of the server$", shown, re.MULTILINE)
    assert re.search(r"^you +/DC=.*CN=admin \(operator\)", shown, re.MULTILINE)
    assert re.search(r"^site local-a +ok$", shown, re.MULTILINE)
    pdm(service, "site", "add", "lab", "--gridftp", "gsiftp://127.0.0.1:1")
    found = json.loads(pdm(service, "doctor", "-F", "json", code=1).stdout)
    assert {"part": "site lab", "what": "ok, no credential", "advice": "Run 'pdm delegate'."} in found
    pdm(service, "site", "remove", "lab")
    environment = {**service.environment("admin"), "PDM_URL": "https://127.0.0.1:1"}
    command = [sys.executable, "-m", "pdm.workqueue.cli", "doctor"]
    away = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert away.returncode == 5
    assert "-> Check the address, and that the service is running." in away.stdout


def test_a_mirror_is_planned_then_made(service: TestService, source: Path, target: Path) -> None:
    (source / "link").symlink_to("nowhere")
    (target / "old").mkdir(parents=True)
    (target / "y.root").write_bytes(b"2")
    options = ["--sync", "size", "--delete", "--exclude", "*odd*", "--exclude", ".*"]
    command = ["cp", "-r", *options, f"1:/{source.name}/", f"2:/{target.name}/"]
    plan = pdm(service, *command, "-n", code=6)
    assert sorted(plan.stdout.splitlines()) == [
        f"copy                          1 B  /{source.name}/sub/z",
        f"copy                      2.9 KiB  /{source.name}/x.root",
        f"delete                        0 B  /{target.name}/old",
    ]
    line, estimate = plan.stderr.splitlines()[-2:]
    assert line == (
        "dry run, nothing was changed: copy 2 (2.9 KiB), already there 1 (1 B), delete 1, filtered out 2,"
        " skipped 1 (1 link that leads nowhere), failed 0"
    )
    assert re.match(r"(no )?estimate .*; the destination has [0-9.]+ [A-Z]iB free$", estimate)
    assert names(target) == {"old", "y.root"}
    done = pdm(service, *command, code=6)
    assert "left out by the filters" not in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "copied 2, already there 1, deleted 1, filtered out 2, skipped 1 (1 link that leads nowhere), failed 0"
    )
    assert names(target) == {"x.root", "y.root", "sub"}
    number = done.stderr.split()[1]
    assert "plan      copy 2 (2.9 KiB), already there 1 (1 B), delete 1, filtered out 2\n" in (
        pdm(service, "status", number).stdout
    )
    options[1] = "checksum"
    again = pdm(service, "cp", *options, f"1:/{source.name}/", f"2:/{target.name}/", "-n", code=6)
    assert "copy 0, overwrite if different 3 (2.9 KiB), already there 0, filtered out 2" in again.stderr


def test_files_are_moved_to_another_site(service: TestService, source: Path, target: Path) -> None:
    done = pdm(service, "mv", f"1:/{source.name}/x.root", f"1:/{source.name}/y.root", f"2:/{target.name}/")
    assert "copied 1, already there 0, removed at the source 1, skipped 0, failed 0" in done.stderr
    assert names(target) == {"x.root", "y.root"}
    assert names(source) == {"sub", "[odd]*", ".hidden.root"}
