"""What the replies of servers mean to the agent itself."""

from __future__ import annotations

import errno

import pytest

from pdm.workqueue.helpers.gridftp.replies import Reply, lacks_checksum, refusal, status_in


def said(text: str) -> Reply:
    return Reply(int(text[:3]), text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("550-GlobusError: v=1 c=PATH_NOT_FOUND\n550-GridFTP-Errno: 2\n550 End.", errno.ENOENT),
        ("550-GlobusError: v=1 c=PATH_NOT_FOUND\n550 End.", errno.ENOENT),
        ("500-globus_xio: System error in open: Permission denied\n500 End.", errno.EACCES),
        ("500-globus_xio: System error in write: No space left on device\n500 End.", errno.ENOSPC),
        ("500-globus_xio: System error in write: Disk quota exceeded\n500 End.", errno.EDQUOT),
        ("550-GridFTP-Errno: 4242\n550 End.", None),
        ("501 Invalid command arguments.", None),
        # About a file of the server's that is not the user's.
        ("530-Login incorrect. : System error in open: No such file or directory\n530 End.", None),
        # A name may say anything.
        ("550 /data/No such file or directory: cannot be read", None),
    ],
)
def test_the_error_number_comes_from_the_reply_about_the_file(text: str, number: int | None) -> None:
    assert refusal(said(text)).errno == number


@pytest.mark.parametrize(
    "text",
    [
        "426-an end-of-file was reached\n426-globus_xio: An end of file occurred\n426 End.",
        "500-globus_xio: System error in writev: Connection reset by peer\n500 End.",
        "500-globus_xio: System error in send: Broken pipe\n500 End.",
        "421 Idle Timeout: closing control connection.",
    ],
)
def test_a_connection_that_ended_is_lost_and_has_no_error_number(text: str) -> None:
    error = refusal(said(text))
    assert error.lost
    assert error.errno is None


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        ("500 Unknown checksum algorithm requested.", True),
        ("500 'CKSM': command not understood.", True),
        ("502 Command not implemented.", True),
        ("550-GridFTP-Errno: 2\n550 End.", False),
        ("426 an end-of-file was reached", False),
    ],
)
def test_a_server_without_checksums_is_known_by_its_refusal(text: str, lacks: bool) -> None:
    assert lacks_checksum(refusal(said(text))) is lacks


@pytest.mark.parametrize("name", [b"f", b"new\nline", b"e\n250 End.", b"x\n Type=dir; /d/y", b"\xe9", b"\n", b"cr\rx"])
def test_a_name_with_line_ends_forges_no_facts(name: bytes) -> None:
    path = b"/d/" + name
    shown = path.decode("utf-8", "backslashreplace")
    reply = Reply(250, f"250-status of {shown}\n Type=file;Size=7;UNIX.mode=0644; {shown}\n250 End.")
    there = status_in(reply, path)
    assert (there.kind, there.size) == ("file", 7)
