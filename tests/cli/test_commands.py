"""``pdm`` as its users meet it: a process of its own, against a daemon of its own, on local directories."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService
from tests.support.commands import pdm, run_on_terminal

PDM = [sys.executable, "-m", "pdm.workqueue.cli"]
#: A job that runs until it is cancelled, and shows one file of it.
ENDLESS = ("--protocol", "dummy", "--option", "dummy.files=1", "--option", "dummy.hang=true")


def submitted(service: TestService, *arguments: str) -> int:
    return int(json.loads(pdm(service, *arguments, "--no-wait", "-F", "json").stdout)["id"])


def test_whoami_and_sites(service: TestService) -> None:
    assert re.match(r"/.*CN=.* \(operator\)\n", pdm(service, "whoami").stdout)
    sites = json.loads(pdm(service, "sites", "-F", "json").stdout)
    assert [site["id"] for site in sites] == [1, 2]


def test_a_listing_in_one_command(service: TestService, directory: Path) -> None:
    (directory / "sub" / "deep").mkdir(parents=True)
    (directory / "sub" / "x").write_bytes(b"12345")
    (directory / "two\nlines").write_bytes(b"1")
    (directory / "\x1b[31mred").write_bytes(b"1")
    (directory / "größe").write_bytes(b"1")
    (directory / "back\\slash").write_bytes(b"1")
    Path(os.fsdecode(os.fsencode(directory) + b"/latin\xe9")).write_bytes(b"1")
    os.utime(directory / "größe", (1_000_000_000, 1_000_000_000))
    (directory / "größe").chmod(0o640)
    place = f"1:/{directory.name}"

    done = pdm(service, "ls", place)
    assert sorted(done.stdout.splitlines()) == sorted(
        ["sub/", r"two\nlines", r"\x1b[31mred", "größe", r"back\\slash", r"latin\xe9"]
    )
    assert done.stderr == ""
    long = pdm(service, "ls", "-l", place).stdout
    assert re.search(r"^-rw-r-----  \S+  \S+  +1 B  2001-09-09 01:46  größe$", long, re.MULTILINE)
    assert re.search(r"^d[rwx-]{9} .* sub/$", long, re.MULTILINE)
    assert {"sub/", "sub/x", "sub/deep/"} < set(pdm(service, "ls", "-R", place).stdout.splitlines())
    raw = subprocess.run([*PDM, "ls", "-0", place], env=service.environment("admin"), capture_output=True, check=True)
    assert set(raw.stdout.split(b"\0")) == {*(os.fsencode(path.name) for path in directory.iterdir()), b""}
    names = [
        entry["name"] for entry in json.loads(pdm(service, "-F", "json", "ls", place).stdout)[f"/{directory.name}"]
    ]
    assert "two\nlines" in names


def test_the_events_of_a_job_and_how_they_are_followed(service: TestService, directory: Path) -> None:
    (directory / "file").write_bytes(b"12345")
    number = submitted(service, "cp", f"1:/{directory.name}/file", f"2:/{directory.name}-events")
    followed = pdm(service, "events", "-f", str(number)).stdout.splitlines()
    assert re.match(rf"\S+ \S+ UTC job {number} SUBMITTED: 0 of 1 done", followed[0])
    assert re.search(r"RUNNING -> DONE: 2 of 2 done, 5 B$", followed[-1])
    stored = [json.loads(line) for line in pdm(service, "-F", "json", "events", str(number)).stdout.splitlines()]
    assert [event["data"]["status"] for event in stored] == ["SUBMITTED", "RUNNING", "DONE"]
    assert len(pdm(service, "events", "-n", "2", "--kind", "job").stdout.splitlines()) == 2
    assert "no job 999999" in pdm(service, "events", "999999", code=3).stderr


def test_a_file_lists_itself(service: TestService, directory: Path) -> None:
    (directory / "one").write_bytes(b"1")
    assert pdm(service, "ls", f"1:/{directory.name}/one").stdout == "one\n"


def test_a_listing_of_nothing_fails_in_words(service: TestService) -> None:
    done = pdm(service, "ls", "1:/not/there", code=3)
    assert done.stdout == ""
    assert "NOT_FOUND" in done.stderr
    assert done.stderr.startswith("pdm: ")
    assert "Check the path" in done.stderr


@pytest.mark.full
def test_entries_skipped_by_a_copy_are_reported(service: TestService, directory: Path) -> None:
    tree = directory / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"content")
    (tree / "link").symlink_to(tree / "file")
    (tree / "\x1bdangling").symlink_to("nowhere")
    for at in range(12):
        (tree / f"directory {at}").symlink_to(directory)
    place, there = f"1:/{directory.name}", f"2:/{directory.name}"
    done = pdm(service, "cp", f"{place}/tree", f"{there}/new", code=6)
    found = re.match(r"job (\d+) submitted\n", done.stderr)
    assert found is not None
    number = found[1]
    assert f"job {number} DONE, partly  3/3 elements" in done.stderr
    last = "copied 2, already there 0, skipped 13 (1 link that leads nowhere, 12 links to directories), failed 0"
    assert done.stderr.splitlines()[-1] == last
    assert f"and 3 more: pdm status {number} --all" in done.stderr
    status = pdm(service, "status", number).stdout
    assert "skipped   13: 1 link that leads nowhere, 12 links to directories" in status
    assert f"and 3 more: pdm status {number} --all" in status
    shown = pdm(service, "status", number, "--all").stdout
    for path in tree.iterdir():
        assert (f"skipped /{directory.name}/tree/{path.name}:".replace("\x1b", r"\x1b") in shown) == (
            path.name not in ("file", "link")
        )
    told = json.loads(pdm(service, "status", number, "--all", "-F", "json").stdout)
    assert (told["job"]["skipped"], len(told["skipped"]), told["failed"]) == (13, 13, [])
    pdm(service, "wait", number, code=6)

    again = pdm(service, "cp", f"{place}/tree", f"{there}/new", code=6).stderr
    assert again.splitlines()[-1] == last.replace("copied 2, already there 0", "copied 0, already there 2")
    assert "/s" not in again.splitlines()[-1] and "B/s" not in again
    alone = pdm(service, "cp", f"{place}/tree/link", f"{there}/alone").stderr
    assert alone.splitlines()[-1] == "copied 1, already there 0, skipped 0, failed 0"
    missing = pdm(service, "cp", f"{place}/tree/\x1bdangling", f"{there}/none", code=3)
    assert "NOT_FOUND (source)" in missing.stderr


@pytest.mark.full
def test_every_failure_can_be_reached(service: TestService, directory: Path) -> None:
    number = submitted(
        service,
        "cp",
        f"1:/{directory.name}",
        "2:/b",
        "--protocol",
        "dummy",
        "--option",
        "dummy.files=60",
        "--option",
        "dummy.fail=EXISTS",
    )
    (directory / "x").write_bytes(b"")
    pdm(service, "wait", str(number), code=1)
    status = pdm(service, "status", str(number)).stdout
    assert status.count("EXISTS (transfer)") == 50
    assert f"and 10 more: pdm status {number} --all" in status
    assert pdm(service, "status", str(number), "--all").stdout.count("EXISTS (transfer)") == 60
    told = json.loads(pdm(service, "status", str(number), "--all", "-F", "json").stdout)
    assert len({each["id"] for each in told["failed"]}) == 60


def test_a_tree_is_copied_listed_moved_and_removed(service: TestService, directory: Path) -> None:
    (directory / "t" / "empty").mkdir(parents=True)
    (directory / "t" / "-x %41").write_bytes(b"content")
    there = service.directory / "storage" / "b"
    done = pdm(service, "cp", f"1:/{directory.name}/t", f"2:/{directory.name}/c", "--label", "my label")
    assert done.stdout == ""
    assert re.match(r"job \d+ submitted\n", done.stderr)
    assert "DONE  3/3 elements" in done.stderr
    assert (there / directory.name / "c" / "-x %41").read_bytes() == b"content"
    assert (there / directory.name / "c" / "empty").is_dir()

    moved = json.loads(pdm(service, "-F", "json", "mv", f"2:/{directory.name}/c", f"2:/{directory.name}/d").stdout)
    assert (moved["type"], moved["status"]) == ("RENAME", "DONE")
    pdm(service, "mkdir", "-p", f"2:/{directory.name}/e/f")
    assert (there / directory.name / "e" / "f").is_dir()
    refused = pdm(service, "rm", f"2:/{directory.name}/d", code=1)
    assert "IS_A_DIRECTORY" in refused.stderr or "NOT_EMPTY" in refused.stderr
    assert (there / directory.name / "d" / "-x %41").exists()
    pdm(service, "rm", "-r", f"2:/{directory.name}/d")
    assert not (there / directory.name / "d").exists()
    listed = pdm(service, "jobs", "--label", "my label").stdout
    assert "my label" in listed
    assert "DONE" in listed


def test_a_copy_that_partly_fails_is_6_and_says_why(service: TestService, directory: Path) -> None:
    (directory / "t").mkdir()
    (directory / "t" / "new").write_bytes(b"1")
    (directory / "t" / "old").write_bytes(b"2")
    target = service.directory / "storage" / "b" / directory.name
    target.mkdir()
    (target / "old").write_bytes(b"another")
    done = pdm(service, "cp", f"1:/{directory.name}/t", f"2:/{directory.name}", code=6)
    assert "EXISTS (destination)" in done.stderr
    assert "--overwrite always, or --overwrite different" in done.stderr
    number = re.match(r"job (\d+) ", done.stderr)
    assert number is not None
    status = pdm(service, "status", number[1]).stdout
    assert "3: 2 done, 1 failed" in status
    assert "EXISTS" in status

    (target / "old").unlink()
    assert "1 elements are tried again" in pdm(service, "retry", "--force", number[1]).stdout
    pdm(service, "wait", number[1])
    assert (target / "old").read_bytes() == b"2"


def test_a_job_can_be_left_waited_for_and_cancelled(service: TestService) -> None:
    number = submitted(service, "cp", "1:/a", "2:/b", *ENDLESS)
    late = pdm(service, "wait", str(number), "--timeout", "0.5s", code=10)
    assert f"pdm wait {number} | pdm cancel {number}" in late.stderr
    cancelled = pdm(service, "cancel", str(number), "999999999", code=3)
    assert cancelled.stdout.startswith(f"job {number} ")
    assert "job 999999999: " in cancelled.stderr
    assert "CANCELLED" in pdm(service, "wait", str(number), code=7).stderr


def test_a_job_is_held_resumed_and_changed(service: TestService) -> None:
    number = str(submitted(service, "cp", "1:/a", "2:/b", *ENDLESS, "--max-active", "3"))
    assert "limit     at most 3 elements at once" in pdm(service, "status", number).stdout
    assert "--max-active" in pdm(service, "cp", "1:/a", "2:/b", "--max-active", "0", code=2).stderr
    held = pdm(service, "hold", number, "999999999", "--message", "disk is full", "--until", "12h", code=3)
    assert re.match(rf"job {number} is held until 2\S+", held.stdout)
    assert "job 999999999: " in held.stderr
    assert re.search(
        r"^held +ON_HOLD: its owner holds it, .*: disk is full$", pdm(service, "status", number).stdout, re.MULTILINE
    )
    assert "disk is full" in pdm(service, "admin", "why", number).stdout
    assert "held for ON_HOLD" in pdm(service, "events", number).stdout
    wrong = pdm(service, "hold", number, "--until", "1999-01-01T00:00:00Z", code=2)
    assert "the end of a hold must be in the future" in wrong.stderr
    changed = pdm(service, "set", number, "--priority", "2", "--max-active", "1")
    assert changed.stdout == f"job {number}: priority 2, at most 1 elements at once\n"
    assert pdm(service, "set", number, "--max-active", "none").stdout == f"job {number}: priority 2\n"
    assert "Nothing to change" in pdm(service, "set", number, code=2).stderr
    assert "a number from 1" in pdm(service, "set", number, "--max-active", "0", code=2).stderr
    assert pdm(service, "resume", number).stdout == f"job {number} is resumed\n"
    pdm(service, "cancel", number)
    pdm(service, "wait", number, code=7)
    for command in ("hold", "resume"):
        assert pdm(service, command, number).stdout == f"job {number} had ended: CANCELLED\n"


@pytest.mark.full
def test_a_script_gets_the_number_of_the_job(service: TestService) -> None:
    done = pdm(service, "mkdir", "1:/a", "--no-wait", "--protocol", "dummy")
    assert re.fullmatch(r"\d+\n", done.stdout)
    assert "submitted" in done.stderr
    pdm(service, "wait", done.stdout.strip())


@pytest.mark.full
def test_the_logs_of_a_job_that_runs_are_there(service: TestService) -> None:
    number = submitted(service, "cp", "1:/a", "2:/b", *ENDLESS)
    shown = ""
    while f"==> {number}.1 attempt 1 COPY RUNNING <==" not in shown:
        done = pdm(service, "logs", str(number))
        shown = done.stdout
        assert shown or "has no log yet" in done.stderr
    assert "element=1 attempt=1" in shown
    assert f"==> {number}.0 attempt 1 LIST DONE <==" in shown
    for which in ([f"{number}.1"], [f"{number}.1.1"], [f"{number}.1", "-a", "-1"]):
        assert "element=1 attempt=1" in pdm(service, "logs", *which).stdout
    pdm(service, "logs", f"{number}.1.2", code=3)
    assert json.loads(pdm(service, "logs", str(number), "-F", "json").stdout)[-1]["status"] == "RUNNING"
    service.call("admin", "DELETE", f"/jobs/{number}")


@pytest.mark.full
def test_a_job_in_the_queue_has_no_log_and_says_why_it_waits(service: TestService) -> None:
    failing = ("--protocol", "dummy", "--option", "dummy.fail=CHECKSUM_MISMATCH", "--option", "dummy.fail_times=9")
    number = submitted(service, "mkdir", "1:/a", *failing, "--max-tries", "10")
    shown = ""
    while "waits" not in shown:
        shown = pdm(service, "status", str(number)).stdout
        assert "status    FAILED" not in shown
    moment = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    because = rf"element 0 is tried again at {moment} \(try \d+ of 10\), after CHECKSUM_MISMATCH: "
    assert re.search(rf"^waits     {because}", shown, re.MULTILINE)
    assert "waits: element 0 is tried again" in pdm(service, "wait", str(number), "--timeout", "1s", code=10).stderr
    service.call("admin", "DELETE", f"/jobs/{number}")


@pytest.mark.full
def test_the_newest_jobs_are_shown_and_of_whom(service: TestService) -> None:
    numbers = [submitted(service, "mkdir", "1:/a", "--protocol", "dummy") for _ in range(3)]
    listed = pdm(service, "jobs", "-n", "2").stdout.splitlines()
    assert [int(line.split()[0]) for line in listed[1:]] == numbers[1:]
    everything = [job["id"] for job in json.loads(pdm(service, "jobs", "--all", "-F", "json").stdout)]
    assert everything == sorted(everything)
    assert everything[-3:] == numbers

    other = next(
        path.stem for path in (service.directory / "certificates").glob("*.crt") if path.stem not in _NOT_USERS
    )
    done = service.pdm(other, "-F", "json", "mkdir", "1:/a", "--protocol", "dummy", "--no-wait")
    job = json.loads(done.stdout)
    assert "OWNER" not in pdm(service, "jobs").stdout
    assert {owner(line) for line in pdm(service, "jobs", "--all-users").stdout.splitlines()[1:]} == {"admin", other}
    for user in (str(job["user_id"]), other):
        assert [owner(line) for line in pdm(service, "jobs", "--user", user).stdout.splitlines()[1:]] == [other]
    shown = status_of(service, job["id"])
    assert re.search(rf"^owner     /.*CN={other} \(user {job['user_id']}\)$", shown, re.MULTILINE)
    assert "owner" not in status_of(service, numbers[0])
    pdm(service, "jobs", "--user", "nobody", code=3)
    for option in (["--all-users"], ["--user", "1"]):
        refused = service.pdm(other, "jobs", *option)
        assert (refused.returncode, refused.stdout) == (4, "")
        assert "only operators" in refused.stderr


#: Certificates of an instance that are no user's.
_NOT_USERS = frozenset({"ca", "host", "admin"})


def owner(line: str) -> str:
    return line.split()[1]


def status_of(service: TestService, number: int) -> str:
    return pdm(service, "status", str(number)).stdout


def test_logs(service: TestService, directory: Path) -> None:
    (directory / "one").write_bytes(b"1")
    number = submitted(service, "cp", f"1:/{directory.name}/one", f"2:/{directory.name}-copy")
    followed = pdm(service, "logs", str(number), "-f").stdout
    assert re.search(rf"^==> {number}\.0 attempt 1 LIST (RUNNING|DONE) <==$", followed, re.MULTILINE)
    assert re.search(rf"^==> {number}\.1 attempt 1 COPY (RUNNING|DONE) <==$", followed, re.MULTILINE)
    output = json.loads(pdm(service, "logs", f"{number}.1", "-a", "-1", "-F", "json").stdout)
    assert output["attempt"] == 1
    assert output["log"] in followed
    assert output["process"]["ended"] is None
    assert f" host={output['process']['host']} pid={output['process']['pid']} " in output["log"].splitlines()[0]
    assert pdm(service, "logs", f"{number}.1.1").stdout == output["log"]
    for which in (["-a", "7"], ["-a", "7", "-f"], ["-a", "-7", "-f"]):
        pdm(service, "logs", f"{number}.1", *which, code=3)


@pytest.mark.parametrize("which", ["", *(pytest.param(which, marks=pytest.mark.full) for which in (".1", ".1.1"))])
def test_logs_are_followed_while_they_are_written(service: TestService, which: str) -> None:
    number = submitted(service, "cp", "1:/a", "2:/b", *ENDLESS)
    with subprocess.Popen(
        [*PDM, "logs", "-f", f"{number}{which}"], env=service.environment("admin"), stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        lines: list[str] = []
        while not lines or "element=1 attempt=1" not in lines[-1]:
            assert running.poll() is None, lines
            lines.append(running.stdout.readline())
        pdm(service, "cancel", str(number))
        shown = "".join(lines) + running.stdout.read()
    assert running.returncode == 0
    assert f"==> {number}.1 attempt 1 COPY RUNNING <==" in shown
    assert "outcome=CANCELLED" in shown
    assert service.call("admin", "GET", f"/jobs/{number}/elements/1/output")[1]["log"] in shown
    assert (f"==> {number}.0 " in shown) == (which == "")


@pytest.mark.full
def test_a_follower_continues_with_the_next_attempt(service: TestService) -> None:
    failing = ("--protocol", "dummy", "--option", "dummy.fail=CONNECTION", "--option", "dummy.fail_times=1")
    number = submitted(service, "mkdir", "1:/a", *failing)
    shown = pdm(service, "logs", "-f", f"{number}.0").stdout
    for attempt in (1, 2):
        assert f"==> {number}.0 attempt {attempt} MKDIR" in shown
        assert service.call("admin", "GET", f"/jobs/{number}/elements/0/output/{attempt}")[1]["log"] in shown
    assert shown.index("failed scope=transfer code=CONNECTION") < shown.index("outcome=DONE")


@pytest.mark.full
def test_the_status_of_a_job_has_its_progress(service: TestService) -> None:
    size = ("--protocol", "dummy", "--option", "dummy.files=1", "--option", "dummy.size=1000000")
    number = submitted(service, "cp", "1:/a", "2:/b", *size, "--option", "dummy.delay=300")
    shown = ""
    while "moving" not in shown:
        shown = pdm(service, "status", str(number)).stdout
        assert "status    FAILED" not in shown
    assert re.search(r"^bytes     0 B verified, [\d.]+ (Ki)?B moving, of 977 KiB$", shown, re.MULTILINE)
    assert re.search(r"^progress  \d+%, 0 of 1 files$", shown, re.MULTILINE)
    assert re.search(r"^rate      .*/s on average$", shown, re.MULTILINE)
    assert re.search(r"^time      \d+ s since it started", shown, re.MULTILINE)
    pdm(service, "cancel", str(number))

    number = submitted(service, "cp", "1:/a", "2:/b", *size, "--option", "dummy.delay=0.1")
    ended = json.loads(pdm(service, "-F", "json", "wait", str(number)).stdout)
    assert ended["progress"]["bytes_done"] == 1_000_000
    shown = pdm(service, "status", str(number)).stdout
    assert re.search(r"^progress  100%, 1 of 1 files$", shown, re.MULTILINE)
    assert re.search(r"^rate      [\d.]+ [KM]iB/s on average$", shown, re.MULTILINE)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_detaches(service: TestService, number: int, code: int) -> None:
    with subprocess.Popen(
        # A test run that a shell has put into the background passes on that SIGINT is ignored.
        ["env", "--default-signal=INT", *PDM, "cp", "1:/a", "2:/b", *ENDLESS],
        env=service.environment("admin"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stderr is not None
        first = running.stderr.readline()
        match = re.fullmatch(r"job (\d+) submitted\n", first)
        assert match is not None, first
        while "RUNNING" not in running.stderr.readline():
            assert running.poll() is None
        running.send_signal(number)
        out, err = running.communicate(timeout=20)
    assert (running.returncode, out) == (code, "")
    assert f"detached: job {match[1]} continues; pdm wait {match[1]} | pdm cancel {match[1]}\n" in err
    assert service.call("admin", "GET", f"/jobs/{match[1]}")[1]["status"] == "RUNNING"
    service.call("admin", "DELETE", f"/jobs/{match[1]}")


def on_a_terminal(service: TestService, *arguments: str, term: str = "xterm", columns: int = 80) -> str:
    """What a command writes to a terminal of so many columns, cursor movements and all."""
    code, shown = run_on_terminal([*PDM, *arguments], service.environment("admin"), term=term, columns=columns)
    assert code == 0
    return shown


_SLOW_COPY = ("cp", "1:/a", "2:/b", "--protocol", "dummy", "--option", "dummy.files=3", "--option", "dummy.delay=0.3")


def test_a_terminal_gets_a_bar_that_fits(service: TestService) -> None:
    shown = on_a_terminal(service, *_SLOW_COPY, "--option", "dummy.size=1000000000000")
    assert "DONE  4/4 elements" in shown
    frames = [frame for frame in re.split(r"\r(?:\x1b\[\dA)?\x1b\[J|\n", shown) if "RUNNING" in frame]
    assert frames
    assert all(len(frame) < 80 for frame in frames)
    assert any(re.search(r" [━─]{10,} +\d+%  .* of 2\.7 TiB", frame) for frame in frames), frames


@pytest.mark.full
def test_a_terminal_that_cannot_move_its_cursor_gets_lines(service: TestService) -> None:
    shown = on_a_terminal(service, *_SLOW_COPY, term="dumb")
    assert "\x1b" not in shown
    assert re.search(r"^job \d+ RUNNING  ", shown, re.MULTILINE)
    assert "DONE  4/4 elements" in shown


@pytest.mark.full
def test_tables_fit_a_terminal(service: TestService) -> None:
    path = f"/{'long/' * 20}name"
    number = submitted(service, "cp", f"1:{path}", f"2:{path}", "--protocol", "dummy", "--label", "x" * 60)
    for columns in (80, 100):
        lines = on_a_terminal(service, "jobs", columns=columns).splitlines()
        assert max(map(len, lines)) <= columns
        assert re.search(rf"^ *{number}  COPY .*\.\.\..*name -> .*\.\.\..*name", lines[-1]), lines[-1]
    assert path in pdm(service, "jobs").stdout, "what is no terminal gets all"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ls", "nowhere:/x"], 3, "no site nowhere. Known sites: "),
        (["cp", "1:/a", "2:/b", "--option", "overwrit=always"], 2, "overwrite"),
        (["cp", "1:/a", "2:/b", "--protocol", "xroot"], 2, "XROOT"),
    ],
)
def test_refusals_are_one_line_and_truthful(service: TestService, arguments: list[str], code: int, words: str) -> None:
    done = pdm(service, *arguments, code=code)
    assert words in done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("pdm: ")
    assert done.stderr.count("\n") == 1


def test_without_a_certificate_it_says_what_to_set(service: TestService) -> None:
    environment = service.environment("admin")
    del environment["PDM_CERT"], environment["PDM_KEY"]
    done = subprocess.run([*PDM, "jobs"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "certificate" in done.stderr


def test_a_reader_that_has_seen_enough_is_no_fault(service: TestService) -> None:
    command = f"{' '.join(PDM)} sites | true"
    done = subprocess.run(command, shell=True, env=service.environment("admin"), capture_output=True, check=False)
    assert done.stderr == b""


def test_a_closed_port(service: TestService) -> None:
    environment = {**service.environment("admin"), "PDM_URL": "https://127.0.0.1:1"}
    done = subprocess.run([*PDM, "jobs"], env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 5
    assert "cannot be reached" in done.stderr


def test_the_daemon_logs_submissions_with_user_and_result(service: TestService, directory: Path) -> None:
    (directory / "t").mkdir()
    (directory / "t" / "one").write_bytes(b"12345")
    done = int(
        json.loads(pdm(service, "cp", f"1:/{directory.name}/t", f"2:/{directory.name}", "-F", "json").stdout)["id"]
    )
    failed = int(json.loads(pdm(service, "rm", "1:/not/there", "-F", "json", code=3).stdout)["id"])
    waiting = ("--protocol", "dummy", "--option", "dummy.fail=TIMEOUT", "--option", "dummy.fail_times=9")
    cancelled = submitted(service, "mkdir", "1:/a", *waiting, "--max-tries", "10")
    while not service.call("admin", "GET", f"/jobs/{cancelled}")[1].get("next_try"):
        time.sleep(0.02)
    for _ in range(2):
        service.call("admin", "DELETE", f"/jobs/{cancelled}")
    ends = {
        done: r"info .* ended DONE: COPY, 2 of 2 elements done, 0 failed, 0 cancelled, 5 bytes in \d+\.\d s$",
        failed: r"warn .* ended FAILED: REMOVE, 0 of 1 elements done, 1 failed, ",
        cancelled: r"info .* ended CANCELLED: MKDIR, 0 of 1 elements done, 0 failed, 1 cancelled, ",
    }
    lines = service.log_path.read_text().splitlines()
    for number, end in ends.items():
        of_job = [line for line in lines if f"job {number} of user 1 " in line]
        assert len(of_job) == 2, of_job
        assert re.search(rf"\[request_id=\w+ job={number} subject=.*submitted: \w+ by \w+, site 1", of_job[0])
        assert re.search(end, of_job[1]), of_job[1]
    assert any(re.search(r"POST /workqueue/api/v1.0/remove 200 \d+\.\d ms$", line) for line in lines)


@pytest.mark.full
def test_a_job_begins_after_another_and_ends_at_its_deadline(service: TestService) -> None:
    first = submitted(service, "cp", *ENDLESS, "1:/awaited", "2:/awaited")
    done = pdm(service, "mkdir", "--no-wait", "--protocol", "dummy", "--after", str(first), "1:/then")
    assert f"waits: it begins when job {first} is DONE; that job is " in done.stderr
    pdm(service, "cancel", str(first))
    ended = pdm(service, "wait", done.stdout.strip(), code=7)
    assert f"PREDECESSOR: job {first}, after which it was to begin, ended CANCELLED" in ended.stderr
    hanging = ("--protocol", "dummy", "--option", "dummy.hang=true", "--deadline", "1s")
    assert "DEADLINE: its deadline, " in pdm(service, "mkdir", *hanging, "1:/late", code=7).stderr
    for arguments, words in (
        (("--after-any",), "--after-any needs --after"),
        (("--after", "999999"), "--after: there is no job 999999"),
        (("--deadline", "soon"), "--deadline: a time such as"),
    ):
        assert words in pdm(service, "mkdir", "--protocol", "dummy", *arguments, "1:/x", code=2).stderr


@pytest.mark.full
def test_a_command_is_scheduled_listed_paused_and_removed(service: TestService) -> None:
    copy = ("cp", "--protocol", "dummy", "--verify", "size", "1:/a", "2:/b")
    done = pdm(service, "schedule", "add", "0 3 * * *", "--timezone", "Europe/Paris", "--", *copy)
    number = done.stdout.strip()
    assert f"schedule {number} added, first due " in done.stderr
    (found,) = json.loads(pdm(service, "schedule", "list", "-F", "json").stdout)
    assert found["job"]["extra_opts"] == {"verify": "size"}
    assert (found["job"]["type"], found["job"]["src_filepath"], found["job"]["dst_filepath"]) == ("COPY", "/a", "/b")
    pdm(service, "schedule", "pause", number)
    assert re.search(r"0 3 \* \* \* Europe/Paris +paused", pdm(service, "schedule", "list").stdout)
    assert "is resumed, next due " in pdm(service, "schedule", "resume", number).stderr
    assert "job       COPY local-a:/a -> local-b:/b" in pdm(service, "schedule", "show", number).stdout
    assert ", next due " in pdm(service, "schedule", "edit", number, "--when", "every 6h").stderr
    pdm(service, "schedule", "edit", number, "--", "rm", "-r", "--protocol", "dummy", "1:/c")
    edited = json.loads(pdm(service, "schedule", "show", number, "-F", "json").stdout)
    assert (edited["recurrence"], edited["job"]["type"]) == ("every 6h", "REMOVE")
    assert "Nothing is to be changed" in pdm(service, "schedule", "edit", number, code=2).stderr
    pdm(service, "schedule", "remove", number)
    pdm(service, "schedule", "show", number, code=3)
    for when, words, error in (
        ("every 5s", ("mkdir", "1:/x"), "WHEN: five fields of cron are expected"),
        ("every 5m", ("ls", "1:/x"), "'ls' cannot be scheduled"),
        ("every 5m", ("rm", "1:/x", "1:/y"), "these are 2 jobs, and a schedule submits one"),
        ("every 5m", ("mkdir", "--after", "1", "1:/x"), "--after: a schedule cannot wait for other jobs"),
    ):
        assert error in pdm(service, "schedule", "add", when, "--", *words, code=2).stderr
    assert pdm(service, "schedule", "list").stdout == ""
