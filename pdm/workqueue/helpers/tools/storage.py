"""Any storage that gfal2 has a plugin for: the tools act, and our own client verifies.

If this service has a client of its own for a scheme (`NativeClients`), that client checks size, version, checksum, and
whether a name exists. Otherwise, or if it cannot talk to the server, ``gfal-stat``, ``gfal-sum`` and ``gfal-ls`` do.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Sequence
from typing import TypeVar

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.storage import (
    EntryIterator,
    FileStat,
    FileVersion,
    ProgressCallback,
    Storage,
    StorageError,
    Timeouts,
)
from pdm.workqueue.helpers.tools.gfal import MISSING, REMOVED, Gfal
from pdm.workqueue.helpers.tools.globus_url_copy import CopyListener, UrlPair, command_for
from pdm.workqueue.helpers.tools.native_clients import NativeClients, is_answer
from pdm.workqueue.helpers.tools.runner import Deadline, ToolRunner, tool_environment

_T = TypeVar("_T")
#: Results of one process that removes many files: URL → error, or None.
Removals = dict[str, StorageError | None]
#: Schemes between which globus-url-copy makes third-party transfers.
GRIDFTP_SCHEMES = frozenset({"gsiftp", "ftp"})
#: Servers send their markers every 5 s: two of them may be missed.
_LEAST_MARKER_STALL_S = 11.0
#: Maximum entries of a directory that are kept to compare the output of gfal-ls with our own client's listing.
_MOST_COMPARED = 100_000
#: Maximum differences that are reported one by one.
_MOST_TOLD = 20
_DESTINATION_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EEXIST})


class ToolStorage(Storage):
    """The storage access of one thread.

    Attributes:
        acts_natively: whether our own client removes and renames, if there is one: a tool for each of the small steps
            around a copy would cost more than the copy.
    """

    def __init__(self, natives: NativeClients, removals: Removals) -> None:
        self._log: Callable[[str], None] = lambda line: None
        self.acts_natively = False
        self.runner = ToolRunner()
        self._natives = natives
        self._clients: dict[str, Storage | None] = {}
        self._is_interrupted = False
        self._gfal = Gfal(self.runner, tool_environment, self._write, self._deadline)
        self._removals = removals

    @property
    def timeouts(self) -> Timeouts:
        return self._timeouts

    @timeouts.setter
    def timeouts(self, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        for client in self._clients.values():
            if client is not None:
                client.timeouts = timeouts

    def log_to(self, write: Callable[[str], None]) -> None:
        self._log = write

    def _write(self, line: str) -> None:
        if line.strip():
            self._log(line)

    def _deadline(self, more_s: float = 0.0) -> Deadline:
        return Deadline(self.timeouts.stall_s + more_s, self.timeouts.until)

    # -- our own client first, and a tool if there is none or it cannot talk to the server

    def _client(self, url: StorageUrl) -> Storage | None:
        scheme = url.scheme
        if scheme not in self._clients:
            client = self._clients[scheme] = self._natives.made_for(scheme)
            if client is not None:
                client.timeouts = self.timeouts
                if self._is_interrupted:
                    client.interrupt()
        return self._clients[scheme] if self._natives.may_talk_to(url) else None

    def _known(self, url: StorageUrl, ask: Callable[[Storage], _T], tool: Callable[[], _T]) -> _T:
        client = self._client(url)
        if client is None:
            return tool()
        try:
            return ask(client)
        except StorageError as error:
            if is_answer(error):
                raise
            self._log(f"our own client failed ({error.message.splitlines()[0][:200]}): a tool is used")
            try:
                answer = tool()
            except StorageError as of_tool:
                # The error of our own client is more precise, unless the tool has reported an error of the file.
                raise of_tool if of_tool.errno is not None else error from None
            self._natives.give_up(url)
            return answer

    def stat(self, url: StorageUrl) -> FileStat | None:
        return self._known(url, lambda client: client.stat(url), lambda: self._gfal.stat(url))

    def real_path(self, url: StorageUrl, there: FileStat) -> bytes | None:
        client = self._client(url)
        return there.target if client is None else client.real_path(url, there)

    def link_at(self, url: StorageUrl, *, listed: bool) -> str | None:
        client = self._client(url)
        return None if client is None else client.link_at(url, listed=listed)

    def size(self, url: StorageUrl) -> int:
        return self._known(url, lambda client: client.size(url), lambda: self._there(url).size)

    def version(self, url: StorageUrl) -> FileVersion:
        return self._known(url, lambda client: client.version(url), lambda: self._version_by_tool(url))

    def attributes(self, url: StorageUrl) -> FileStat:
        client = self._client(url)
        return super().attributes(url) if client is None else client.attributes(url)

    def set_mtime(self, url: StorageUrl, mtime: int) -> None:
        # The tools have no command for it.
        client = self._client(url)
        if client is None:
            super().set_mtime(url, mtime)
        else:
            client.set_mtime(url, mtime)

    def set_mode(self, url: StorageUrl, mode: int) -> None:
        client = self._client(url)
        if client is None:
            super().set_mode(url, mode)
        else:
            client.set_mode(url, mode)

    def checksum(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        return self._known(
            url, lambda client: client.checksum(url, algorithm), lambda: self._gfal.checksum(url, algorithm)
        )

    def check_readable(self, url: StorageUrl) -> None:
        client = self._client(url)
        if client is not None:
            client.check_readable(url)

    def _version_by_tool(self, url: StorageUrl) -> FileVersion:
        there = self._there(url)
        if there.kind == "directory":
            # globus-url-copy would report an unreadable file.
            raise StorageError(f"{url} is a directory", errno=errno.EISDIR)
        return FileVersion(there.size, there.mtime)

    def _there(self, url: StorageUrl) -> FileStat:
        there = self._gfal.stat(url)
        if there is None:
            raise StorageError(f"{url} does not exist", errno=errno.ENOENT)
        return there

    # -- listings

    def entries(self, url: StorageUrl) -> EntryIterator:
        """The output of gfal-ls, corrected by our own client if there is one.

        gfal-ls reports links as their targets and pipes as files, and ends at names that it cannot handle.
        """
        client = self._client(url)
        if client is None or self.acts_natively:
            yield from self._gfal.entries(url) if client is None else client.entries(url)
            return
        shown: dict[bytes, FileStat] = {}
        failure: StorageError | None = None
        try:
            with contextlib.closing(self._gfal.entries(url)) as entries:
                for name, file_stat in entries:
                    if len(shown) < _MOST_COMPARED:
                        shown[name] = file_stat
        except StorageError as error:
            if error.code in ("DEPENDENCY_MISSING", "STALLED", "TIMEOUT"):
                raise
            failure = error
            self._log(f"gfal-ls stopped after {len(shown)} entries: our own client lists the directory")
        begun = False
        differences = 0
        try:
            with contextlib.closing(client.entries(url)) as found:
                for name, file_stat in found:
                    begun = True
                    said = shown.pop(name, None)
                    if (said is None and failure is None) or (said is not None and said.kind != file_stat.kind):
                        differences += 1
                        self._tell_difference(differences, name, said, file_stat)
                    yield name, file_stat
        except StorageError as error:
            if begun or is_answer(error):
                raise
            self._log(f"our own client cannot list ({error.message.splitlines()[0][:200]}): using gfal-ls")
            if failure is not None:
                raise failure from None
            self._natives.give_up(url)
            yield from shown.items()
            return
        if differences > _MOST_TOLD:
            self._log(f"gfal-ls shows {differences} entries wrongly, or not at all")
        self.unnamed = client.unnamed

    def _tell_difference(self, number: int, name: bytes, said: FileStat | None, file_stat: FileStat) -> None:
        if number <= _MOST_TOLD:
            what = "does not show it" if said is None else f"calls it a {said.kind}"
            self._log(f"{name!r} is a {file_stat.kind}: gfal-ls {what}")

    # -- changes

    def make_directory(self, url: StorageUrl) -> None:
        client = self._client(url)
        if self.acts_natively and client is not None:
            client.make_directory(url)
            return
        # Some servers make parents, too, and report success for an existing directory.
        if self.stat(url) is not None:
            raise StorageError(f"{url} is there", errno=errno.EEXIST)
        parent = url.parent
        if parent != url and self.stat(parent) is None:
            raise StorageError(f"{parent} does not exist", errno=errno.ENOENT)
        error = self._error_of(lambda: self._gfal.make_directory(url))
        there = self.stat(url) if error is None or error.errno is None else None
        if there is None or there.kind != "directory":
            raise error or StorageError(
                f"gfal-mkdir reports success, but {url} is no directory", code=FailureCode.SERVER_ERROR
            )

    def remove(self, url: StorageUrl, *, directory: bool) -> None:
        client = self._client(url)
        if client is not None and (self.acts_natively or directory):
            # gfal-rm removes a directory only with its content, whatever that is by then.
            client.remove(url, directory=directory)
        elif directory:
            self._remove_directory(url)
        else:
            if url not in self._removals:
                if self.stat(url) is None:
                    raise StorageError(f"{url} does not exist", errno=errno.ENOENT)
                self.remove_files([url])
            error = self._removals.pop(url)
            is_there = self.stat(url) is not None
            if is_there and (error is None or error.errno == errno.ENOENT):
                raise StorageError(f"gfal-rm reports success, but {url} exists", code=FailureCode.SERVER_ERROR)
            if error is not None and (is_there or error.errno == errno.ENOENT):
                raise error

    def _remove_directory(self, url: StorageUrl) -> None:
        with contextlib.closing(self._gfal.entries(url)) as entries:
            if next(entries, None) is not None:
                raise StorageError(f"{url} is not empty", errno=errno.ENOTEMPTY)
        error = self._error_of(lambda: self._gfal.remove_directory(url))
        if self.stat(url) is not None:
            raise error or StorageError(f"gfal-rm reports success, but {url} exists", code=FailureCode.SERVER_ERROR)

    def remove_files(self, urls: Sequence[StorageUrl]) -> None:
        """Remove files with one process; it may end early, and `remove` reports the outcome of each."""
        left = list(urls)
        while left:
            told: dict[str, str] = {}
            error = self._gfal.remove_files(left, told.__setitem__)
            for url, word in told.items():
                if word == MISSING:
                    self._removals[url] = StorageError(f"{url} does not exist", errno=errno.ENOENT)
                else:
                    self._removals[url] = None if word == REMOVED else error
            if not told.keys() & set(left):
                # No result for any file: the first one is checked, the others are tried again.
                self._removals[left[0]] = error or StorageError(
                    "gfal-rm reported no result", code=FailureCode.SERVER_ERROR
                )
            left = [url for url in left if url not in self._removals]

    def rename(self, source: StorageUrl, destination: StorageUrl, *, replace: bool) -> None:
        client = self._client(source)
        if self.acts_natively and client is not None:
            client.rename(source, destination, replace=replace)
            return
        # gfal-rename replaces silently.
        if not replace and self.stat(destination) is not None:
            raise StorageError(f"{destination} is there", errno=errno.EEXIST)
        error = self._error_of(lambda: self._gfal.rename(source, destination))
        if error is not None and error.errno is not None:
            raise error
        if self.stat(destination) is None or self.stat(source) is not None:
            raise error or StorageError(
                f"gfal-rename reports success, but {source} does not have its new name", code=FailureCode.SERVER_ERROR
            )

    @staticmethod
    def _error_of(act: Callable[[], object]) -> StorageError | None:
        """The error that a tool reports; the actual result is checked."""
        try:
            act()
        except StorageError as error:
            if error.code in ("DEPENDENCY_MISSING", "STALLED", "TIMEOUT"):
                raise
            return error
        return None

    # -- copies

    def transfer(
        self,
        source: StorageUrl,
        temporary: StorageUrl,
        size: int,
        checksum: ChecksumAlgorithm | None,
        arrived: ProgressCallback,
    ) -> str | None:
        """With gfal-copy; lists of files between GridFTP servers are copied by `transfer_list`."""
        stall_s = max(self.timeouts.stall_s, _LEAST_MARKER_STALL_S)
        deadline = Deadline(stall_s + self.timeouts.slack_s, self.timeouts.until)
        complaint: StorageError | None = None
        try:
            self._gfal.copy(source, temporary, deadline, arrived)
        except StorageError as error:
            complaint = error
        failure = self.confirmed(complaint, UrlPair(0, source, temporary, size))
        if failure is not None:
            raise failure
        return None

    def transfer_list(
        self,
        pairs: Sequence[UrlPair],
        log: Callable[[int, str], None],
        begun: Callable[[UrlPair], Timeouts],
        arrived: Callable[[int, int], None],
    ) -> dict[int, StorageError | None]:
        """Copy files between two GridFTP servers with one globus-url-copy.

        Args:
            pairs: the files.
            log: called with the key of a file and a line about it.
            begun: called with the file that begins; returns its time limit.
            arrived: called with the key of a file and the number of bytes that have arrived.

        Returns:
            The tool's errors by key: a file may be complete in spite of one. Files without a key were not started.

        Raises:
            StoppedError: `interrupt` was called.
            StorageError: it could not be started.
        """
        first = pairs[0]
        deadline = self._deadline()

        def on_begun(pair: UrlPair) -> None:
            timeouts = begun(pair)
            deadline.stall_s = max(timeouts.stall_s, _LEAST_MARKER_STALL_S)
            deadline.until = timeouts.until

        listener = CopyListener(pairs, deadline, on_begun, log, arrived)
        command = command_for(pairs, tool_environment([first.source, first.temporary]))
        log(first.key, f"$ {' '.join(command.arguments[2:-1])} (a list of {len(pairs)} pairs of URLs)")
        try:
            return listener.outcomes(self.runner.run(command, deadline, listener.heard))
        except StorageError as error:
            return listener.outcomes_so_far(error)

    def confirmed(self, complaint: StorageError | None, pair: UrlPair) -> StorageError | None:
        """Check the tool's report of a copy.

        Returns:
            None if the file can be verified: an error is dropped if size and checksum agree. Else the error with its
            scope.
        """
        if complaint is None:
            try:
                self.size(pair.temporary)
            except StorageError as error:
                if error.errno != errno.ENOENT:
                    return error.at(FailureScope.DESTINATION)
                return StorageError(
                    "the tool reports success, but nothing has arrived", code=FailureCode.CHECKSUM_MISMATCH
                )
            return None
        if complaint.code == "DEPENDENCY_MISSING":
            return complaint
        with contextlib.suppress(StorageError):
            # A checksum reads the whole file: only of a complete one.
            urls = (pair.source, pair.temporary) if self.size(pair.temporary) == pair.size else ()
            if len({self.checksum(url, ChecksumAlgorithm.ADLER32) for url in urls}) == 1:
                self._log("the tool has reported a failure, but the file is complete: size and checksum agree")
                return None
        return self._blamed(complaint, pair)

    def _blamed(self, complaint: StorageError, pair: UrlPair) -> StorageError:
        """The error with its scope: tools do not report which server has failed."""
        if complaint.scope is not None:
            return complaint
        if complaint.code is not None and complaint.errno is None:
            return complaint.at(FailureScope.TRANSFER)
        if complaint.errno in _DESTINATION_ERRNOS:
            return complaint.at(FailureScope.DESTINATION)
        servers = {
            FailureScope.SOURCE: pair.source.address,
            FailureScope.DESTINATION: pair.temporary.address,
        }
        if len(set(servers.values())) > 1:
            for scope, server in servers.items():
                if server in complaint.message:
                    return complaint.at(scope)
        for scope, ask in (
            (FailureScope.SOURCE, self._read_source),
            (FailureScope.DESTINATION, self._ask_destination),
        ):
            try:
                ask(pair)
            except StorageError as error:
                return error.at(scope)
        return complaint.at(FailureScope.DESTINATION if complaint.errno is not None else FailureScope.TRANSFER)

    def _read_source(self, pair: UrlPair) -> None:
        self.version(pair.source)
        self.check_readable(pair.source)

    def _ask_destination(self, pair: UrlPair) -> None:
        self.stat(pair.temporary.parent)

    def interrupt(self) -> None:
        self._is_interrupted = True
        self.runner.interrupt()
        for client in list(self._clients.values()):
            if client is not None:
                client.interrupt()

    def resume(self) -> None:
        self._is_interrupted = False
        self.runner.resume()
        for client in self._clients.values():
            if client is not None:
                client.resume()
