"""What the texts of servers and of the client library mean to the agent itself."""

from __future__ import annotations

import errno

import pytest

from pdm.workqueue.helpers.gridftp.replies import error_from, lacks_checksum

_REPLY = "globus_ftp_client: the server responded with an error\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (_REPLY + "550 550-GlobusError: v=1 c=PATH_NOT_FOUND\n550-GridFTP-Errno: 2\n550 End.", errno.ENOENT),
        (_REPLY + "550 550-GlobusError: v=1 c=PATH_NOT_FOUND\n550 End.", errno.ENOENT),
        (_REPLY + "500 500-globus_xio: System error in open: Permission denied\n500 End.", errno.EACCES),
        (_REPLY + "500 500-globus_xio: System error in write: No space left on device\n500 End.", errno.ENOSPC),
        (_REPLY + "500 500-globus_xio: System error in write: Disk quota exceeded\n500 End.", errno.EDQUOT),
        (_REPLY + "550-GridFTP-Errno: 4242\n550 End.", None),
        (_REPLY + "501 Invalid command arguments.", None),
        # About a file of this machine, and about a file of the server's that is not the user's.
        ("globus_xio: System error in open: No such file or directory", None),
        (_REPLY + "530 530-Login incorrect. : System error in open: No such file or directory\n530 End.", None),
        # A name may say anything.
        (_REPLY + "550 /data/No such file or directory: cannot be read", None),
    ],
)
def test_the_error_number_comes_from_the_reply_about_the_file(text: str, number: int | None) -> None:
    assert error_from(text).errno == number


@pytest.mark.parametrize(
    "text",
    [
        "an end-of-file was reached\nglobus_xio: An end of file occurred",
        _REPLY + "500-globus_xio: System error in writev: Connection reset by peer\n500 End.",
        "globus_xio: System error in send: Broken pipe",
        _REPLY + "421 Idle Timeout: closing control connection.",
    ],
)
def test_a_connection_that_ended_is_lost_and_has_no_error_number(text: str) -> None:
    error = error_from(text)
    assert error.lost
    assert error.errno is None


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        (_REPLY + "500 Unknown checksum algorithm requested.", True),
        (_REPLY + "500 'CKSM': command not understood.", True),
        (_REPLY + "502 Command not implemented.", True),
        (_REPLY + "550-GridFTP-Errno: 2\n550 End.", False),
        ("an end-of-file was reached", False),
    ],
)
def test_a_server_without_checksums_is_known_by_its_refusal(text: str, lacks: bool) -> None:
    assert lacks_checksum(error_from(text)) is lacks
