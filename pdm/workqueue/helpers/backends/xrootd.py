"""XRootD servers as a storage backend: third-party copies with a delegated proxy, else streamed through the service.

``X509_USER_PROXY`` names the proxy, ``X509_CERT_DIR`` and ``PDM_TRUST`` the authorities that servers are verified
against. The client is XRootD's own, in worker processes that keep their connections; only the workers for third-party
copies delegate the proxy.

Servers report success for creating an existing directory, replace the destination of a rename, and remove an empty
directory like a file. So a stat precedes each such request.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import secrets
import time
from collections.abc import Iterator
from typing import cast

from pdm.workqueue.domain.enums import ChecksumAlgorithm, JobProtocol
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends.xrootd_session import XrootdSession, frames, missing_software
from pdm.workqueue.helpers.checksums import from_hexadecimal
from pdm.workqueue.helpers.credentials import trust_at
from pdm.workqueue.helpers.storage import (
    EntryIterator,
    FileKind,
    FileStat,
    ProgressCallback,
    StorageError,
    Timeouts,
    at_destination,
    at_source,
    link_to_directory,
)
from pdm.workqueue.helpers.storage_backend import Pieces, WakeableBackend

#: Smaller files are streamed even if servers could copy: a third-party copy starts a program that logs in.
_SMALL = 4 * 1024 * 1024
_HOST = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?", re.ASCII)
#: Names that can be written into the query of another name.
_PLAIN = re.compile(r"[^?&=#%+\s\x00-\x1f\x7f]+")
#: Errors of a third-party copy that a streamed copy may not have.
_BETWEEN_SERVERS = (FailureCode.CREDENTIAL_REFUSED, FailureCode.CERTIFICATE, FailureCode.UNSUPPORTED)
_SPACE = re.compile(r"oss\.(free|used|quota)=(-1|[0-9]{1,19})(?![0-9])", re.ASCII)
#: Entries after which a worker is replaced: the library (5.5) leaks some 200 bytes for each.
_MOST_LISTED = 200_000
#: Message of a server that could not compute a checksum.
_SERVER_ERROR = 3012
#: Seconds without a byte after which both servers are probed, and timeout of the probe.
_SUSPICIOUS_S, _SOON_S = 2.0, 3.0
#: Minimum seconds to wait for the first byte: the destination starts a program that logs in at the source.
_BEGIN_S = 20.0


class XrootdBackend(WakeableBackend):
    """The workers of one thread."""

    def __init__(self) -> None:
        super().__init__()
        self._workers: dict[tuple[str, int], XrootdSession] = {}
        #: Directory of authorities → the worker that delegates.
        self._delegating: dict[str | None, XrootdSession] = {}
        #: Server → whether it pulls files with a delegated proxy.
        self._pulls: dict[str, bool] = {}
        #: Pairs of servers whose destination could not log in at the source.
        self._no_third_party: set[tuple[str, str]] = set()

    @classmethod
    def missing_software(cls) -> str | None:
        return missing_software()

    # -- names

    def stat(self, url: StorageUrl) -> FileStat | None:
        server, path = server_and_path(url)
        try:
            return file_stat_of(self._worker(server).call("look", server=server, path=path))
        except StorageError as error:
            if error.errno == errno.ENOENT:
                return None
            raise

    def entries(self, url: StorageUrl) -> EntryIterator:
        server, path = server_and_path(url.without_slash)
        worker = self._worker(server)
        try:
            worker.begin("entries", server=server, path=path)
            for content in frames(worker, b"E"):
                self.check()
                found = json.loads(content)
                worker.listed += len(found)
                for name, told in found:
                    if told is None:
                        raise StorageError(
                            f"{url}: the server has no information about {name[:200]!r}", code=FailureCode.BAD_LISTING
                        )
                    yield name.encode("utf-8", "surrogateescape"), file_stat_of(told)
        except StorageError as error:
            if error.code == FailureCode.BAD_LISTING:
                raise StorageError(
                    f"{url}: a name here cannot be told from the server's answer ({error.message})",
                    code=FailureCode.BAD_LISTING,
                ) from error
            raise
        finally:
            self._let_go(worker)

    def make_directory(self, url: StorageUrl) -> None:
        server, path = server_and_path(url)
        if self.stat(url) is not None:
            raise StorageError(f"{url} is there", errno=errno.EEXIST)
        above = self.existing(url.parent)
        if above.kind != "directory":
            raise StorageError(f"{url.parent} is not a directory", errno=errno.ENOTDIR)
        self._worker(server).call("make", server=server, path=path)

    def link_at(self, url: StorageUrl, *, listed: bool) -> str | None:
        """``rmdir`` removes neither a directory that is not empty nor a link to a directory: the errors differ."""
        server, path = server_and_path(url)
        try:
            self._worker(server).call("remove_directory", server=server, path=path)
        except StorageError as error:
            if error.errno == errno.ENOTDIR:
                return link_to_directory(url)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
        return None

    def remove(self, url: StorageUrl, *, directory: bool) -> None:
        server, path = server_and_path(url)
        try:
            there = self.stat(url)
        except StorageError as error:
            if error.errno != errno.ELOOP:
                raise
            there = None
        if there is not None and there.kind == "directory" and not directory:
            raise StorageError(f"{url} is a directory", errno=errno.EISDIR)
        if directory and there is None:
            raise StorageError(f"{url} does not exist", errno=errno.ENOENT)
        if there is not None and there.kind != "directory" and directory:
            raise StorageError(f"{url} is not a directory", errno=errno.ENOTDIR)
        # A dangling link has no stat, but can be removed.
        try:
            self._worker(server).call("remove_directory" if directory else "remove", server=server, path=path)
        except StorageError as error:
            if directory and error.errno == errno.ENOTDIR:
                raise StorageError(link_to_directory(url), code=FailureCode.UNSUPPORTED) from error
            if directory and error.errno == errno.EEXIST:
                # Some servers have only one error for both.
                raise StorageError(f"{url} is not empty", errno=errno.ENOTEMPTY) from error
            raise

    def rename(self, source: StorageUrl, destination: StorageUrl, *, replace: bool) -> None:
        server, path = server_and_path(source)
        _, to = server_and_path(destination)
        if not replace and self.stat(destination) is not None:
            raise StorageError(f"{destination} is there", errno=errno.EEXIST)
        self._worker(server).call("rename", server=server, path=path, to=to)

    def size(self, url: StorageUrl) -> int:
        return self.existing(url).size

    def set_mode(self, url: StorageUrl, mode: int) -> None:
        server, path = server_and_path(url)
        self._worker(server).call("change_mode", server=server, path=path, mode=mode)

    def checksum(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        """From the server, or by reading the file if it has none."""
        server, path = server_and_path(url)
        name = algorithm.lower()
        worker = self._worker(server)
        # The server reads the whole file before it responds.
        worker.timeouts = self.timeouts.with_slack()
        try:
            said, _, value = worker.call("checksum", server=server, path=path, algorithm=name).partition(" ")
            # A server may answer with an algorithm of its own choice.
            found = from_hexadecimal(algorithm, value) if said.lower() == name else None
        except StorageError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL) and getattr(error, "number", 0) != _SERVER_ERROR:
                raise
            found = None
        return found or super().checksum(url, algorithm)

    def free_bytes(self, directory_url: StorageUrl) -> int | None:
        # The answer about a path that does not exist is not valid (5.5: free=0).
        self.existing(directory_url)
        server, path = server_and_path(directory_url)
        found = dict(_SPACE.findall(self._worker(server).call("space", server=server, path=path)))
        free, used, quota = (int(found.get(name, -1)) for name in ("free", "used", "quota"))
        if quota >= 0 and used >= 0:
            free = min(free, max(quota - used, 0))
        return free if free >= 0 else None

    # -- bytes

    def read(self, url: StorageUrl) -> Pieces:
        server, path = server_and_path(url)
        worker = self._worker(server)
        try:
            worker.begin("read", server=server, path=path)
            yield from frames(worker, b"D")
        finally:
            self._let_go(worker)

    def write(self, url: StorageUrl, pieces: Iterator[bytes], size: int) -> None:
        server, path = server_and_path(url)
        worker = self._worker(server)
        try:
            worker.begin("write", server=server, path=path, size=size)
            self._expect(worker, b"D")
            for piece in pieces:
                worker.timeouts = self.timeouts
                worker.send(b"D", piece)
                if worker.has_answer():
                    # The server gives no reason.
                    break
            else:
                worker.send(b"Z", b"")
            for _ in frames(worker, b"D"):
                pass
        finally:
            self._let_go(worker)

    @staticmethod
    def _expect(worker: XrootdSession, kind: bytes) -> None:
        found, content = worker.next()
        if found != kind:
            worker.answer(content)

    def transfer(
        self,
        source: StorageUrl,
        temporary: StorageUrl,
        size: int,
        checksum: ChecksumAlgorithm | None,
        arrived: ProgressCallback,
    ) -> str | None:
        pair = (at_source(server_and_path, source)[0], at_destination(server_and_path, temporary)[0])
        if size >= _SMALL and pair not in self._no_third_party and self._can_pull(source, temporary):
            try:
                at_destination(self._pull, source, temporary, size, arrived)
            except StorageError as error:
                if error.scope != FailureScope.DESTINATION or error.code not in _BETWEEN_SERVERS:
                    raise
                # We can read the source; the destination cannot reach it or log in there.
                self._no_third_party.add(pair)
                with contextlib.suppress(StorageError):
                    self.remove(temporary, directory=False)
            else:
                return None
        return super().transfer(source, temporary, size, checksum, arrived)

    def _can_pull(self, source: StorageUrl, temporary: StorageUrl) -> bool:
        """Whether the destination can pull, and can be given the name of this file."""
        server, path = server_and_path(temporary)
        if not _PLAIN.fullmatch(server_and_path(source)[1]) or not _PLAIN.fullmatch(path):
            return False
        if server not in self._pulls:
            try:
                told = at_destination(
                    self._worker(server).call, "configuration", server=server, names="tpc tpcdlg"
                ).split("\n")
            except StorageError as error:
                if error.errno is None:
                    raise
                told = []
            self._pulls[server] = len(told) > 1 and told[0] == "1" and "gsi" in told[1].split(",")
        return self._pulls[server]

    def _pull(self, source: StorageUrl, temporary: StorageUrl, size: int, arrived: ProgressCallback) -> None:
        server, path = server_and_path(temporary)
        _, origin_path = server_and_path(source)
        host = source.authority
        if not source.port:
            host += f":{JobProtocol.XROOT.info.default_port}"
        cgi = {
            "oss.asize": str(size),
            "tpc.dlg": host,
            "tpc.dlgon": "1",
            "tpc.key": secrets.token_hex(12),
            "tpc.lfn": origin_path,
            "tpc.spr": source.scheme,
            "tpc.src": host,
            "tpc.stage": "copy",
            "tpc.str": "1",
            "tpc.tpr": temporary.scheme,
        }
        # Only the source reports its own errors at once.
        there = at_source(self.existing, source)
        if there.kind == "directory":
            raise StorageError(f"{source} is a directory", errno=errno.EISDIR, scope=FailureScope.SOURCE)
        worker = self._delegator(server)
        query = "&".join(f"{name}={value}" for name, value in cgi.items())
        try:
            worker.begin("pull", server=server, path=path, cgi=query)
            self._follow(worker, source, temporary, arrived)
        except StorageError as error:
            if error.scope is None:
                raise self._blamed(source, error) from error
            raise
        finally:
            # Closing the session here ends the copy there.
            self._let_go(worker)

    def _follow(
        self, worker: XrootdSession, source: StorageUrl, temporary: StorageUrl, arrived: ProgressCallback
    ) -> None:
        """Wait for the end of the copy; a dead or silent server ends it."""
        moved, moved_at = -1, time.monotonic()
        asked_at = moved_at
        while True:
            self.check()
            kind, content = worker.next(_SUSPICIOUS_S / 4)
            if kind == b"A":
                worker.answer(content)
                return
            now = time.monotonic()
            if kind == b"P" and int(content) > moved:
                moved, moved_at = int(content), now
                asked_at = now
                arrived(moved)
            quiet_s = now - moved_at
            if quiet_s > (self.timeouts.stall_s if moved > 0 else max(self.timeouts.stall_s, _BEGIN_S)):
                raise self._stalled(source)
            if now - asked_at > _SUSPICIOUS_S:
                asked_at = now
                for scope, url in ((FailureScope.SOURCE, source), (FailureScope.DESTINATION, temporary)):
                    error = self._soon(url)
                    if error is not None and error.code == FailureCode.CONNECTION:
                        raise error.at(scope)

    def _stalled(self, source: StorageUrl) -> StorageError:
        told = self._soon(source)
        silent = told is not None and told.code in (FailureCode.STALLED, FailureCode.TIMEOUT, FailureCode.CONNECTION)
        scope = FailureScope.SOURCE if silent else FailureScope.DESTINATION
        return StorageError("no byte arrived in time", code=FailureCode.STALLED, scope=scope)

    def _soon(self, url: StorageUrl) -> StorageError | None:
        """The error of a server that may be dead, or None."""
        timeouts = self.timeouts
        self.timeouts = Timeouts.within(_SOON_S)
        try:
            self.stat(url)
        except StorageError as error:
            return error
        finally:
            self.timeouts = timeouts
        return None

    def _blamed(self, source: StorageUrl, error: StorageError) -> StorageError:
        """The error of a failed third-party copy with its scope: a source that cannot be read now is at fault."""
        try:
            with contextlib.closing(self.read(source)) as pieces:
                next(pieces, None)
        except StorageError as told:
            return told.at(FailureScope.SOURCE)
        return error.at(FailureScope.DESTINATION)

    # -- workers

    def _worker(self, server: str) -> XrootdSession:
        """An idle worker with a login there: a copy within one server needs two."""
        self.check()
        for key, worker in list(self._workers.items()):
            if not worker.is_alive:
                del self._workers[key]
        number = 0
        while (server, number) in self._workers and self._workers[server, number].busy:
            number += 1
        if (server, number) not in self._workers:
            self._workers[server, number] = XrootdSession(self._wake, _trust(server), delegates=False)
        worker = self._workers[server, number]
        worker.timeouts = self.timeouts
        return worker

    def _delegator(self, server: str) -> XrootdSession:
        """The worker that delegates the proxy to a server; servers with the same authorities may share it."""
        self.check()
        trust = _trust(server)
        worker = self._delegating.get(trust)
        if worker is None or not worker.is_alive:
            worker = self._delegating[trust] = XrootdSession(self._wake, trust, delegates=True)
        worker.timeouts = self.timeouts
        return worker

    @staticmethod
    def _let_go(worker: XrootdSession) -> None:
        """End a worker's request whose caller has gone; replace the worker after many entries."""
        if worker.busy or worker.listed > _MOST_LISTED:
            worker.close()

    def resume(self) -> None:
        super().resume()
        for worker in self._workers.values():
            if worker.busy:
                worker.close()


def file_stat_of(told: dict[str, int | str | None]) -> FileStat:
    kind, size = cast("FileKind", told["kind"]), int(told["size"] or 0)
    mtime = told["mtime"]
    return FileStat(kind, size if kind == "file" else 0, None, None if mtime is None else int(mtime))


def _trust(server: str) -> str | None:
    """The directory of the authorities trusted for a server."""
    return trust_at(server.partition("://")[2])


def server_and_path(url: StorageUrl) -> tuple[str, str]:
    """Server and path of ``root://host:port//path``, as the client expects them: names are not encoded.

    Raises:
        StorageError: the client cannot use such a name.
    """
    if url.scheme not in JobProtocol.XROOT.info.schemes or not _HOST.fullmatch(url.authority):
        raise StorageError(f"{url.server} is no root://HOST:PORT", code=FailureCode.UNSUPPORTED)
    try:
        name = url.path.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StorageError(f"{url}: XRootD's client supports UTF-8 names only", errno=errno.EILSEQ) from error
    if "?" in name or any(letter in name for letter in "\0\n"):
        # The client takes the part after a question mark as options.
        raise StorageError(f"{url}: XRootD does not support such a name", errno=errno.EILSEQ)
    return url.server, "/" + name.lstrip("/")
