"""What the tools print, as it was recorded, and what is made of it."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.storage import StorageError
from pdm.workqueue.helpers.tools.gfal import _ENTRY, Gfal, _file_stat, error_of, stat_in
from pdm.workqueue.helpers.tools.globus_url_copy import CopyListener, UrlPair
from pdm.workqueue.helpers.tools.runner import Deadline, ToolRunner
from pdm.workqueue.movers.tools import ToolsMover
from pdm.workqueue.wire.agent_events import Fault

_A, _B = "gsiftp://a:2811/d", "gsiftp://b:2811/e"
#: globus-url-copy 10.12: the second file is missing, the third is large.
RECORDED = """\
Source: gsiftp://a:2811/d/
Dest:   gsiftp://b:2811/e/
  a%20b  ->  t1

Source: gsiftp://a:2811/d/
Dest:   gsiftp://b:2811/e/
  none  ->  t2


continuing on error: globus_ftp_client: the server responded with an error
500 500-Command failed. : globus_l_gfs_file_open failed.
500-globus_xio: Unable to open file /d/none
500-globus_xio: System error in open: No such file or directory
500-globus_xio: A system call failed: No such file or directory
500 End.


Source: gsiftp://a:2811/d/
Dest:   gsiftp://b:2811/e/
  big  ->  t3

   1228144640 bytes       234.25 MB/sec avg       234.25 MB/sec inst
   1670381568 bytes       159.30 MB/sec avg        84.35 MB/sec inst
Source: gsiftp://a:2811/d/
Dest:   gsiftp://b:2811/e/
  same

error: There was an error with 1 transfer.
"""


def test_the_output_of_a_list_is_taken_apart() -> None:
    names = [("a%20b", "t1"), ("none", "t2"), ("big", "t3"), ("same", "same")]
    pairs = [
        UrlPair(key, StorageUrl(f"{_A}/{name}"), StorageUrl(f"{_B}/{new}"), 7) for key, (name, new) in enumerate(names)
    ]
    begun: list[int] = []
    logged: list[tuple[int, str]] = []
    arrived: list[tuple[int, int]] = []
    listener = CopyListener(
        pairs,
        Deadline(10, time.monotonic() + 10),
        lambda pair: begun.append(pair.key),
        lambda key, line: logged.append((key, line)),
        lambda key, count: arrived.append((key, count)),
    )
    for line in RECORDED.split("\n"):
        listener.heard(line)
    assert begun == [0, 1, 2, 3]
    assert arrived == [(2, 1228144640), (2, 1670381568)]
    assert {key for key, report in listener.reports.items() if report.error} == {1}
    assert "System error in open: No such file or directory" in listener.reports[1].error
    assert (0, "  a%20b  ->  t1") in logged and (3, "  same") in logged
    assert all(line.strip() for _, line in logged)


def test_what_comes_before_the_first_file_is_of_all() -> None:
    heard: list[tuple[int, str]] = []
    listener = CopyListener(
        [UrlPair(5, StorageUrl("s"), StorageUrl("d"), 1), UrlPair(6, StorageUrl("s2"), StorageUrl("d2"), 1)],
        Deadline(10, time.monotonic() + 10),
        lambda pair: None,
        lambda key, line: heard.append((key, line)),
        lambda key, count: None,
    )
    listener.heard("error: globus_ftp_control: gss_init_sec_context failed")
    assert heard == [(5, "error: globus_ftp_control: gss_init_sec_context failed")]
    assert listener.current is None


@pytest.mark.parametrize(
    ("line", "name", "kind", "mode"),
    [
        ("-rw-r--r--   1 999   0             7 2026-11-29 19:01:59.000000 +0000  lead\t", " lead", "file", 0o644),
        ("drwxrwxrwt   1 999   0            40 2026-11-29 19:01:59.000000 +0000 a b\t", "a b", "directory", 0o777),
        ("lrwxrwxrwx   1 0 0                 1 2026-11-29 19:01:59.000000 +0000 tab\t\t", "tab\t", "link", 0o777),
        (
            "-rwsr-x---   1 0 0     1234567890123 2026-11-29 19:01:59.000000 +0000 new\nline\t",
            "new\nline",
            "file",
            0o750,
        ),
    ],
)
def test_entries_of_gfal_ls(line: str, name: str, kind: str, mode: int) -> None:
    found = _ENTRY.match(line)
    assert found is not None
    stat = _file_stat(found)
    assert (found["name"], stat.kind, stat.mode, stat.mtime) == (name, kind, mode, 1795978919)


def test_a_listing_that_begins_with_what_is_no_entry_is_bad(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As an error text that gfal-ls prints among its entries: the tool is ended before it has a status."""
    (tmp_path / "gfal-ls").write_text("#!/bin/sh\necho no entry\nsleep 60\n")
    (tmp_path / "gfal-ls").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    gfal = Gfal(ToolRunner(), lambda urls: {}, lambda line: None, lambda: Deadline(30.0, time.monotonic() + 30.0))
    with pytest.raises(StorageError, match="no entry of a directory") as raised:
        list(gfal.entries(StorageUrl(_A)))
    assert raised.value.code is FailureCode.BAD_LISTING


def test_gfal_stat() -> None:
    lines = ["  File: 'x'", "  Size: 7\tregular file", "Access: (0644/-rw-r--r--)\tUid: 999\tGid: 0\t"]
    stat = stat_in([*lines, "Modify: 2026-11-29 19:01:59.000000", "Change: 1970-01-01 00:00:00.000000"])
    assert (stat.kind, stat.size, stat.mode, stat.mtime) == ("file", 7, 0o644, 1795978919)
    with pytest.raises(StorageError):
        stat_in(["  File: 'x'"])


#: Number and text as gfal2 2.21 gives them → error number, code of the mover.
ERRORS = [
    (2, "Result HTTP 404 : File not found  after 1 attempts", errno.ENOENT, FailureCode.NOT_FOUND),
    (2, "Could not open the user certificate", None, FailureCode.CREDENTIAL_MISSING),
    (17, "TRANSFER ERROR: Copy failed. Last attempt: HTTP 403 : Permission refused ", errno.EACCES, None),
    (
        70,
        "globus_xio: Unable to connect to localhost:1 globus_xio: System error in connect: Connection refused",
        None,
        FailureCode.CONNECTION,
    ),
    (112, "Result Could not connect to server after 1 attempts", None, FailureCode.CONNECTION),
    (
        13,
        "globus_ftp_client: the server responded with an error 530 530-globus_xio: Authentication Error"
        "  530-globus_gsi_callback_module: The certificate has expired: Credential with subject: /CN=x",
        None,
        FailureCode.CREDENTIAL_EXPIRED,
    ),
    (
        13,
        "globus_ftp_client: the server responded with an error 530 530-Login incorrect. : Gridmap lookup failure: x ",
        None,
        FailureCode.CREDENTIAL_REFUSED,
    ),
    (
        70,
        "TRANSFER  globus_ftp_client: the server responded with an error 500 500-Command failed. : callback failed."
        "  500-globus_xio: System error in write: No space left on device  500 End.",
        errno.ENOSPC,
        FailureCode.NO_SPACE,
    ),
    (17, "[SE][Ls][SRM_INVALID_PATH] httpg://x:8443/srm/managerv2: no such path", None, FailureCode.NOT_FOUND),
    (70, "[SE][PrepareToPut][SRM_NO_FREE_SPACE] httpg://x:8443/srm/managerv2: full", None, FailureCode.NO_SPACE),
]


@pytest.mark.parametrize(("number", "text", "expected", "code"), ERRORS)
def test_what_an_error_means(number: int, text: str, expected: int | None, code: FailureCode | None) -> None:
    error = error_of(number, text)
    assert error.errno == expected
    if code is not None:
        fault = Fault(FailureScope.SOURCE, error.message, error.errno, error.code, None)
        assert ToolsMover(JobProtocol.GRIDFTP).classify(fault).code is code
