"""``pdm receipt``, ``errors`` and ``retry``, against a daemon of its own, on local directories."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService
from pdm.workqueue.certificates.authority import Authority
from tests.support.commands import pdm


def _partly(service: TestService, directory: Path) -> int:
    """A copy of which one of three files fails: its destination is a directory."""
    for name in ("one", "two", "three"):
        (directory / name).write_text(name)
    there = service.directory / "storage" / "b" / directory.name
    (there / "two" / "inner").mkdir(parents=True)
    done = pdm(service, "cp", f"1:/{directory.name}", f"2:/{directory.name}", "-F", "json", code=6)
    return int(json.loads(done.stdout)["id"])


def test_a_receipt_is_fetched_and_verified(service: TestService, directory: Path, tmp_path: Path) -> None:
    number = _partly(service, directory)
    file = tmp_path / "receipt.jsonl"
    done = pdm(service, "receipt", str(number), "-o", file)
    assert done.stderr == f"receipt of job {number}: 4 elements (3 done, 1 failed), 8 B\n"
    assert [each.name for each in tmp_path.iterdir()] == [file.name]
    found = pdm(service, "receipt", "--verify", file).stdout
    assert found.startswith(f"{file}: valid\njob       {number}, COPY of /")
    assert "CN=localhost" in found
    # Without the settings of a service, and by another user of the same authorities.
    environment = service.environment("admin")
    ca = environment.pop("PDM_CA")
    del environment["PDM_URL"]
    done = service._pdm(["receipt", "--verify", str(file), "--ca", ca], environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert pdm(service, "receipt", str(number), "-o", file, code=2).stderr.endswith("exists. Add -f to replace it.\n")
    pdm(service, "receipt", str(number), "-f", "-o", file)
    assert pdm(service, "receipt", str(number)).stdout.count('"line":"element"') == 4
    assert pdm(service, "receipt", str(number), "--format", "csv").stdout.count("\nelement,") == 4


@pytest.mark.full
def test_what_is_no_valid_receipt_is_told(service: TestService, directory: Path, tmp_path: Path) -> None:
    number = _partly(service, directory)
    content = pdm(service, "receipt", str(number)).stdout
    for change, words in (
        (content.replace("/one", "/eno"), "a line was changed"),
        (content.replace(content.splitlines(keepends=True)[2], ""), "1 lines are missing"),
        (content[:-5], "truncated"),
        (content.replace("\n", "\r\n"), "line 1 ends with CR LF"),
        (pdm(service, "receipt", str(number), "--format", "csv").stdout, "only that form is signed"),
    ):
        (tmp_path / "changed").write_text(change, newline="")
        done = pdm(service, "receipt", "--verify", tmp_path / "changed", code=1)
        assert "changed is not valid: " in done.stderr
        assert words in done.stderr
    (tmp_path / "whole").write_text(content)
    Authority.create("/DC=org/CN=Another").write_trust(tmp_path / "ca")
    done = pdm(service, "receipt", "--verify", tmp_path / "whole", "--ca", tmp_path / "ca", code=1)
    assert "its authority is not trusted here" in done.stderr
    pdm(service, "receipt", "--verify", tmp_path / "nothing", code=3)
    pdm(service, "receipt", "99999", "-o", tmp_path / "none", code=3)
    assert not (tmp_path / "none").exists()
    for wrong in (
        ["receipt"],
        ["receipt", "1", "--ca", "x"],
        ["receipt", "1", "--verify", "x"],
        ["receipt", "1", "-f"],
    ):
        pdm(service, *wrong, code=2)


def test_failures_are_grouped(service: TestService, directory: Path) -> None:
    number = _partly(service, directory)
    header, row, hint = pdm(service, "errors", str(number)).stdout.splitlines()
    assert header.split() == ["CODE", "WHERE", "COUNT", "RETRY", "EXAMPLE"]
    assert row.split() == ["IS_A_DIRECTORY", "destination", "1", "no", f"/{directory.name}/two"]
    assert hint.startswith("IS_A_DIRECTORY: ")
    assert pdm(service, "errors", str(number), "--paths").stdout == f"/{directory.name}/two\n"
    assert pdm(service, "errors", str(number), "--paths", "--code", "EXISTS").stdout == ""
    (group,) = json.loads(pdm(service, "errors", str(number), "-F", "json").stdout)
    assert (group["code"], group["count"]) == ("IS_A_DIRECTORY", 1)
    pdm(service, "errors", "99999", code=3)


@pytest.mark.full
def test_a_retry_leaves_what_it_cannot_help(service: TestService, directory: Path) -> None:
    number = str(_partly(service, directory))
    done = pdm(service, "retry", number, code=6)
    assert done.stdout == f"job {number}: requeued 0, left 1 (permanent: IS_A_DIRECTORY)\n"
    assert f"pdm retry {number} --force" in done.stderr
    assert pdm(service, "retry", number, "--code", "TIMEOUT").stdout == f"job {number}: 0 elements are tried again\n"
    there = service.directory / "storage" / "b" / directory.name / "two"
    (there / "inner").rmdir()
    there.rmdir()
    assert "1 elements are tried again" in pdm(service, "retry", number, "--code", "is_a_directory", "--force").stdout
    pdm(service, "wait", number)
    assert there.read_text() == "two"
    assert pdm(service, "retry", number, "--code", "WRONG", code=2).stderr.startswith(f"pdm: job {number}: ")


def _peak_kib(service: TestService, *arguments: str) -> int:
    """The greatest resident memory of a ``pdm`` process, in KiB."""
    command = [sys.executable, "-m", "pdm.workqueue.cli", *arguments]
    process = subprocess.Popen(command, env=service.environment("admin"), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss


def _peak_of_daemon_kib(service: TestService) -> int:
    assert service.process is not None
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_receipt_of_100000_files_is_streamed_in_bounded_memory(
    service: TestService, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    def dummy(files: int) -> str:
        options = ("--protocol", "dummy", "--option", f"dummy.files={files}", "--option", "dummy.size=1000")
        done = service.pdm("admin", "cp", "1:/many", "2:/many", *options, "-F", "json", timeout_s=400)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["id"])

    few, many = dummy(10), dummy(100_000)
    small, large = tmp_path / "small", tmp_path / "large"
    least = _peak_kib(service, "receipt", few, "-o", str(small))
    before = _peak_of_daemon_kib(service)
    begun = time.monotonic()
    most = _peak_kib(service, "receipt", many, "-o", str(large))
    fetched = time.monotonic()
    after = _peak_of_daemon_kib(service)
    verified = _peak_kib(service, "receipt", "--verify", str(large))
    record_property("bytes", large.stat().st_size)
    record_property("seconds to fetch, to verify", (fetched - begun, time.monotonic() - fetched))
    record_property("KiB of daemon, client, verification", (after - before, most - least, verified - least))
    assert after - before < 32 * 1024
    assert most - least < 16 * 1024
    assert verified - least < 16 * 1024


def test_a_redo_moves_only_what_is_missing(service: TestService, directory: Path, tmp_path: Path) -> None:
    number = _partly(service, directory)
    file = tmp_path / "receipt"
    pdm(service, "receipt", str(number), "-o", file)
    there = service.directory / "storage" / "b" / directory.name
    (there / "two" / "inner").rmdir()
    (there / "two").rmdir()
    forged = tmp_path / "forged"
    forged.write_text(file.read_text().replace("failed", "done"))
    assert "is not valid" in pdm(service, "cp", "--redo", forged, code=1).stderr
    untouched = (there / "one").stat()
    # Grown since then: its size is taken when it is copied.
    (directory / "two").write_text("two, now longer")
    job = json.loads(pdm(service, "cp", "--redo", file, "-F", "json").stdout)
    assert (job["num_elements"], job["num_done"], job["bytes_done"], job["extra_opts"]["items"]) == (1, 1, 15, 1)
    assert (there / "two").read_text() == "two, now longer"
    assert (there / "one").stat() == untouched
    pdm(service, "receipt", str(job["id"]), "-f", "-o", file)
    assert "nothing to redo" in pdm(service, "cp", "--redo", file).stderr
    pdm(service, "cp", "--redo", file, "1:/a", "2:/b", code=2)


@pytest.mark.full
def test_a_batch_is_one_job(service: TestService, directory: Path, tmp_path: Path) -> None:
    for name in ("one", "two words", "#three"):
        (directory / name).write_text(name)
    pairs = tmp_path / "pairs"
    pairs.write_text(
        f"# a comment\n\none first\n'two words' second/\n/{directory.name}/#three '/{directory.name}/#3'\n"
    )
    places = (f"1:/{directory.name}", f"2:/{directory.name}")
    job = json.loads(pdm(service, "cp", "--batch", pairs, *places, "-F", "json").stdout)
    assert (job["num_elements"], job["num_done"], job["bytes_done"]) == (3, 3, 18)
    there = service.directory / "storage" / "b" / directory.name
    assert (there / "first").read_text() == "one"
    assert (there / "second" / "two words").read_text() == "two words"
    assert (there / "#3").read_text() == "#three"
    receipt = pdm(service, "receipt", str(job["id"])).stdout
    assert [json.loads(line)["size"] for line in receipt.splitlines()[1:-1]] == [3, 9, 6]
    pairs.write_bytes(b"one\0null\0")
    pdm(service, "cp", "--batch", pairs, "-0", *places)
    assert (there / "null").read_text() == "one"
    for text, words in (
        ("a b\na b c\n", "line 2: two paths are expected, SRC and DST, not 3"),
        ("a 'b\n", "line 1: no closing quotation"),
        ("a x\n\nb x\n", "lines 1 and 3 have the same destination"),
        ("# one\na b\nc/ d\n", "line 3: item 2: src is a directory"),
        ("", "has no pairs of paths"),
    ):
        pairs.write_text(text)
        assert words in pdm(service, "cp", "--batch", pairs, *places, code=2).stderr


def _copied(service: TestService, directory: Path, *options: str) -> tuple[Path, Path]:
    """A copy of four files; its receipt, and the destination."""
    for name in ("one", "two", "three", "empty"):
        (directory / name).write_text("" if name == "empty" else name)
    done = pdm(service, "cp", f"1:/{directory.name}", f"2:/{directory.name}", "-F", "json", *options)
    receipt = service.directory / f"receipt-{directory.name}"
    pdm(service, "receipt", str(json.loads(done.stdout)["id"]), "-o", receipt)
    return receipt, service.directory / "storage" / "b" / directory.name


@pytest.mark.full
def test_a_check_finds_what_was_changed_at_the_destination(
    service: TestService, directory: Path, tmp_path: Path
) -> None:
    receipt, there = _copied(service, directory)
    before = [(path, path.stat()) for path in sorted(there.iterdir())]
    last = pdm(service, "check", receipt).stderr.splitlines()[-1]
    assert re.fullmatch(r"checked 4 files at \S+: 4 as in the receipt", last)
    (there / "one").write_text("oNe")
    (there / "two").write_text("tw")
    (there / "three").unlink()
    (there / "empty").write_text("not")
    done = pdm(service, "check", receipt, "-F", "json", code=6)
    job = json.loads(done.stdout)
    assert (job["num_done"], job["num_failed"], job["extra_opts"]) == (0, 4, {"check": "destination", "items": 4})
    assert done.stderr.splitlines()[-1].endswith(": 0 as in the receipt, 3 differ, 1 is missing")
    assert f"/{directory.name}/one\n      DIFFERS (destination): it has ADLER32:" in done.stderr
    assert f"/{directory.name}/two\n      DIFFERS (destination): it has 2 bytes, and had 3" in done.stderr
    assert f"/{directory.name}/three\n      NOT_FOUND (destination): " in done.stderr
    assert f"/{directory.name}/empty\n      DIFFERS (destination): it has 3 bytes, and had 0" in done.stderr
    assert all(len(line) <= 80 for line in done.stderr.splitlines() if line.startswith("checked"))
    number = str(job["id"])
    # What differs is looked at once, and a retry would find the same.
    elements = json.loads(pdm(service, "status", number, "--all", "-F", "json").stdout)["failed"]
    assert {each["attempts"] for each in elements} == {1}
    pdm(service, "retry", number, code=6)
    assert sorted(pdm(service, "errors", number, "--paths").stdout.split()) == sorted(
        f"/{directory.name}/{name}" for name in ("one", "two", "three", "empty")
    )
    # The source is still what it was; nothing was written at either end.
    assert pdm(service, "check", receipt, "--at", "source").stderr.splitlines()[-1].endswith(": 4 as in the receipt")
    assert sorted(path.name for path in there.iterdir()) == ["empty", "one", "two"]
    (directory / "one").write_text("eno")
    done = pdm(service, "check", receipt, "--at", "source", code=6)
    assert "DIFFERS (source): " in done.stderr
    assert done.stderr.splitlines()[-1].endswith(": 3 as in the receipt, 1 differs")
    (directory / "one").write_text("one")
    # The receipt of a check says what to copy again.
    pdm(service, "receipt", number, "-o", tmp_path / "checked")
    pdm(service, "cp", "--redo", tmp_path / "checked", "--overwrite", "different")
    assert [path for path, _ in before] == sorted(there.iterdir())
    pdm(service, "check", receipt)


@pytest.mark.full
def test_a_check_takes_what_a_receipt_can_prove(service: TestService, directory: Path, tmp_path: Path) -> None:
    receipt, there = _copied(service, directory, "--verify", "size")
    (there / "one").write_text("oNe")
    done = pdm(service, "check", receipt)
    assert "4 files have no checksum in the receipt: only their sizes are compared" in done.stderr
    assert re.search(r"checked 4 files by size at \S+: 4 as in the receipt$", done.stderr.strip())
    forged = tmp_path / "forged"
    forged.write_text(receipt.read_text().replace("three", "eerht"))
    assert "is not valid" in pdm(service, "check", forged, code=1).stderr
    pdm(service, "check", tmp_path / "nothing", code=3)
    pdm(service, "check", "-", code=2)
    done = pdm(service, "check", receipt, "--option", "overwrite=always", code=2)
    assert "--at and --overwrite contradict each other: a check writes nothing" in done.stderr
    moved = pdm(
        service, "mv", f"1:/{directory.name}/one", f"2:/{directory.name}/moved", "--checksum", "md5", "-F", "json"
    ).stdout
    pdm(service, "receipt", str(json.loads(moved)["id"]), "-o", tmp_path / "moved")
    assert "MD5:" in (tmp_path / "moved").read_text()
    assert "removed the sources" in pdm(service, "check", tmp_path / "moved", "--at", "source", code=2).stderr
    pdm(service, "check", tmp_path / "moved")


@pytest.mark.full
def test_a_check_continues_after_a_crash(service: TestService, directory: Path, tmp_path: Path) -> None:
    receipt, places = tmp_path / "receipt", (f"1:/{directory.name}", f"2:/{directory.name}")
    copied = pdm(service, "cp", *places, "--protocol", "dummy", "-F", "json").stdout
    pdm(service, "receipt", str(json.loads(copied)["id"]), "-o", receipt)
    done = pdm(service, "check", receipt, "--option", "dummy.crash=true", "-F", "json")
    job = json.loads(done.stdout)
    assert (job["num_done"], job["already_there"]) == (1, 1)
    assert '"attempts":2' in pdm(service, "receipt", str(job["id"])).stdout
    # A helper that died leaves no temporary file of a check: the service does not look for one.
    done = pdm(service, "check", receipt, "--option", "dummy.crash=true", "--max-tries", "1", code=1)
    assert done.stderr.splitlines()[-1].endswith(": 0 as in the receipt, 1 could not be checked")
