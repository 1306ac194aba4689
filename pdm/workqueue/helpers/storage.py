"""The storage interface that operations use, its value types, and its errors."""

from __future__ import annotations

import abc
import errno
import functools
import time
from collections.abc import Callable, Generator, Sequence
from typing import Literal, NamedTuple, ParamSpec, Self, TypeVar

from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.wire.agent_events import Fault
from pdm.workqueue.wire.agent_requests import TimeLimits

_P = ParamSpec("_P")
_Result = TypeVar("_Result")
#: Kinds of entries.
FileKind = Literal["file", "directory", "link", "other"]

#: With timestamps in whole seconds, a second write within so many seconds of the mtime may leave it unchanged.
FRESH_S = 2.0


class FileStat(NamedTuple):
    """What is at a URL.

    Attributes:
        kind: ``file``, ``directory``, ``link`` or ``other``.
        size: bytes of a file, or of the file that a link leads to.
        mode: permission bits, where known.
        mtime: seconds since 1970 UTC, where known.
        owner: name of the account that owns it, or its number at the server, where known.
        group: the same of its group.
        target: of a link: where it leads, an absolute path as bytes; None if nowhere or not known.
        target_kind: of a link: what is there.
    """

    kind: FileKind
    size: int = 0
    mode: int | None = None
    mtime: int | None = None
    owner: str | None = None
    group: str | None = None
    target: bytes | None = None
    target_kind: FileKind | None = None


#: Maximum characters of the name of an account or a group.
_LONGEST_ACCOUNT = 256


@functools.lru_cache(maxsize=4096)
def account_name(name: bytes | None) -> str | None:
    """The name of an account or a group as a server reports it; None if it is missing or cannot be one."""
    if not name or len(name) > _LONGEST_ACCOUNT:
        return None
    return name.decode("utf-8", "backslashreplace")


class FileVersion(NamedTuple):
    """Identifies the content of a file: changes when it is written to or replaced.

    Attributes:
        size: bytes.
        mtime: seconds since 1970 UTC, if known.
        tag: further values of the storage: inode and change time, an entity tag.
        is_exact: whether every write changes it, even two within one tick of the storage's clock.
    """

    size: int
    mtime: float | None = None
    tag: str = ""
    is_exact: bool = False

    def may_hide_writes(self, asked_at: float) -> bool:
        """Whether a later write may leave this version unchanged: most servers count whole seconds.

        Args:
            asked_at: seconds since 1970 UTC, before the storage was asked for the version.
        """
        if self.mtime is None:
            return not self.tag
        # The storage has answered at some time between then and now.
        return not self.is_exact and asked_at - FRESH_S < self.mtime < time.time() + FRESH_S


class StorageError(Exception):
    """An error of a storage or of the service.

    Attributes:
        message: of the server or system.
        errno: if known.
        code: if determined here.
        scope: the side that failed; None if not known yet.
        lost: whether a connection was lost.
        retry_after_s: seconds until the server accepts the next request, if it has said so.
        unreachable: whether no server answered: the connection failed, or no greeting arrived.
    """

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        code: FailureCode | None = None,
        scope: FailureScope | None = None,
        lost: bool = False,
        retry_after_s: float | None = None,
        unreachable: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.errno = errno
        self.code = code
        self.scope = scope
        self.lost = lost
        self.retry_after_s = retry_after_s
        self.unreachable = unreachable

    @property
    def timed_out(self) -> bool:
        """The server did not answer, or did not finish, in time."""
        return self.code in (FailureCode.STALLED, FailureCode.TIMEOUT)

    @property
    def is_of_server(self) -> bool:
        """Whether it says nothing about the path: requests for others would fail as well."""
        return self.lost or self.timed_out

    def at(self, scope: FailureScope) -> Self:
        """Set the scope unless it is set; returns the error itself."""
        self.scope = self.scope or scope
        return self

    def fault(self) -> Fault:
        """The error as reported to the daemon."""
        return Fault(
            self.scope or FailureScope.TRANSFER,
            truncated(self.message),
            self.errno,
            self.code,
            self.retry_after_s,
            self.unreachable,
        )


class StoppedError(Exception):
    """The batch was cancelled during an operation."""


class Timeouts(NamedTuple):
    """Timeouts of one element.

    Attributes:
        stall_s: seconds without a byte, an entry or a reply.
        slack_s: seconds that reading all bytes of the element may take.
        until: deadline of the element (`time.monotonic`).
    """

    stall_s: float
    slack_s: float
    until: float

    @classmethod
    def of(cls, limits: TimeLimits, size: int = 0) -> Timeouts:
        """Timeouts for one element of ``size`` bytes, from now."""
        slack_s = size / max(limits.least_rate, 1.0)
        return cls(limits.stall_s, slack_s, time.monotonic() + limits.total_s + slack_s)

    def with_slack(self) -> Timeouts:
        """Timeouts for a request that the server answers after it has read the whole file."""
        return self._replace(stall_s=self.stall_s + self.slack_s)

    @classmethod
    def within(cls, longest_s: float) -> Timeouts:
        """Timeouts for an operation that must end within some seconds from now."""
        return cls(longest_s, 0.0, time.monotonic() + longest_s)


#: Names and states of the entries of a directory; a caller that stops early must close it.
EntryIterator = Generator[tuple[bytes, FileStat], None, None]
#: Called with the number of bytes that have arrived so far.
ProgressCallback = Callable[[int], None]


class Storage(abc.ABC):
    """The storage access of one thread: one operation at a time; `interrupt` may be called from any thread.

    URLs are percent-encoded. Every method may raise `StorageError` and `StoppedError`.
    """

    #: Time limits of operations; set before each element.
    timeouts: Timeouts
    #: Number of entries of the last listed directory that the server counts but does not name, or that have no path.
    unnamed: int = 0
    #: What these most likely are.
    unnamed_are: str = "symbolic links that lead nowhere"

    def log_to(self, write: Callable[[str], None]) -> None:  # noqa: B027  # most have nothing to tell by themselves
        """Send messages about the next item to the item's log."""

    @abc.abstractmethod
    def stat(self, url: StorageUrl) -> FileStat | None:
        """What is at a URL, links not followed; None if nothing is."""

    def stat_new(self, url: StorageUrl) -> FileStat | None:
        """As `stat`, for a URL that is most likely free: some servers close the connection after they said so."""
        return self.stat(url)

    def real_path(self, url: StorageUrl, there: FileStat) -> bytes | None:
        """Absolute path of the directory at a URL, links resolved; None if the server does not report it.

        ``url`` may be that of a link to a directory. ``there``: result of `stat` for it.
        """
        return there.target

    @abc.abstractmethod
    def entries(self, url: StorageUrl) -> EntryIterator:
        """Names and states of the entries of a directory, as they arrive; never all in memory."""

    def link_at(self, url: StorageUrl, *, listed: bool) -> str | None:
        """Whether an entry that `entries` reports as a directory is a link: checked before a removal descends into it.

        ``url``: of a directory that is not empty. ``listed``: whether `entries` of its parent has reported it.

        Returns:
            The reason, if it may be a link; None if it is none, or if that cannot be found out.
        """
        return None

    @abc.abstractmethod
    def make_directory(self, url: StorageUrl) -> None:
        """Make one directory; raises `StorageError` with EEXIST or ENOENT as errno."""

    @abc.abstractmethod
    def remove(self, url: StorageUrl, *, directory: bool) -> None:
        """Remove a file, a link, or an empty directory."""

    @abc.abstractmethod
    def rename(self, source: StorageUrl, destination: StorageUrl, *, replace: bool) -> None:
        """Rename. Without ``replace`` an existing destination is EEXIST."""

    def continue_rename(self, source: StorageUrl, destination: StorageUrl) -> bool:
        """Continue the rename of a directory that an earlier attempt has begun, where this takes many requests.

        Returns:
            False if the storage renames a directory at once: then this does nothing.
        """
        return False

    def check_readable(self, url: StorageUrl) -> None:  # noqa: B027  # where a failed transfer is cheap there is nothing to save
        """Raise `StorageError` if a file cannot be read; called before a transfer after another has failed so."""

    def expect_rename(  # noqa: B027  # only storages that cannot rename need it
        self,
        temporary: StorageUrl,
        destination: StorageUrl,
        stale: Sequence[StorageUrl],
        algorithm: ChecksumAlgorithm | None,
    ) -> None:
        """Called before a copy: what is written to a temporary URL will be renamed, unless it is removed.

        Args:
            temporary: where the copy will be written to.
            destination: its final name.
            stale: temporary URLs of earlier attempts, which are removed next.
            algorithm: of the checksum that will be asked for; None if none will.
        """

    def forget_rename(self, temporary: StorageUrl) -> None:  # noqa: B027  # as above
        """Called if a copy ends before its transfer: undoes `expect_rename`."""

    def has_temporary(self, temporary: StorageUrl) -> bool:
        """Whether what was transferred to a temporary URL is at the server under that name."""
        return True

    @abc.abstractmethod
    def transfer(
        self,
        source: StorageUrl,
        temporary: StorageUrl,
        size: int,
        checksum: ChecksumAlgorithm | None,
        arrived: ProgressCallback,
    ) -> str | None:
        """Transfer the bytes to a new file; returns the requested checksum of the source if it is a by-product.

        Raises:
            StorageError: with the scope of the side at fault.
        """

    @abc.abstractmethod
    def size(self, url: StorageUrl) -> int:
        """Size of a file in bytes, read from its storage."""

    def existing(self, url: StorageUrl) -> FileStat:
        """What is at a URL, as `stat`; raises `StorageError` with ENOENT for nothing."""
        there = self.stat(url)
        if there is None:
            raise StorageError(f"{url} does not exist", errno=errno.ENOENT)
        return there

    def version(self, url: StorageUrl) -> FileVersion:
        """Version of a file, links followed, read from its storage."""
        there = self.existing(url)
        return FileVersion(there.size, there.mtime)

    def attributes(self, url: StorageUrl) -> FileStat:
        """Modification time and permission bits of a file, links followed; the other values are not to be used."""
        there = self.existing(url)
        # Those of a link may be its own.
        return FileStat("file") if there.kind == "link" else there

    def set_mtime(self, url: StorageUrl, mtime: int) -> None:
        """Set the modification time of a file, in seconds since 1970 UTC."""
        raise StorageError("this protocol cannot set modification times", code=FailureCode.UNSUPPORTED)

    def set_mode(self, url: StorageUrl, mode: int) -> None:
        """Set the permission bits of a file."""
        raise StorageError("this protocol cannot set permission bits", code=FailureCode.UNSUPPORTED)

    @abc.abstractmethod
    def checksum(self, url: StorageUrl, algorithm: ChecksumAlgorithm) -> str:
        """Checksum of a file in lower-case hexadecimal digits: computed by its storage, or here by reading."""

    def checksums(
        self, source: StorageUrl, destination: StorageUrl, size: int, algorithm: ChecksumAlgorithm
    ) -> tuple[str, str]:
        """Checksums of both ends of a copy of ``size`` bytes; `StorageError` has its scope."""
        return at_source(self.checksum, source, algorithm), at_destination(self.checksum, destination, algorithm)

    def free_bytes(self, directory_url: StorageUrl) -> int | None:
        """Bytes that can still be written to a directory, by quota or free space; None if the server does not say."""
        return None

    @abc.abstractmethod
    def interrupt(self) -> None:
        """Fail the running operation, and all that begin before `resume`, with `StoppedError`; does not block."""

    @abc.abstractmethod
    def resume(self) -> None:
        """Allow operations after `interrupt`."""

    def sync_directory(self, directory_url: StorageUrl) -> None:  # noqa: B027  # most storages have nothing to do
        """Make the names in a directory durable (fsync), if this process writes them."""


def scoped(scope: FailureScope, function: Callable[_P, _Result], *arguments: _P.args, **named: _P.kwargs) -> _Result:
    """Call a function; a `StorageError` without a scope gets this one."""
    try:
        return function(*arguments, **named)
    except StorageError as error:
        raise error.at(scope) from error.__cause__


def at_source(function: Callable[_P, _Result], *arguments: _P.args, **named: _P.kwargs) -> _Result:
    """Call a function; a `StorageError` without a scope gets the scope SOURCE."""
    return scoped(FailureScope.SOURCE, function, *arguments, **named)


def at_destination(function: Callable[_P, _Result], *arguments: _P.args, **named: _P.kwargs) -> _Result:
    """Call a function; a `StorageError` without a scope gets the scope DESTINATION."""
    return scoped(FailureScope.DESTINATION, function, *arguments, **named)


def link_to_directory(url: str) -> str:
    """Message for a link that a server reports as its target directory."""
    return (
        f"{url} is a symbolic link to a directory: this server does not remove it, and what it leads to is left alone"
    )


def start_error(program: str, package: str, error: OSError) -> StorageError:
    """Error of a program that could not be started: it is not installed, or the machine lacks a resource."""
    if isinstance(error, (FileNotFoundError, PermissionError)):
        text = f"{program} cannot be run ({error.strerror}): install the package {package}"
        return StorageError(text, code=FailureCode.DEPENDENCY_MISSING, scope=FailureScope.SERVICE)
    return internal_error(f"{program} cannot be started: {error}", errno=error.errno)


def internal_error(message: str, *, errno: int | None = None) -> StorageError:
    """A fault of the service itself."""
    return StorageError(message, errno=errno, code=FailureCode.INTERNAL, scope=FailureScope.SERVICE)


def truncated(text: str, longest: int = 2000) -> str:
    """The text without its middle if it is long; without lone surrogates, which JSON readers reject."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) <= longest:
        return text
    half = (longest - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
