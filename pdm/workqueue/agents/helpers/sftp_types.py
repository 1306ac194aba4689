"""Types of files at SFTP servers: what links lead to, and what a server does not say itself."""

from __future__ import annotations

import contextlib
import errno
import struct
from collections.abc import Sequence

from pdm.workqueue.agents.helpers import sftp_session as sftp
from pdm.workqueue.agents.helpers.sftp_answers import Attributes, attributes_of, handle_of, names_of
from pdm.workqueue.agents.helpers.sftp_session import SftpSession, StatusError, string
from pdm.workqueue.agents.helpers.storage import Thing

#: Types are asked for of so many names at once: each may cost the server an open handle.
_AT_ONCE = 16
_OPEN_TO_READ = struct.pack(">II", 1, 0)


def typed(session: SftpSession, found: Sequence[tuple[bytes, Attributes]], *, links: bool = True) -> list[Thing]:
    """Things, each with its type; where the server has not said it, it is found out.

    Args:
        session: with the server.
        found: paths with their attributes.
        links: whether a path may be a link itself; False if the attributes are of what it leads to.
    """
    unknown = [path for path, attributes in found if attributes.kind is None]
    kinds: dict[bytes, str] = {}
    for start in range(0, len(unknown), _AT_ONCE):
        asked = unknown[start : start + _AT_ONCE]
        are_links = _succeed(session, [(sftp.READLINK, path) for path in asked]) if links else [False] * len(asked)
        are_folders = _are_directories(session, asked)
        for path, is_link, is_folder in zip(asked, are_links, are_folders, strict=True):
            kinds[path] = "link" if is_link else "directory" if is_folder else "file"
    return [attributes.thing(kinds.get(path)) for path, attributes in found]


def _are_directories(session: SftpSession, paths: Sequence[bytes]) -> list[bool]:
    """Which paths are directories, where only what can be done with them shows it.

    Some servers open a file as a directory, and fail when it is read, or show it empty: then it is a file if it
    can be opened as one.
    """
    requests = [session.send(sftp.OPENDIR, string(path)) for path in paths]
    found: list[bool | None] = []
    reads: list[tuple[int, bytes, int]] = []
    for number, request in enumerate(requests):
        try:
            handle = handle_of(session.receive(request))
        except StatusError as error:
            # Of a file it is said that it is no directory, whatever its permissions.
            found.append(error.errno == errno.EACCES)
        else:
            found.append(None)
            reads.append((number, handle, session.send(sftp.READDIR, string(handle))))
    for number, handle, request in reads:
        try:
            answer = session.receive(request)
        except StatusError:
            found[number] = False
        else:
            found[number] = True if answer.type == sftp.NAME else None
        close_handle(session, handle)
    return [_opens_not(session, path) if is_one is None else is_one for path, is_one in zip(paths, found, strict=True)]


def _opens_not(session: SftpSession, path: bytes) -> bool:
    """Whether a path cannot be opened as a file."""
    try:
        request = session.send(sftp.OPEN, string(path), _OPEN_TO_READ)
        close_handle(session, handle_of(session.receive(request)))
    except StatusError:
        return True
    return False


def followed(session: SftpSession, links: list[tuple[bytes, Thing]]) -> list[Thing]:
    """Where links lead; all asked for before the first answer is waited for."""
    asked = [(session.send(sftp.STAT, string(path)), session.send(sftp.REALPATH, string(path))) for path, _ in links]
    things = []
    for (path, link), (status, real) in zip(links, asked, strict=True):
        try:
            target = attributes_of(session.receive(status))
        except StatusError:
            session.forget([real])
            things.append(link)
            continue
        where: bytes | None = None
        with contextlib.suppress(StatusError):
            where = next((name for name, _ in names_of(session.receive(real))), None)
        (led_to,) = typed(session, [(path, target)], links=False)
        things.append(link._replace(size=led_to.size, target=where, target_kind=led_to.kind))
    return things


def close_handle(session: SftpSession, handle: bytes) -> None:
    """Close a file or directory; nobody waits for the answer."""
    if not session.closed:
        session.forget([session.send(sftp.CLOSE, string(handle))])


def _succeed(session: SftpSession, requests: Sequence[tuple[int, bytes]]) -> list[bool]:
    """Which of some requests are carried out, rather than refused; all are sent before the first answer is read."""
    numbers = [session.send(kind, string(path)) for kind, path in requests]
    done = []
    for number in numbers:
        try:
            session.receive(number)
        except StatusError:
            done.append(False)
        else:
            done.append(True)
    return done
