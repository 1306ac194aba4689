"""Destination directories of a batch of copies: created if missing, listed once, shared by all worker threads."""

from __future__ import annotations

import contextlib
import errno
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Literal
from urllib.parse import quote_from_bytes, unquote_to_bytes

from pdm.workqueue.domain.failures import FailureCode, FailureScope
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.storage import FileStat, Storage, StorageError, at_destination
from pdm.workqueue.wire.agent_requests import CopyItem

#: Number of files from which one listing of their directory is cheaper than a stat of each.
_MIN_FILES_FOR_LISTING = 8
#: Entries for each file of the batch, above which a listing of a directory is broken off.
_MOST_ENTRIES, _MOST_ENTRIES_EACH = 10_000, 20
#: A path of 4,096 bytes, each percent-encoded, and a host before it.
_LONGEST_URL = 3 * 4096 + 512
_FORMS: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
#: Errors of a directory that may still be writable.
_NOT_SHOWN = frozenset({errno.EACCES, errno.EPERM, errno.ENOENT})


class TargetDirectory:
    """An existing directory at the destination.

    Attributes:
        url: of the directory.
        known: what was in it, of the names of this batch; None if each needs a stat.
        is_new: whether it was made for this batch.
    """

    def __init__(self, url: StorageUrl, known: dict[bytes, FileStat] | None, *, is_new: bool = False) -> None:
        self.url = url
        self.known = known
        self.is_new = is_new
        self._lock = threading.Lock()
        #: Whether it ignores case; None if not checked yet.
        self._ignores_case: bool | None = None

    def stat(self, storage: Storage, url: StorageUrl) -> FileStat | None:
        """What is at a URL in this directory, or was when the batch began."""
        return storage.stat(url) if self.known is None else self.known.get(url.name)

    def may_hold(self, url: StorageUrl) -> bool:
        return self.known is None or url.name in self.known

    def check_own_name(self, storage: Storage, url: StorageUrl) -> None:
        """Raise `StorageError` if the entry found at a URL has another name.

        Storages that ignore case or normalise Unicode take two names for one; the entry may be another file of the same
        job.
        """
        if self.known is not None:
            # The listing has this very name.
            return
        name = url.name
        others = {variant for variant in _variants(name) if variant != name}
        if any(storage.stat(self.url.child(other)) for other in others):
            _check_listed(storage, name, url)

    def check_free(self, storage: Storage, url: StorageUrl) -> None:
        """Raise `StorageError` if a name that was free now leads to a file of another name."""
        if (self._ignores_case or not url.name.isascii()) and storage.stat(url) is not None:
            _check_listed(storage, url.name, url)

    @contextlib.contextmanager
    def alone(self, storage: Storage, temporary: StorageUrl, url: StorageUrl) -> Iterator[None]:
        """Allow one rename at a time, where two names may be the same file.

        Args:
            storage: of the directory.
            temporary: a temporary file in the directory, whose name has letters.
            url: the final name.
        """
        if not self.ignores_case(storage, temporary) and url.name.isascii():
            yield
            return
        with self._lock:
            yield

    def ignores_case(self, storage: Storage, temporary: StorageUrl) -> bool:
        """Whether the directory ignores case.

        Args:
            storage: of the directory.
            temporary: a temporary file in the directory, whose name has letters.
        """
        if not storage.has_temporary(temporary):
            # Nothing shows it.
            return False
        with self._lock:
            if self._ignores_case is None:
                swapped = self.url.child(temporary.name.swapcase())
                self._ignores_case = at_destination(storage.stat_new, swapped) is not None
            return self._ignores_case


def _check_listed(storage: Storage, name: bytes, url: StorageUrl) -> None:
    """Raise `StorageError` if the directory of a URL lists the entry under another name."""
    variants = set(_variants(name))
    folded = {variant.casefold() for variant in map(_text, variants)}
    found: bytes | None = None
    with contextlib.closing(storage.entries(url.parent)) as entries:
        for other, _ in entries:
            if other == name:
                return
            if other in variants or _text(other).casefold() in folded:
                found = other
    if found is not None:
        raise StorageError(
            f"{url}: the destination treats this name and {quote_from_bytes(found)}, which exists, as the same:"
            " it ignores case or normalises Unicode",
            errno=errno.EILSEQ,
            code=FailureCode.INVALID_NAME,
            scope=FailureScope.DESTINATION,
        )


def _variants(name: bytes) -> Iterator[bytes]:
    """Other names that a storage may treat as the same: other case, or another Unicode normalisation."""
    yield name.swapcase()
    text = _text(name)
    for form in _FORMS:
        yield unicodedata.normalize(form, text).encode("utf-8", "surrogateescape")
    if not name.isascii():
        yield text.swapcase().encode("utf-8", "surrogateescape")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


class TargetDirectories:
    """The destination directories of a batch."""

    def __init__(self, items: Iterable[CopyItem]) -> None:
        self._wanted: dict[StorageUrl, set[bytes]] = {}
        for item in items:
            wanted = self._wanted.setdefault(StorageUrl(item.destination).parent, set())
            wanted.update(StorageUrl(url).name for url in (item.destination, *item.stale))
        self._locks = {url: threading.Lock() for url in self._wanted}
        self._ready: dict[StorageUrl, TargetDirectory | StorageError] = {}
        #: Folded path → its spellings in this batch.
        self._spellings: dict[str, set[str]] = {}
        for url in self._wanted:
            for above in _with_parents(url):
                spellings = self._spellings.setdefault(_folded(above), set())
                if above in spellings:
                    # Then its parents are known to exist, too.
                    break
                spellings.add(above)

    def of(self, storage: Storage, destination: StorageUrl) -> TargetDirectory:
        """The directory of a destination, made if missing.

        Raises:
            StorageError: it cannot be used.
        """
        url = destination.parent
        with self._locks[url]:
            if url not in self._ready:
                try:
                    self._ready[url] = self._prepared(storage, url)
                except StorageError as error:
                    if error.is_of_server:
                        # The error is not about the directory: the next item tries again.
                        raise
                    self._ready[url] = error
            ready = self._ready[url]
        if isinstance(ready, StorageError):
            raise ready
        return ready

    def _prepared(self, storage: Storage, url: StorageUrl) -> TargetDirectory:
        is_new = not ensure_directory(storage, url)
        for above in _with_parents(url):
            if len(self._spellings[_folded(above)]) > 1:
                # All below would fail with the same error.
                _check_listed(storage, above.name, above)
        if is_new:
            return TargetDirectory(url, {}, is_new=True)
        wanted = self._wanted[url]
        if len(wanted) < _MIN_FILES_FOR_LISTING:
            return TargetDirectory(url, None)
        try:
            return TargetDirectory(url, self._known(storage, url, wanted))
        except StorageError as error:
            broken_off = error.code == FailureCode.SERVER_ERROR and not error.lost
            if error.errno not in _NOT_SHOWN and error.code != FailureCode.PERMISSION_DENIED and not broken_off:
                raise
            # A drop box can be written to but not listed; rclone breaks off a listing when a file is removed meanwhile,
            # Globus with ENOENT: use a stat for each name.
            return TargetDirectory(url, None)

    @staticmethod
    def _known(storage: Storage, url: StorageUrl, wanted: set[bytes]) -> dict[bytes, FileStat] | None:
        """The wanted names that are in a directory; None if it is too large to be listed."""
        known: dict[bytes, FileStat] = {}
        most = _MOST_ENTRIES + _MOST_ENTRIES_EACH * len(wanted)
        with contextlib.closing(storage.entries(url)) as entries:
            for count, (name, file_stat) in enumerate(entries):
                if name in wanted:
                    known[name] = file_stat
                if count > most:
                    return None
        return known


def ensure_directory(storage: Storage, url: StorageUrl) -> bool:
    """Make a directory and its missing parents; another agent may do the same meanwhile.

    Returns:
        Whether it existed.

    Raises:
        StorageError: NOT_A_DIRECTORY if another entry has the name, and errors of the storage.
    """
    if _is_directory(storage.stat_new(url), url):
        return True
    missing = [url]
    #: Directories for which the storage has reported a missing parent.
    orphans: set[str] = set()
    while missing:
        directory = missing[-1]
        try:
            storage.make_directory(directory)
        except StorageError as error:
            parent = directory.parent
            if error.errno == errno.ENOENT and parent != directory and directory not in orphans:
                orphans.add(directory)
                missing.append(parent)
                continue
            if error.errno == errno.ENOENT and directory in orphans:
                # The parent was made, or exists: the storage means something else.
                raise StorageError(
                    f"{directory} cannot be made, although the directory above it is there: {error.message}",
                    code=FailureCode.SERVER_ERROR,
                    retry_after_s=error.retry_after_s,
                ) from error
            if error.errno != errno.EEXIST:
                raise
            _is_directory(storage.stat(directory), directory)
        missing.pop()
    return False


def _is_directory(file_stat: FileStat | None, url: StorageUrl) -> bool:
    if file_stat is None:
        return False
    if "directory" not in (file_stat.kind, file_stat.target_kind):
        raise StorageError(f"{url} is not a directory", errno=errno.ENOTDIR, code=FailureCode.NOT_A_DIRECTORY)
    return True


def _with_parents(url: StorageUrl) -> Iterator[StorageUrl]:
    """`StorageUrl.parents`; empty for a URL that is too long for any storage."""
    return url.parents() if len(url) <= _LONGEST_URL else iter(())


def _folded(url: StorageUrl) -> str:
    """A key that is equal for all spellings of a path that a storage may treat as the same."""
    return unicodedata.normalize("NFC", _text(unquote_to_bytes(url))).casefold()
