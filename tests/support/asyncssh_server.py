"""An SFTP server made of AsyncSSH, and the quirks of servers that no package has. A program of its own.

A quirk is named on the command line; ``QUIRKS`` says which real servers have it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pwd
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncssh
from asyncssh import sftp

QUIRKS = {
    "no-types": "permission bits without the type of the file, as servers on Windows and for object stores send them",
    "no-permissions": "neither types nor permissions",
    "bare-long-names": "the long name of a listing is no line of ls -l",
    "renaming-replaces": "RENAME replaces the file that has the new name, as that of rclone",
    "no-links": "no hard links: neither the extension nor the file system has them",
    "no-extensions": "none of the extensions of OpenSSH",
    "made-again": "MKDIR of a folder that is there succeeds",
    "across": "RENAME fails: the two names are on two file systems",
    "full": "a write fails: no space is left",
    "no-inodes": "the file system does not count inodes, and a write fails for another reason",
    "read-only": "a new file is refused: the file system is read-only",
    "silent": "a failure has no text, as those of OpenSSH",
    "short-reads": "a READ brings 1,000 bytes at most",
    "small-writes": "a WRITE of more than 8 KiB is refused; limits@openssh.com says so",
    "endless-names": "the end of a listing is an empty list, again and again",
    "no-sync": "fsync@openssh.com is offered and cannot be done",
}
_SMALL = 8192
_OPEN_FOR_WRITING, _READDIR = 2, 12


class Server(sftp.SFTPServer):
    """The file system of the account, with quirks."""

    quirks: frozenset[str] = frozenset()

    def lstat(self, path: bytes) -> Any:
        return self._bent(super().lstat(path))

    def stat(self, path: bytes) -> Any:
        return self._bent(super().stat(path))

    def fstat(self, file_obj: object) -> Any:
        return self._bent(super().fstat(file_obj))

    def _bent(self, found: Any) -> Any:
        attributes = found if isinstance(found, sftp.SFTPAttrs) else sftp.SFTPAttrs.from_local(found)
        if "no-types" in self.quirks and attributes.permissions is not None:
            attributes.permissions = stat.S_IMODE(attributes.permissions)
        if "no-permissions" in self.quirks:
            attributes.permissions = None
        return attributes

    async def scandir(self, path: bytes) -> AsyncIterator[Any]:
        async for name in super().scandir(path):
            self.format_longname(name)
            if "bare-long-names" in self.quirks:
                name.longname = name.filename
            self._bent(name.attrs)
            yield name

    def mkdir(self, path: bytes, attrs: Any) -> Any:
        if "made-again" in self.quirks and Path(os.fsdecode(path)).is_dir():
            return None
        return super().mkdir(path, attrs)

    def rename(self, oldpath: bytes, newpath: bytes) -> Any:
        if "across" in self.quirks:
            self._fail("Invalid cross-device link")
        if "renaming-replaces" in self.quirks:
            return super().posix_rename(oldpath, newpath)
        return super().rename(oldpath, newpath)

    def posix_rename(self, oldpath: bytes, newpath: bytes) -> Any:
        if "across" in self.quirks:
            self._fail("Invalid cross-device link")
        return super().posix_rename(oldpath, newpath)

    def link(self, oldpath: bytes, newpath: bytes) -> Any:
        if "no-links" in self.quirks or "across" in self.quirks:
            self._fail("Operation not permitted")
        return super().link(oldpath, newpath)

    def open(self, path: bytes, pflags: int, attrs: Any) -> Any:
        if "read-only" in self.quirks and pflags & _OPEN_FOR_WRITING:
            self._fail("Read-only file system")
        return super().open(path, pflags, attrs)

    def read(self, file_obj: object, offset: int, size: int) -> Any:
        return super().read(file_obj, offset, min(size, 1000) if "short-reads" in self.quirks else size)

    def write(self, file_obj: object, offset: int, data: bytes) -> Any:
        if "full" in self.quirks:
            self._fail("No space left on device")
        if "no-inodes" in self.quirks:
            self._fail("a plug-in refused")
        if "small-writes" in self.quirks and len(data) > _SMALL:
            self._fail("too long")
        return super().write(file_obj, offset, data)

    def fsync(self, file_obj: object) -> Any:
        if "no-sync" in self.quirks:
            raise asyncssh.SFTPOpUnsupported("fsync is not for this file system")
        return super().fsync(file_obj)

    def statvfs(self, path: bytes) -> Any:
        found = sftp.SFTPVFSAttrs.from_local(os.statvfs(path))
        if "no-inodes" in self.quirks:
            found.files = found.ffree = found.favail = 0
        if "read-only" in self.quirks:
            found.flags |= os.ST_RDONLY
        if "full" in self.quirks:
            found.bfree = found.bavail = 0
        return found

    def _fail(self, text: str) -> None:
        raise asyncssh.SFTPFailure("Failure" if "silent" in self.quirks else text)


def _bend_protocol(quirks: frozenset[str]) -> None:
    """The quirks below the file system: of the extensions and the answers."""
    handler = sftp.SFTPServerHandler
    if "no-extensions" in quirks:
        handler._extensions = []
    if "no-links" in quirks:
        handler._extensions = [each for each in handler._extensions if b"hardlink" not in each[0]]
    if "small-writes" in quirks:
        sftp.MAX_SFTP_WRITE_LEN = _SMALL
    if "endless-names" in quirks:
        plain = handler._process_readdir

        async def readdir(self: Any, packet: Any) -> Any:
            try:
                return await plain(self, packet)
            except asyncssh.SFTPEOFError:
                return [], False

        handler._process_readdir = readdir  # type: ignore[method-assign]
        handler._packet_handlers[_READDIR] = readdir


async def _serve(arguments: argparse.Namespace) -> None:
    quirks = frozenset(arguments.quirk)
    Server.quirks = quirks
    _bend_protocol(quirks)
    await asyncssh.listen(
        "127.0.0.1",
        arguments.port,
        server_host_keys=[arguments.host_key],
        authorized_client_keys=arguments.authorized,
        sftp_factory=Server,
    )
    # Only now: the account may not be able to read the modules that AsyncSSH loads to listen.
    if arguments.account:
        who = pwd.getpwnam(arguments.account)
        os.setgroups([])
        os.setgid(who.pw_gid)
        os.setuid(who.pw_uid)
    await asyncio.Event().wait()


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host-key", required=True)
    parser.add_argument("--authorized", required=True)
    parser.add_argument("--account", help="become this one")
    parser.add_argument("--quirk", action="append", default=[], choices=sorted(QUIRKS))
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
