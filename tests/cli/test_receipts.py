"""``pdm receipt``, ``errors`` and ``retry``, against a daemon of its own, on local folders."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService, set_keys
from pdm.workqueue.certificates.authority import Authority


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    """One daemon for all tests here."""
    service = TestService(tmp_path_factory.mktemp("receipts") / "instance")
    service.init()
    set_keys(service.directory / "workqueue.conf", {"queue": {"first_pause": "50ms"}})
    with service.running():
        yield service
    assert "Traceback" not in service.log_path.read_text()


@pytest.fixture
def folder(service: TestService, request: pytest.FixtureRequest) -> Path:
    """A folder of its own at site 1; at the site it is ``/<its name>``."""
    folder = service.directory / "storage" / "a" / re.sub(r"\W", "_", request.node.name)
    folder.mkdir(parents=True)
    return folder


def pdm(service: TestService, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = service.pdm("admin", *map(str, arguments))
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}\n{service.tail()}"
    assert "Traceback" not in done.stderr
    return done


def _partly(service: TestService, folder: Path) -> int:
    """A copy of which one of three files fails: its destination is a directory."""
    for name in ("one", "two", "three"):
        (folder / name).write_text(name)
    there = service.directory / "storage" / "b" / folder.name
    (there / "two" / "inner").mkdir(parents=True)
    done = pdm(service, "cp", f"1:/{folder.name}", f"2:/{folder.name}", "-F", "json", code=6)
    return int(json.loads(done.stdout)["id"])


def test_a_receipt_is_fetched_and_verified(service: TestService, folder: Path, tmp_path: Path) -> None:
    number = _partly(service, folder)
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


def test_what_is_no_valid_receipt_is_told(service: TestService, folder: Path, tmp_path: Path) -> None:
    number = _partly(service, folder)
    content = pdm(service, "receipt", str(number)).stdout
    for change, words in (
        (content.replace("/one", "/eno"), "a line was changed"),
        (content.replace(content.splitlines(keepends=True)[2], ""), "1 lines are missing"),
        (content[:-5], "truncated"),
        (pdm(service, "receipt", str(number), "--format", "csv").stdout, "only that form is signed"),
    ):
        (tmp_path / "changed").write_text(change)
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


def test_failures_are_grouped(service: TestService, folder: Path) -> None:
    number = _partly(service, folder)
    header, row, hint = pdm(service, "errors", str(number)).stdout.splitlines()
    assert header.split() == ["CODE", "WHERE", "COUNT", "RETRY", "EXAMPLE"]
    assert row.split() == ["IS_A_DIRECTORY", "destination", "1", "no", f"/{folder.name}/two"]
    assert hint.startswith("IS_A_DIRECTORY: ")
    assert pdm(service, "errors", str(number), "--paths").stdout == f"/{folder.name}/two\n"
    assert pdm(service, "errors", str(number), "--paths", "--code", "EXISTS").stdout == ""
    (group,) = json.loads(pdm(service, "errors", str(number), "-F", "json").stdout)
    assert (group["code"], group["count"]) == ("IS_A_DIRECTORY", 1)
    pdm(service, "errors", "99999", code=3)


def test_a_retry_leaves_what_it_cannot_help(service: TestService, folder: Path) -> None:
    number = str(_partly(service, folder))
    done = pdm(service, "retry", number, code=6)
    assert done.stdout == f"job {number}: requeued 0, left 1 (permanent: IS_A_DIRECTORY)\n"
    assert f"pdm retry {number} --force" in done.stderr
    assert pdm(service, "retry", number, "--code", "TIMEOUT").stdout == f"job {number}: 0 elements are tried again\n"
    there = service.directory / "storage" / "b" / folder.name / "two"
    (there / "inner").rmdir()
    there.rmdir()
    assert "1 elements are tried again" in pdm(service, "retry", number, "--code", "is_a_directory", "--force").stdout
    pdm(service, "wait", number)
    assert there.read_text() == "two"
    assert pdm(service, "retry", number, "--code", "WRONG", code=2).stderr.startswith(f"pdm: job {number}: ")
