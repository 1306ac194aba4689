"""One element that cannot be done fails alone: those beside it in its batch are done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pdm.testgrid.service import TestService

LONG = "x" * 200


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestService]:
    service = TestService(tmp_path_factory.mktemp("single") / "instance")
    service.init()
    with service.running():
        yield service


def failed(service: TestService, job_id: int) -> list[tuple[str, str]]:
    """Type and code of what has failed, and nothing else may have."""
    _, elements = service.call("admin", "GET", f"/jobs/{job_id}/elements")
    return [(one["type"], one["error"]["code"]) for one in elements if one["status"] != "DONE"]


@pytest.mark.full
def test_a_destination_that_no_site_can_hold(service: TestService) -> None:
    """The source's path has fewer than 4,096 bytes, that of the destination more; a file and an empty directory."""
    source = service.directory / "storage" / "a" / "tree"
    deep = source
    for _ in range(5):
        deep /= LONG
    (deep / "empty").mkdir(parents=True)
    (deep / "file").write_bytes(b"deep")
    for number in range(45):
        (source / f"file{number}").write_bytes(b"content")
    (source / "also empty").mkdir()
    destination = "/".join([""] + [LONG] * 16)
    job = service.submit(
        "admin",
        "copy",
        src_siteid=1,
        src_filepath="/tree",
        dst_siteid=2,
        dst_filepath=destination,
        protocol="FILE",
    )
    ended = service.wait_for("admin", job["id"])
    assert (ended["status"], ended["num_failed"]) == ("FAILED", 2), ended
    assert sorted(failed(service, job["id"])) == [("COPY", "INVALID_NAME"), ("MKDIR", "INVALID_NAME")]
    # Listing, 45 files and the other empty directory.
    assert ended["num_done"] == 47
    copied = service.directory / "storage" / "b" / Path(destination).relative_to("/")
    assert {path.name for path in copied.iterdir()} == {"also empty", *(f"file{number}" for number in range(45))}
