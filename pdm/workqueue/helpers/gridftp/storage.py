"""GridFTP servers as a storage: one operation at a time, so that each error concerns one server and one file."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from functools import partial

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.checksums import checksum_of
from pdm.workqueue.helpers.gridftp.connections import ChannelPool, host_port, server_path
from pdm.workqueue.helpers.gridftp.control import greets
from pdm.workqueue.helpers.gridftp.download import Downloads
from pdm.workqueue.helpers.gridftp.file_commands import (
    checksum_command,
    checksum_in,
    computes_checksums,
    mode_command,
    mtime_command,
)
from pdm.workqueue.helpers.gridftp.replies import Reply, lacks_checksum, refusal, status_in
from pdm.workqueue.helpers.gridftp.session import ControlSession
from pdm.workqueue.helpers.gridftp.transfer import ThirdPartyTransfer, size_in
from pdm.workqueue.helpers.storage import (
    EntryIterator,
    FileStat,
    FileVersion,
    ProgressCallback,
    Storage,
    StorageError,
    Timeouts,
    scoped,
)

#: Timeout of the greeting in seconds.
_GREETING_S = 10.0
#: Seconds for a reply of a server whose connections were lost.
_GONE_S = 5.0


class GridFtpStorage(Storage):
    """The channels of one thread to GridFTP servers.

    Args:
        connections: the channels.
    """

    def __init__(self, connections: ChannelPool) -> None:
        self._session = ControlSession(connections)
        self._downloads = Downloads(self._session)
        self._log: Callable[[str], None] = lambda line: None

    def log_to(self, write: Callable[[str], None]) -> None:
        self._log = write

    def stat(self, url: str) -> FileStat | None:
        path = command_path(url)
        try:
            return status_in(self._ask(url, b"MLST " + path), path)
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def entries(self, url: str) -> EntryIterator:
        seen, counted = 0, 0
        for line in self._session.listing(url, command_path(url), self.timeouts):
            seen += 1
            if line.role:
                counted = line.counted or counted
            else:
                yield line.name, line.file_stat
        self.unnamed = max(counted - seen, 0)

    def make_directory(self, url: str) -> None:
        self._accepted(url, b"MKD " + command_path(url))

    def remove(self, url: str, *, directory: bool) -> None:
        self._accepted(url, (b"RMD " if directory else b"DELE ") + command_path(url))

    def rename(self, source: str, destination: str, *, replace: bool) -> None:
        # The server's rename replaces files silently.
        if not replace and self.stat(destination) is not None:
            raise StorageError(f"{destination} is there", errno=errno.EEXIST)
        self._accepted(source, b"RNFR " + command_path(source), b"RNTO " + command_path(destination))

    def check_readable(self, url: str) -> None:
        reply = self._ask(url, checksum_command(ChecksumAlgorithm.ADLER32, command_path(url), 1))
        if not reply.good:
            error = refusal(reply)
            if not lacks_checksum(error):
                raise error

    def size(self, url: str) -> int:
        return size_in(self._ask(url, b"SIZE " + command_path(url)))

    def version(self, url: StorageUrl) -> FileVersion:
        try:
            return super().version(url)
        except StorageError as error:
            self._check_greeting(error, url, FailureScope.SOURCE)
            raise

    # -- attributes

    def set_mtime(self, url: StorageUrl, mtime: int) -> None:
        self._accepted(url, mtime_command(command_path(url), mtime))

    def set_mode(self, url: StorageUrl, mode: int) -> None:
        self._accepted(url, mode_command(command_path(url), mode))

    # -- checksums

    def checksum(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        """From the server, or by reading the file if it does not compute the algorithm."""
        command = checksum_command(algorithm, command_path(url))
        reply = self._session.ask(url, command, timeouts=self.timeouts.with_slack())
        found = self._answered(algorithm, reply)
        if found is not None:
            return found
        self._log(f"{host_port(url)} computes no {algorithm}: the file is read")
        return self._checksum_by_reading(url, algorithm)

    def _checksum_by_reading(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        with contextlib.closing(self._downloads.content(url, command_path(url), self.timeouts, self._log)) as pieces:
            return checksum_of(algorithm, pieces)

    @staticmethod
    def _answered(algorithm: ChecksumAlgorithm, reply: Reply) -> str | None:
        """The checksum in a reply; None if the server does not compute the algorithm."""
        if reply.good:
            return checksum_in(algorithm, reply)
        error = refusal(reply)
        if lacks_checksum(error):
            return None
        raise error

    def checksums(
        self, source: StorageUrl, destination: StorageUrl, size: int, algorithm: ChecksumAlgorithm
    ) -> tuple[str, str]:
        if host_port(source) == host_port(destination):
            return super().checksums(source, destination, size, algorithm)
        urls = {FailureScope.SOURCE: source, FailureScope.DESTINATION: destination}
        replies: dict[FailureScope, Reply] = {}
        channels = {scope: scoped(scope, self._session.channel, url, self.timeouts) for scope, url in urls.items()}
        timeouts = self.timeouts.with_slack()

        def check() -> None:
            if len(replies) < len(urls):
                raise_refusal()

        def raise_refusal() -> None:
            for scope, reply in replies.items():
                if not reply.good and not lacks_checksum(error := refusal(reply)):
                    raise error.at(scope)

        if not computes_checksums(algorithm, *channels.values()):
            return super().checksums(source, destination, size, algorithm)
        for scope, url in urls.items():
            command = checksum_command(algorithm, command_path(url))
            channels[scope].send(command, _keeping(replies, scope), many_lines=True)
        # After an error the other checksum, which may take long, is not needed.
        self._session.run(tuple(channels.values()), timeouts, check)
        raise_refusal()
        found = [self._answered(algorithm, replies[scope]) for scope in urls]
        if None in found:
            return super().checksums(source, destination, size, algorithm)
        at_source, at_destination = (value or "" for value in found)
        return at_source, at_destination

    # -- transfers

    def transfer(
        self,
        source: StorageUrl,
        temporary: StorageUrl,
        size: int,
        checksum: ChecksumAlgorithm | None,
        arrived: ProgressCallback,
    ) -> str | None:
        command_path(source), command_path(temporary)
        transfer = ThirdPartyTransfer(self._session, source, temporary, self.timeouts, arrived, self._log)
        try:
            transfer.run(may_restart=partial(computes_checksums, ChecksumAlgorithm.ADLER32))
        except StorageError as error:
            if not transfer.begun:
                for scope, url in ((FailureScope.SOURCE, source), (FailureScope.DESTINATION, temporary)):
                    self._check_greeting(error, url, scope)
            if error.scope is None:
                error.scope = self._gone(source, temporary) if error.lost else FailureScope.TRANSFER
            raise
        if transfer.restarts and not checksum:
            at_source, at_destination = self.checksums(source, temporary, size, ChecksumAlgorithm.ADLER32)
            if at_source != at_destination:
                raise StorageError(
                    f"it was sent in {transfer.restarts + 1} parts: ADLER32 is {at_source} at the source and"
                    f" {at_destination} at the destination",
                    code=FailureCode.CHECKSUM_MISMATCH,
                    scope=FailureScope.TRANSFER,
                )
        return None

    def _check_greeting(self, error: StorageError, url: str, scope: FailureScope) -> None:
        """Report a server that accepts connections without ever sending a greeting as unreachable."""
        if error.code is FailureCode.STALLED and not greets(host_port(url), min(_GREETING_S, self.timeouts.stall_s)):
            message = f"{host_port(url)} accepts connections but sends no greeting; {error.message}"
            raise StorageError(message, code=FailureCode.CONNECTION, scope=scope, lost=True) from None

    def _gone(self, source: str, temporary: str) -> FailureScope:
        """The scope of a lost transfer: the end that does not answer any more; ``transfer`` if both do."""
        timeouts = Timeouts(_GONE_S, 0.0, min(self.timeouts.until, time.monotonic() + _GONE_S))
        for scope, url in ((FailureScope.SOURCE, source), (FailureScope.DESTINATION, temporary)):
            try:
                self._session.ask(url, b"SIZE " + command_path(url), timeouts=timeouts)
            except StorageError:
                return scope
        return FailureScope.TRANSFER

    # -- commands

    def _ask(self, url: str, *commands: bytes) -> Reply:
        return self._session.ask(url, *commands, timeouts=self.timeouts)

    def _accepted(self, url: str, *commands: bytes) -> None:
        reply = self._ask(url, *commands)
        if not reply.good:
            raise refusal(reply)

    def interrupt(self) -> None:
        self._session.interrupt()

    def resume(self) -> None:
        self._session.resume()


def command_path(url: str) -> bytes:
    """The path of a URL as its server expects it; raises `StorageError` if it contains CR LF.

    Servers take what is before CR LF as the whole path, which may be another file.
    """
    path = server_path(url)
    if b"\r\n" in path or b"\0" in path:
        raise StorageError(
            f"{url}: a GridFTP command cannot hold a name with CR LF or NUL",
            errno=errno.EILSEQ,
            code=FailureCode.INVALID_NAME,
        )
    return path


def _keeping(replies: dict[FailureScope, Reply], scope: FailureScope) -> Callable[[Reply], None]:
    def answered(reply: Reply) -> None:
        replies[scope] = reply

    return answered
