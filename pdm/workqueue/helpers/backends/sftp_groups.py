"""Group operations at SFTP servers: the requests for a whole group are sent before the first response is read."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from pdm.workqueue.helpers.backends import sftp_session as sftp
from pdm.workqueue.helpers.backends.sftp_files import Attributes, PieceSizes, attributes_of, close_handle, handle_of
from pdm.workqueue.helpers.backends.sftp_session import PacketReader, SftpResponse, SftpSession, StatusError, string
from pdm.workqueue.helpers.group_backend import FileContent
from pdm.workqueue.helpers.storage import FileVersion

_Result = TypeVar("_Result")
#: Errors of fsync from file systems that do not support it; any other error is about the bytes.
CANNOT_SYNC = frozenset({errno.EOPNOTSUPP, errno.EINVAL})


def _received(session: SftpSession, request: int, read: Callable[[SftpResponse], _Result]) -> _Result | None:
    """The response, or None for an error status."""
    try:
        return read(session.receive(request))
    except StatusError:
        return None


def _open(session: SftpSession, paths: Iterable[bytes], how: bytes) -> list[bytes | None]:
    """Handles of files; None for a file that cannot be opened."""
    requests = [session.send(sftp.OPEN, string(path), how) for path in paths]
    return [_received(session, request, handle_of) for request in requests]


def version_of(found: Attributes | None) -> FileVersion | None:
    """The version in attributes; None if they lack the size."""
    return None if found is None or found.size is None else FileVersion(found.size, found.mtime)


def read(session: SftpSession, files: Sequence[tuple[bytes, int]], most: int) -> list[FileContent | None]:
    """Contents of files.

    Args:
        session: with the server.
        files: path and size of each.
        most: bytes of one request.
    """
    handles = _open(session, [path for path, _ in files], sftp.TO_READ)
    asked: list[tuple[int, list[int]] | None] = [
        None if handle is None else (session.send(sftp.FSTAT, string(handle)), []) for handle in handles
    ]
    found: list[Attributes | None] = []
    if not session.is_openssh:
        # Other servers may process requests in another order, and return the version after the bytes.
        found = [None if each is None else _received(session, each[0], attributes_of) for each in asked]
    for handle, each, (_, size) in zip(handles, asked, files, strict=True):
        if handle is not None and each is not None:
            # One byte more than expected, to detect that the file has grown.
            for offset in range(0, size + 1, most):
                place = struct.pack(">QI", offset, min(most, size + 1 - offset))
                each[1].append(session.send(sftp.READ, string(handle), place))
    contents: list[FileContent | None] = []
    for number, (handle, each) in enumerate(zip(handles, asked, strict=True)):
        if handle is None or each is None:
            contents.append(None)
            continue
        attributes = found[number] if found else _received(session, each[0], attributes_of)
        version = version_of(attributes)
        pieces = [_received(session, request, _data) for request in each[1]]
        close_handle(session, handle)
        # A short read in the middle makes the content too short, which the size check detects.
        is_file = attributes is not None and attributes.kind != "directory" and None not in pieces
        contents.append(
            FileContent(b"".join(piece or b"" for piece in pieces), version) if is_file and version else None
        )
    return contents


def _data(answer: SftpResponse) -> bytes:
    """Bytes of a response to READ; empty at the end of the file."""
    return b"" if answer.type == sftp.STATUS else PacketReader(answer.body).string()


def attributes(session: SftpSession, paths: Iterable[bytes]) -> list[Attributes | None]:
    """Attributes of paths, links followed; None if they cannot be read."""
    requests = [session.send(sftp.STAT, string(path)) for path in paths]
    return [_received(session, request, attributes_of) for request in requests]


def are_free(session: SftpSession, paths: Iterable[bytes]) -> list[bool]:
    """Whether paths do not exist, not even as links."""
    return [number == errno.ENOENT for number in _errnos(session, [(sftp.LSTAT, string(path)) for path in paths])]


def write(session: SftpSession, files: Sequence[tuple[bytes, bytes]], sizes: PieceSizes) -> list[bool]:
    """Make new files from path and bytes; True where the server took all."""
    handles = _open(session, [path for path, _ in files], sftp.TO_CREATE)
    syncs = sftp.FSYNC in session.extensions
    asked: list[list[int]] = []
    for handle, (_, content) in zip(handles, files, strict=True):
        requests: list[int] = []
        if handle is not None:
            opened = string(handle)
            view = memoryview(content)
            for offset in range(0, len(content), sizes.writing):
                part = view[offset : offset + sizes.writing]
                requests.append(session.send(sftp.WRITE, opened, struct.pack(">QI", offset, len(part)), part))
        asked.append(requests)
    if not session.is_openssh:
        # Other servers may process requests in another order.
        taken = [all(number == 0 for number in _answers(session, requests)) for requests in asked]
    else:
        taken = []
    ends: list[list[int]] = []
    for handle in handles:
        requests = []
        if handle is not None:
            if syncs:
                requests.append(session.send(sftp.EXTENDED, string(sftp.FSYNC), string(handle)))
            requests.append(session.send(sftp.CLOSE, string(handle)))
        ends.append(requests)
    made = []
    for number, (handle, requests, end) in enumerate(zip(handles, asked, ends, strict=True)):
        good = taken[number] if taken else all(each == 0 for each in _answers(session, requests))
        *synced, closed = _answers(session, end) or [None]
        good = good and closed == 0 and all(each == 0 or each in CANNOT_SYNC for each in synced)
        made.append(handle is not None and good)
    return made


def carry_out(session: SftpSession, requests: Sequence[tuple[int, bytes]]) -> list[bool]:
    """Which requests, given by type and body, succeed."""
    return [number == 0 for number in _errnos(session, requests)]


def remove(session: SftpSession, paths: Sequence[bytes]) -> list[bool]:
    """Remove files; True where the name is free afterwards."""
    return [number in (0, errno.ENOENT) for number in _errnos(session, [(sftp.REMOVE, string(path)) for path in paths])]


def _errnos(session: SftpSession, requests: Sequence[tuple[int, bytes]]) -> list[int | None]:
    return _answers(session, [session.send(kind, rest) for kind, rest in requests])


def _answers(session: SftpSession, requests: Iterable[int]) -> list[int | None]:
    """0 for each success, otherwise the errno; None if it is not known."""
    numbers: list[int | None] = []
    for request in requests:
        try:
            session.receive(request)
        except StatusError as error:
            numbers.append(error.errno)
        else:
            numbers.append(0)
    return numbers
