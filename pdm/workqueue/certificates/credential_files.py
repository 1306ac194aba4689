"""Credentials as files for the time that a helper process needs them."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

#: What the names of files begin with: a proxy as Globus names it, others by their kind.
KINDS = ("x509up", "ssh-key", "token")

#: Bytes of a larger credential than any user has.
_LARGEST = 256 * 1024


class CredentialFilesError(Exception):
    """The folder for credential files is not safe, or cannot be made."""


class CredentialFiles:
    """A folder of files that only this account can read.

    All methods work on files: in a thread where a reactor runs, unless the folder is in memory (``/run``).

    Args:
        folder: is made, mode 0700, if it is missing.

    Raises:
        CredentialFilesError: it cannot be made, belongs to another account, or is no real folder.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                raise CredentialFilesError(f"{folder} is a link, or belongs to another account: name another folder")
            folder.chmod(0o700)
        except OSError as error:
            raise CredentialFilesError(f"{folder} cannot be used for credentials ({error.strerror})") from error
        self._folder = folder

    def write(self, content: bytes, kind: str = "x509up") -> Path:
        """Write a credential into a new file, mode 0600.

        Args:
            content: what the file holds.
            kind: what its name begins with; one of `KINDS`.

        Raises:
            OSError: the disk is full, or the folder is gone; nothing is left behind.
        """
        path = self._folder / f"{kind}_{secrets.token_hex(12)}"
        try:
            # No file is ever readable by others: the mode is that of its creation.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path

    def remove(self, path: Path) -> None:
        """Remove a file that `write` made; one that is gone already is no error."""
        if path.parent != self._folder:
            raise ValueError(f"{path} is not in {self._folder}")
        path.unlink(missing_ok=True)

    def check(self) -> None:
        """See that the folder takes files; blocks.

        Raises:
            OSError: it does not.
        """
        self.remove(self.write(bytes(_LARGEST)))

    def sweep(self) -> int:
        """Remove what a daemon before left behind; to be called at the start, before the first `write`.

        Returns:
            How many files there were.
        """
        found = [path for kind in KINDS for path in self._folder.glob(f"{kind}_*")]
        for path in found:
            path.unlink(missing_ok=True)
        return len(found)
