"""GridFTP servers as a storage: third-party transfers, checksums and listings on sessions of the Globus library."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import threading
import time
from collections.abc import Callable
from ctypes import byref, c_int64, c_size_t, c_void_p
from typing import Any
from urllib.parse import unquote_to_bytes

from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.credentials import trusting
from pdm.workqueue.helpers.gridftp.control import greets
from pdm.workqueue.helpers.gridftp.globus import Globus
from pdm.workqueue.helpers.gridftp.globus_session import Session
from pdm.workqueue.helpers.gridftp.replies import lacks_checksum, read_entry, read_listing
from pdm.workqueue.helpers.storage import (
    EntryIterator,
    FileStat,
    FileVersion,
    ProgressCallback,
    Storage,
    StorageError,
    Timeouts,
    parent_url,
    scoped,
)

#: From this size on, both ends compute their checksums at the same time.
_LARGE = 16 * 1024 * 1024
#: Seconds to wait for a server that shall connect to us for the first time.
_FIRST_LISTING_S = 5.0
#: Seconds that a server may take to greet.
_GREETING_S = 10.0
#: Seconds that a look at a file that is arriving may take.
_MEASURE_S = 5.0
_CHECKSUM_BUFFER = 64 * 1024
_LINE_BREAK = re.compile(r"%0[AaDd]")
_ADLER32 = re.compile(r"[0-9a-fA-F]{1,8}\Z")
_DESTINATION_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


class GridFtpStorage(Storage):
    """One lane's sessions with GridFTP servers."""

    def __init__(self, globus: Globus) -> None:
        self._globus = globus
        self._session = Session(globus)
        #: For what goes on beside the first; made when it is needed.
        self._aside: Session | None = None

    def stat(self, url: str) -> FileStat | None:
        try:
            return self._stat_by_listing(url) if _LINE_BREAK.search(url) else self._stat(url)
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def _stat(self, url: str, session: Session | None = None) -> FileStat:
        buffer, length = c_void_p(), c_size_t()
        arguments = _encoded(url), byref(self._session.attributes), byref(buffer), byref(length)
        self._run("mlst", *arguments, session=session)
        line = ctypes.string_at(buffer, length.value)
        self._globus.library.free(buffer.value)
        return read_entry(line.strip(b"\r\n")).file_stat

    def _stat_by_listing(self, url: str) -> FileStat:
        """What is there, for a path with a line break: the reply to MLST holds the path, and would end at the break.

        A listing comes over the data channel. It is that of the folder above: only there a link shows as one, and a
        link that was taken for a directory would cost its target in a removal.
        """
        # Most often nothing is there, which is found out without reading the folder.
        try:
            self.size(url)
        except StorageError as error:
            if error.lost or error.errno == errno.ENOENT:
                raise
        folder, _, name = url.rstrip("/").rpartition("/")
        wanted = unquote_to_bytes(name)
        with contextlib.closing(self.entries(folder + "/")) as found:
            for one, file_stat in found:
                if one == wanted:
                    return file_stat
        raise StorageError(f"{url} is not in its folder", errno=errno.ENOENT)

    def entries(self, url: str) -> EntryIterator:
        host = _host(url)
        listing = self._listing(url)
        begun = False
        try:
            for entry in listing:
                begun = True
                yield entry
        except StorageError as error:
            if begun or error.errno is not None or error.code not in (None, "STALLED"):
                raise
            if host in self._globus.lists_kept and not (error.lost and error.code is None):
                raise
            self._session.drop()
            if host not in self._globus.lists_kept:
                # Nothing came, and nothing ever came this way: it may be a firewall that is in the way.
                self._globus.lists_stream.add(host)
            yield from self._listing(url)
        finally:
            listing.close()

    def _listing(self, url: str) -> EntryIterator:
        host = _host(url)
        stream = host in self._globus.lists_stream
        stall_s = self.timeouts.stall_s
        if not stream and host not in self._globus.lists_kept:
            stall_s = min(stall_s, _FIRST_LISTING_S)
        pieces = self._session.listing(_encoded(url), stall_s, self.timeouts.until, stream=stream)
        seen, counted = 0, 0
        # Each data connection is a login, too.
        with trusting(host), contextlib.closing(pieces):
            for line in read_listing(pieces):
                seen += 1
                if line.role:
                    counted = line.counted or counted
                else:
                    yield line.name, line.file_stat
        self.unnamed = max(counted - seen, 0)
        if not stream:
            self._globus.lists_kept.add(host)

    def make_directory(self, url: str) -> None:
        self._run("mkdir", _encoded(url), byref(self._session.attributes))

    def remove(self, url: str, *, directory: bool) -> None:
        self._run("rmdir" if directory else "delete", _encoded(url), byref(self._session.attributes))

    def rename(self, source: str, destination: str, *, replace: bool) -> None:
        # The server's rename replaces files without a word.
        if not replace and self.stat(destination) is not None:
            raise StorageError(f"{destination} is there", errno=errno.EEXIST)
        self._run("move", _encoded(source), _encoded(destination), byref(self._session.attributes))

    def check_readable(self, url: str) -> None:
        try:
            self._digest(self._session, url, 1)
        except StorageError as error:
            if not lacks_checksum(error):
                raise

    def transfer(self, source: str, temporary: str, size: int, checksum: bool, arrived: ProgressCallback) -> str | None:
        answers = True

        def measure() -> int | None:
            nonlocal answers
            length = self._length_so_far(temporary) if answers else None
            # A server that does not answer once is not asked again: that would keep us from the transfer itself.
            answers = length is not None
            return length

        began = False

        def arriving(total: int) -> None:
            nonlocal began
            began = True
            arrived(total)

        def once() -> None:
            self._connect(source, temporary)
            self._session.transfer(
                _encoded(source),
                _encoded(temporary),
                self.timeouts.stall_s,
                self.timeouts.until,
                arriving,
                measure,
            )

        try:
            self._twice_if_dead(self._session, once)
        except StorageError as error:
            if not began:
                for scope, url in (("source", source), ("destination", temporary)):
                    self._check_greeting(error, url, scope)
            raise self._blamed(error, source, temporary) from None
        return None

    def version(self, url: StorageUrl) -> FileVersion:
        try:
            return super().version(url)
        except StorageError as error:
            self._check_greeting(error, url, "source")
            raise

    def _check_greeting(self, error: StorageError, url: str, scope: str) -> None:
        """Call a server that says nothing to anybody what it is as good as: one that cannot be reached."""
        if error.code == "STALLED" and not greets(_host(url), min(_GREETING_S, self.timeouts.stall_s)):
            message = f"{_host(url)} takes connections and says nothing; {error.message}"
            raise StorageError(message, code="CONNECTION", scope=scope, lost=True) from None

    def _connect(self, source: str, temporary: str) -> None:
        """Log in to both ends before a transfer, where each has authorities of its own; the connections are kept."""
        if not os.environ.get("PDM_TRUST"):
            return
        attributes, size = byref(self._session.attributes), c_int64(-1)
        scoped("source", self._run, "size", _encoded(source), attributes, byref(size), session=self._session)
        scoped("destination", self._stat, parent_url(temporary), self._session)

    def _length_so_far(self, temporary: str) -> int | None:
        """Bytes of a file that is arriving; None if the server does not say at once."""
        aside = self._beside()
        length = c_int64(-1)
        try:
            arguments = _encoded(temporary), byref(aside.attributes), byref(length)
            with trusting(_host(temporary)):
                aside.run("size", *arguments, stall_s=_MEASURE_S, until=self.timeouts.until)
        except StorageError:
            return None
        return length.value

    def _beside(self) -> Session:
        """The session for what goes on beside a transfer or checksum; being open, it also cleans up sooner."""
        if self._aside is None:
            self._aside = Session(self._globus)
        return self._aside

    def _blamed(self, error: StorageError, source: str, temporary: str) -> StorageError:
        """The trouble of a transfer with its scope: replies do not tell which server they are from."""
        if error.code is not None:
            return error.at("transfer")
        if error.errno in _DESTINATION_ERRNOS:
            return error.at("destination")
        for scope, url in (("source", source), ("destination", temporary)):
            if re.search(rf"\b{re.escape(_host(url))}\b", error.message) and _host(source) != _host(temporary):
                return error.at(scope)
        if error.lost:
            return error.at(self._gone(source, temporary))
        try:
            self.check_readable(source)
        except StorageError as at_source:
            return at_source.at("source")
        return error.at("destination" if error.errno is not None else "transfer")

    def _gone(self, source: str, temporary: str) -> str:
        """Which end of a transfer whose connections have ended does not answer any more; ``transfer`` if both do."""
        timeouts = self.timeouts
        self.timeouts = Timeouts(_MEASURE_S, 0.0, min(timeouts.until, time.monotonic() + _MEASURE_S))
        try:
            for scope, url in (("source", source), ("destination", temporary)):
                try:
                    self.size(url)
                except StorageError as error:
                    # With an error number it is what a server says about the file.
                    if error.errno is None:
                        return scope
        finally:
            self.timeouts = timeouts
        return "transfer"

    def size(self, url: str) -> int:
        size = c_int64(-1)
        self._run("size", _encoded(url), byref(self._session.attributes), byref(size))
        if size.value < 0:
            raise StorageError(f"the server gives a size of {size.value} bytes", code="BAD_LISTING")
        return size.value

    def checksum(self, url: str) -> str:
        return self._checksum(self._session, url)

    def checksums(self, source: StorageUrl, destination: StorageUrl, size: int) -> tuple[str, str]:
        if size < _LARGE:
            return super().checksums(source, destination, size)
        aside = self._beside()
        outcome: list[str | BaseException] = []

        def at_source() -> None:
            try:
                outcome.append(scoped("source", self._checksum, aside, source))
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=at_source, name="checksum")
        thread.start()
        try:
            at_destination = scoped("destination", self.checksum, destination)
        except BaseException:
            # Nobody will want the other checksum.
            aside.interrupt()
            raise
        finally:
            thread.join()
            aside.resume()
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0], at_destination

    def _checksum(self, session: Session, url: str) -> str:
        try:
            digest = self._digest(session, url, -1)
        except StorageError as error:
            if lacks_checksum(error):
                raise StorageError(
                    f"the server computes no ADLER32 checksums: {error.message}", code="NO_CHECKSUM"
                ) from None
            raise
        if not _ADLER32.match(digest):
            raise StorageError(f"the server's checksum is no ADLER32: {digest[:80]!r}", code="NO_CHECKSUM")
        return digest.lower().zfill(8)

    def _digest(self, session: Session, url: str, length: int) -> str:
        """ADLER32 of the first ``length`` bytes, -1 for all."""
        buffer = ctypes.create_string_buffer(_CHECKSUM_BUFFER)
        arguments = (_encoded(url), byref(session.attributes), buffer, 0, length, b"ADLER32")
        self._run("cksm", *arguments, session=session, slack_s=self.timeouts.slack_s)
        return buffer.value.decode("ascii", "replace").strip()

    def _run(self, name: str, *arguments: Any, session: Session | None = None, slack_s: float = 0.0) -> None:
        if session is None:
            # After a transfer that was cut short only the other may still have its connections.
            other = self._aside is not None and self._aside.connected and not self._session.connected
            session = self._aside if other and self._aside is not None else self._session
        chosen = session

        def once() -> None:
            with trusting(_host(arguments[0].decode("ascii"))):
                chosen.run(name, *arguments, stall_s=self.timeouts.stall_s + slack_s, until=self.timeouts.until)

        self._twice_if_dead(chosen, once)

    @staticmethod
    def _twice_if_dead(session: Session, once: Callable[[], None]) -> None:
        """Do something, and once more on new connections if the kept ones turn out to have been closed meanwhile."""
        may_be_dead = session.may_be_dead
        try:
            once()
        except StorageError as error:
            if not (error.lost and error.code is None and may_be_dead):
                raise
            session.drop()
            once()

    def interrupt(self) -> None:
        self._session.interrupt()
        if self._aside is not None:
            self._aside.interrupt()

    def resume(self) -> None:
        self._session.resume()
        if self._aside is not None:
            self._aside.resume()

    def drop(self) -> None:
        """Close the connections."""
        self._session.drop()
        if self._aside is not None:
            self._aside.drop()


def _encoded(url: str) -> bytes:
    return url.encode("ascii")


def _host(url: str) -> str:
    """``host:port`` of a URL, as the library writes it."""
    return url.split("/", 3)[2].rpartition("@")[2]
