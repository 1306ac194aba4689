"""An SFTP server based on AsyncSSH, with quirks that no packaged server has. A program of its own.

The name of the account selects the quirks of a session, for example ``no-types,silent``. Any other name is an account
without quirks.
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
    "rename-by-links": "RENAME makes a hard link, as that of OpenSSH, where the file system refuses them",
    "rival": "in the moment before a file gets the name 'contested', somebody else makes a file of that name",
    "no-links": "no hard links: neither the extension nor the file system has them",
    "no-extensions": "none of the extensions of OpenSSH",
    "like-openssh": "the extensions of OpenSSH, in its order",
    "made-again": "MKDIR of a directory that is there succeeds",
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
_OPENSSH = ("posix-rename", "statvfs", "fstatvfs", "hardlink", "fsync")


class Server(sftp.SFTPServer):
    """The file system of the account, with quirks."""

    def __init__(self, chan: Any) -> None:
        super().__init__(chan)
        self.quirks = frozenset(chan.get_extra_info("username").split(",")) & frozenset(QUIRKS)

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

    def _meet_rival(self, path: bytes) -> None:
        if "rival" in self.quirks and path.endswith(b"/contested"):
            Path(os.fsdecode(path)).write_bytes(b"the rival's")

    def rename(self, oldpath: bytes, newpath: bytes) -> Any:
        self._meet_rival(newpath)
        if "rename-by-links" in self.quirks:
            self._fail("Failure")
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
        self._meet_rival(newpath)
        if self.quirks & {"no-links", "across", "rename-by-links"}:
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


class Handler(sftp.SFTPServerHandler):
    """The quirks below the file system: in extensions and responses."""

    def __init__(self, server: Any, *more: Any) -> None:
        super().__init__(server, *more)
        self._quirks: frozenset[str] = server.quirks
        if "no-extensions" in self._quirks:
            self._extensions = []
        if "no-links" in self._quirks:
            self._extensions = [each for each in self._extensions if b"hardlink" not in each[0]]
        if "like-openssh" in self._quirks:
            first = [name.encode() + b"@openssh.com" for name in _OPENSSH]
            self._extensions = [(name, b"1") for name in first]

    async def _limits(self, packet: Any) -> Any:
        found = await self._process_limits(packet)
        if "small-writes" in self._quirks:
            found.max_write_len = _SMALL
        return found

    async def _readdir(self, packet: Any) -> Any:
        try:
            return await self._process_readdir(packet)
        except asyncssh.SFTPEOFError:
            if "endless-names" in self._quirks:
                return [], False
            raise

    _packet_handlers = {  # noqa: RUF012 - as in the class that it extends
        **sftp.SFTPServerHandler._packet_handlers,
        _READDIR: _readdir,  # type: ignore[dict-item]
        b"limits@openssh.com": _limits,  # type: ignore[dict-item]
    }


async def _serve(arguments: argparse.Namespace) -> None:
    # There is no parameter for it.
    sftp.SFTPServerHandler = Handler  # type: ignore[assignment, misc]
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
    """Serve until the process is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--host-key", required=True)
    parser.add_argument("--authorized", required=True)
    parser.add_argument("--account", help="become this one")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
