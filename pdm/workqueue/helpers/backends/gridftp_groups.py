"""Group operations at GridFTP servers: commands are pipelined, and the bytes of all files use one data connection."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.gridftp import GridFtpBackend
from pdm.workqueue.helpers.gridftp.control import ControlChannel
from pdm.workqueue.helpers.gridftp.download import NoBlockModeError
from pdm.workqueue.helpers.gridftp.file_commands import checksum_command, checksum_in, computes_checksums
from pdm.workqueue.helpers.gridftp.replies import Reply, errno_of_reply, file_stat_in
from pdm.workqueue.helpers.gridftp.storage import command_path
from pdm.workqueue.helpers.group_backend import FileContent, GroupBackend
from pdm.workqueue.helpers.storage import FileStat, FileVersion, StorageError

#: Failures after which the other files of a group are read alone: each costs a login.
_MOST_FAILURES = 2


class GroupedGridFtpBackend(GridFtpBackend, GroupBackend):
    """The channels of one thread, which also carry out many commands at once."""

    def renames_groups(self, url: StorageUrl, replace: bool) -> bool:
        return True

    # -- commands

    def _replies(self, urls: Sequence[StorageUrl], *commands: bytes) -> list[Reply | None]:
        """Replies to the last of some commands for each URL; None for a name that no command can hold."""
        channel = self._channel(urls[0])
        replies: list[Reply | None] = [None] * len(urls)
        for number, url in enumerate(urls):
            if (path := _path(url)) is not None:
                for command in commands:
                    channel.send(command + path, _storing(replies, number), many_lines=True)
        self._session.run((channel,), self.timeouts)
        return replies

    def _channel(self, url: StorageUrl) -> ControlChannel:
        return self._session.live_channel(url, self.timeouts)

    def _stats(self, urls: Sequence[StorageUrl]) -> list[FileStat | None]:
        """States of regular files; None for everything else."""
        found = [None if reply is None else file_stat_in(reply) for reply in self._replies(urls, b"MLST ")]
        return [file_stat if file_stat is not None and file_stat.kind == "file" else None for file_stat in found]

    def are_free(self, urls: Sequence[StorageUrl]) -> list[bool]:
        return [
            reply is not None and not reply.good and errno_of_reply(reply.text) == errno.ENOENT
            for reply in self._replies(urls, b"MLST ")
        ]

    def group_sizes(self, urls: Sequence[StorageUrl]) -> list[int | None]:
        return [None if found is None else found.size for found in self._stats(urls)]

    def group_versions(self, urls: Sequence[StorageUrl]) -> list[FileVersion | None]:
        return [None if found is None else FileVersion(found.size, found.mtime) for found in self._stats(urls)]

    def group_checksums(self, urls: Sequence[StorageUrl], algorithm: ChecksumAlgorithm) -> list[str | None]:
        if not computes_checksums(algorithm, self._channel(urls[0])):
            return [None] * len(urls)
        command = checksum_command(algorithm, b"")
        return [
            None if reply is None or not reply.good else checksum_in(algorithm, reply)
            for reply in self._replies(urls, command)
        ]

    def rename_group(self, files: Sequence[tuple[StorageUrl, StorageUrl, int]], *, replace: bool) -> list[bool]:
        # The server replaces what is there without an error.
        free = [True] * len(files) if replace else self.are_free([new for _, new, _ in files])
        channel = self._channel(files[0][0])
        replies: list[Reply | None] = [None] * len(files)
        for number, ((old, new, _), is_free) in enumerate(zip(files, free, strict=True)):
            old_path, new_path = _path(old), _path(new)
            if is_free and old_path is not None and new_path is not None:
                channel.send(b"RNFR " + old_path, lambda reply: None, many_lines=True)
                channel.send(b"RNTO " + new_path, _storing(replies, number), many_lines=True)
        self._session.run((channel,), self.timeouts)
        return [reply is not None and reply.good for reply in replies]

    def remove_group(self, urls: Sequence[StorageUrl]) -> list[bool]:
        return [
            reply is not None and (reply.good or errno_of_reply(reply.text) == errno.ENOENT)
            for reply in self._replies(urls, b"DELE ")
        ]

    # -- bytes

    def read_group(self, files: Sequence[tuple[StorageUrl, int]]) -> list[FileContent | None]:
        contents: list[FileContent | None] = [None] * len(files)
        there = self._stats([url for url, _ in files])
        # A refused transfer closes the connections: only what is as it was listed is requested.
        left = [
            (number, url, FileVersion(found.size, found.mtime))
            for number, ((url, size), found) in enumerate(zip(files, there, strict=True))
            if found is not None and found.size == size
        ]
        failures = 0
        while left and failures < _MOST_FAILURES:
            read = self._read([url for _, url, _ in left], [version.size for _, _, version in left])
            for (number, _, version), data in zip(left, read, strict=False):
                contents[number] = FileContent(data, version)
            # The first one after those is at fault.
            left = left[len(read) + 1 :]
            failures += 1
        return contents

    def _read(self, urls: Sequence[StorageUrl], sizes: Sequence[int]) -> list[bytes]:
        """Contents of the first files, up to the first that cannot be read."""
        channel = self._channel(urls[0])
        if not self._downloads.uses_blocks(channel):
            return []
        complete: list[bytes] = []
        data = bytearray()
        try:
            for number, piece in self._downloads.blocks(channel, [command_path(url) for url in urls], 1, self.timeouts):
                if piece is None:
                    complete.append(bytes(data))
                    data.clear()
                elif len(data) <= sizes[number]:
                    data += piece
                else:
                    # The file has grown, or the server sends without end.
                    break
        except NoBlockModeError as error:
            self._log(f"{error}; small files are read one by one")
        except StorageError as error:
            if error.is_of_server:
                raise
        return complete

    def write_group(self, files: Sequence[tuple[StorageUrl, bytes]]) -> list[bool]:
        paths = [_path(url) for url, _ in files]
        possible = [(path, content) for path, (_, content) in zip(paths, files, strict=True) if path is not None]
        made = iter(self._uploads.group(self._channel(files[0][0]), possible, self.timeouts) if possible else ())
        return [path is not None and next(made) for path in paths]


def _path(url: StorageUrl) -> bytes | None:
    """The path of a URL; None if no command can hold it."""
    try:
        return command_path(url)
    except StorageError:
        return None


def _storing(replies: list[Reply | None], number: int) -> Callable[[Reply], None]:
    def answered(reply: Reply) -> None:
        replies[number] = reply

    return answered
