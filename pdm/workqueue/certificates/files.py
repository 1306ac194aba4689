"""Files that helper processes need: credentials, and directories of trusted authorities.

Credential files are private and exist only while a helper uses them. A trust directory is in grid style and holds the
usual authorities together with those that are trusted for single sites.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection
from pathlib import Path

from cryptography import x509
from OpenSSL.crypto import X509

from pdm.workqueue.certificates.names import PARSE_ERRORS, dn, subject_hash, subject_hash_old
from pdm.workqueue.certificates.pem import to_pem
from pdm.workqueue.certificates.verification import UNREADABLE

#: Prefixes of file names: a proxy as Globus names it, others by their kind.
FILE_PREFIXES = ("x509up", "ssh-key", "token", "s3-key")

#: Bytes to test the disk with: more than any credential has.
_LARGEST_CREDENTIAL = 256 * 1024


class CredentialFilesError(Exception):
    """The directory for credential files is not safe, or cannot be made."""


class CredentialFiles:
    """A directory of files that only this account can read.

    All methods work on files: in a thread where a reactor runs, unless the directory is in memory (``/run``).

    Args:
        directory: is made, mode 0700, if it is missing.

    Raises:
        CredentialFilesError: it cannot be made, belongs to another account, or is no real directory.
    """

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                raise CredentialFilesError(
                    f"{directory} is a link, or belongs to another account: name another directory"
                )
            directory.chmod(0o700)
        except OSError as error:
            raise CredentialFilesError(f"{directory} cannot be used for credentials ({error.strerror})") from error
        self._directory = directory

    def write(self, content: bytes, kind: str = "x509up") -> Path:
        """Write a credential into a new file, mode 0600.

        Args:
            kind: what its name begins with; one of `FILE_PREFIXES`.

        Raises:
            OSError: the disk is full, or the directory is gone; nothing is left behind.
        """
        path = self._directory / f"{kind}_{secrets.token_hex(12)}"
        try:
            # No file is ever readable by others: the mode is that of its creation.
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path

    def replace(self, path: Path, content: bytes) -> None:
        """Replace the content of a file that `write` made, for readers at once.

        Raises:
            OSError: as of `write`; the file stays as it is.
        """
        self.write(content, path.name.partition("_")[0]).rename(path)

    def remove(self, path: Path) -> None:
        """Remove a file that `write` made; one that is gone already is no error."""
        if path.parent != self._directory:
            raise ValueError(f"{path} is not in {self._directory}")
        path.unlink(missing_ok=True)

    def check(self) -> None:
        """Check that files can be written; blocks.

        Raises:
            OSError: it does not.
        """
        self.remove(self.write(bytes(_LARGEST_CREDENTIAL)))

    def sweep(self) -> int:
        """Remove files of an earlier daemon; to be called at the start, before the first `write`.

        Returns:
            How many files there were.
        """
        found = [path for kind in FILE_PREFIXES for path in self._directory.glob(f"{kind}_*")]
        for path in found:
            path.unlink(missing_ok=True)
        return len(found)


#: Authorities of one site.
_MOST_AUTHORITIES = 20
#: A disk with less room than this is full.
_LEAST_FREE_BYTES = 256 * 1024
#: Any subject: an authority of a site is trusted for that site only.
_SIGNING_POLICY = "access_id_CA   X509   '{name}'\npos_rights     globus CA:sign\ncond_subjects  globus '\"*\"'\n"


def read_authorities(pem: str) -> tuple[x509.Certificate, ...]:
    """The authorities in a PEM text.

    Raises:
        ValueError: there are none or too many, one is damaged, or it is no authority; says which.
    """
    if not pem.isascii() or "-----BEGIN CERTIFICATE-----" not in pem:
        raise ValueError("certificates in PEM form are expected (-----BEGIN CERTIFICATE-----)")
    if "PRIVATE KEY-----" in pem:
        raise ValueError("there is a private key in it: give the certificates alone, and make a new key")
    try:
        found = x509.load_pem_x509_certificates(pem.encode("ascii"))
        for certificate in found:
            # Helpers and myproxy-logon read it by OpenSSL.
            X509.from_cryptography(certificate)
    except UNREADABLE as error:
        raise ValueError("a certificate is damaged") from error
    if len(found) > _MOST_AUTHORITIES:
        raise ValueError(f"at most {_MOST_AUTHORITIES} certificates are expected")
    for certificate in found:
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            is_authority = constraints.ca
            name = dn(certificate.subject)
        except (x509.ExtensionNotFound, *PARSE_ERRORS):
            is_authority, name = False, "one"
        if not name.isprintable() or "'" in name:
            # It is written into a signing policy.
            raise ValueError("the subject of an authority has characters that no signing policy can hold")
        if not is_authority:
            raise ValueError(f"{name[:200]} is no authority: give the certificate that has signed the server's")
    return tuple(found)


class TrustDirectories:
    """Grid-style directories, each of the usual authorities and those of some sites.

    All methods work on files: in a thread where a reactor runs.

    Args:
        directory: for them; private, and emptied by `sweep`.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def sweep(self) -> None:
        """Begin with an empty directory, mode 0700."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def check(self) -> None:
        """Check that a directory can be made; blocks.

        Raises:
            OSError: it cannot.
        """
        with tempfile.TemporaryFile(dir=self._directory) as file:
            file.write(bytes(_LEAST_FREE_BYTES))
            file.flush()

    def directory_for(self, usual: Path | None, authorities: Collection[str]) -> Path:
        """The directory with the usual authorities and these; cached, made at first use.

        Args:
            usual: directory of the authorities that are trusted everywhere; None, or one that is not there, for none.

        Raises:
            OSError: the disk is full.
        """
        if usual is not None and not usual.is_dir():
            usual = None
        words = sorted(set(authorities))
        # When something is added to the usual directory, another one has to be made of it.
        stamp = "" if usual is None else f"{usual}:{usual.stat().st_mtime_ns}"
        name = hashlib.sha256("\0".join([stamp, *words]).encode()).hexdigest()[:32]
        path = self._directory / name
        if not path.is_dir():
            # Another thread may be making the same: each in a directory of its own, and the first one counts.
            part = self._directory / f"{name}.{secrets.token_hex(8)}.part"
            part.mkdir(mode=0o700)
            for entry in sorted(usual.iterdir()) if usual is not None else ():
                # Links, so that new revocation lists are seen here too.
                (part / entry.name).symlink_to(entry.absolute())
            for pem in words:
                for certificate in read_authorities(pem):
                    _add_authority(part, certificate)
            try:
                part.rename(path)
            except OSError:
                shutil.rmtree(part, ignore_errors=True)
                if not path.is_dir():
                    raise
        return path


def _add_authority(directory: Path, certificate: x509.Certificate) -> None:
    pem = to_pem(certificate)
    for stem in (subject_hash(certificate.subject), subject_hash_old(certificate.subject)):
        number = next(n for n in range(1000) if not (directory / f"{stem}.{n}").exists())
        (directory / f"{stem}.{number}").write_bytes(pem)
        policy = directory / f"{stem}.signing_policy"
        if not policy.exists():
            policy.write_text(_SIGNING_POLICY.format(name=dn(certificate.subject)), encoding="utf-8")
