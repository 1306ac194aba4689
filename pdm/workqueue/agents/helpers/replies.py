"""What the replies of GridFTP servers mean, as far as the agent must know."""

from __future__ import annotations

import errno
import os
import re

from pdm.workqueue.agents.helpers.control_channel import Reply
from pdm.workqueue.agents.helpers.mlsx import moment, read_entry
from pdm.workqueue.agents.helpers.storage import StorageError, Thing, Version

#: Newer Globus servers end a failed reply in structured lines.
_ERRNO = re.compile(r"^\d{3}-GridFTP-Errno: (\d+)", re.MULTILINE)
_CODE = re.compile(r"GlobusError: v=\d+ c=([A-Z_]+)")
_CODES = {
    "PATH_NOT_FOUND": errno.ENOENT,
    "PATH_EXISTS": errno.EEXIST,
    "NOT_A_DIRECTORY": errno.ENOTDIR,
    "IS_A_DIRECTORY": errno.EISDIR,
    "DIR_NOT_EMPTY": errno.ENOTEMPTY,
    "QUOTA_EXCEEDED": errno.EDQUOT,
    "NO_SPACE_LEFT": errno.ENOSPC,
}
_STRERRORS = {os.strerror(number): number for number in sorted(errno.errorcode, reverse=True)}
#: Older ones, and all of them during transfers, say only this.
_PROSE = re.compile(
    r"System error in [\w ./()-]+: (" + "|".join(re.escape(text) for text in sorted(_STRERRORS, key=len)[::-1]) + ")"
)
#: A first line, the entry, and a last line.
_LINES_OF_MLST = 3
#: The reply to MDTM.
_MOMENT = re.compile(r"213 ([0-9]{14})")
#: The server is about to close the connection.
_CLOSING = 421
#: We are not logged in, for reasons that are about the server's files and certificates: 530 to 539.
_LOGIN = 53
#: The connection is gone: another one may do.
_LOST = re.compile(
    r"an end-of-file was reached|Connection reset by peer|Broken pipe|Connection timed out|No route to host"
    r"|Handle not in the proper state|not in the proper state CLOSING|the connection was closed",
    re.MULTILINE,
)
#: CKSM, or its algorithm, is not known to the server.
_NO_CHECKSUM = re.compile(
    r"Unknown checksum algorithm"
    r"|^50[0-4][ -].*(?:unrecognized|not (?:understood|implemented|supported)|unknown command|invalid command)",
    re.MULTILINE | re.IGNORECASE,
)


def refusal(reply: Reply) -> StorageError:
    """The error behind a reply which says that a command was not carried out."""
    text = reply.text
    lost = reply.code == _CLOSING or _LOST.search(text) is not None
    # What is wrong with a connection, or with the login, is not about the file.
    is_of_the_file = not lost and reply.code // 10 != _LOGIN
    return StorageError(text, errno=errno_of_reply(text) if is_of_the_file else None, lost=lost)


def errno_of_reply(text: str) -> int | None:
    """The error number in a server's own reply; None if it tells none that is known."""
    found = _ERRNO.search(text)
    if found is not None and int(found.group(1)) in errno.errorcode:
        return int(found.group(1))
    found = _CODE.search(text)
    if found is not None and found.group(1) in _CODES:
        return _CODES[found.group(1)]
    found = _PROSE.search(text)
    return _STRERRORS[found.group(1)] if found is not None else None


def lacks_checksum(trouble: StorageError) -> bool:
    """Whether a refused CKSM means that the server has none."""
    return trouble.errno is None and not trouble.lost and _NO_CHECKSUM.search(trouble.message) is not None


def may_hide_writes(text: str) -> bool:
    """Whether a file may be written to again and the reply to an MDTM stay the same: it counts whole seconds."""
    found = _MOMENT.match(text)
    return found is None or Version(0, moment(found.group(1).encode())).may_hide_writes


def status_in(reply: Reply, path: bytes) -> Thing:
    """What the reply to an MLST tells of a path, which may hold line ends.

    Raises:
        StorageError: the server has refused, or its reply is not valid (BAD_LISTING).
    """
    if not reply.good:
        raise refusal(reply)
    lines = reply.text.split("\n")
    if len(lines) == _LINES_OF_MLST:
        return read_entry(lines[1].strip().encode()).thing
    # The first line and the entry hold the path: the facts stand before the last of these, on one line.
    before = reply.text.rpartition(path.decode("utf-8", "backslashreplace"))[0]
    return read_entry(before.rpartition("\n")[2].strip().encode() + b" path").thing


def thing_in(reply: Reply) -> Thing | None:
    """What the reply to an MLST tells of; None if it tells nothing that can be understood."""
    lines = reply.text.split("\n")
    try:
        return read_entry(lines[1].strip().encode()).thing if reply.good and len(lines) == _LINES_OF_MLST else None
    except StorageError:
        return None
