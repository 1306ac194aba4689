"""Authorities that are trusted for some sites only: a folder for each set of them, beside the usual ones."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from cryptography import x509

from pdm.workqueue.certificates.names import dn, subject_hash, subject_hash_old
from pdm.workqueue.certificates.pem_files import to_pem
from pdm.workqueue.certificates.unreadable import UNREADABLE

#: Authorities of one site.
_MOST = 20
#: A disk with less room than this is full.
_LEAST_ROOM = 256 * 1024
#: Any name: what an authority of a site may vouch for is the site itself.
_POLICY = "access_id_CA   X509   '{name}'\npos_rights     globus CA:sign\ncond_subjects  globus '\"*\"'\n"


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
    except UNREADABLE as error:
        raise ValueError("a certificate is damaged") from error
    if len(found) > _MOST:
        raise ValueError(f"at most {_MOST} certificates are expected")
    for certificate in found:
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            is_authority = constraints.ca
            name = dn(certificate.subject)
        except (x509.ExtensionNotFound, *UNREADABLE):
            is_authority, name = False, "one"
        if not name.isprintable() or "'" in name:
            # It is written into a signing policy.
            raise ValueError("the subject of an authority has characters that no signing policy can hold")
        if not is_authority:
            raise ValueError(f"{name[:200]} is no authority: give the certificate that has signed the server's")
    return tuple(found)


class TrustFolders:
    """Grid-style folders, each of the usual authorities and those of some sites.

    All methods work on files: in a thread where a reactor runs.

    Args:
        folder: for them; private, and emptied by `sweep`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sweep(self) -> None:
        """Begin with an empty folder, mode 0700."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def check(self) -> None:
        """See that a folder can be made; blocks.

        Raises:
            OSError: it cannot.
        """
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.write(bytes(_LEAST_ROOM))
            file.flush()

    def folder_for(self, usual: Path | None, authorities: Collection[str]) -> Path:
        """The folder in which the usual authorities are, and these; the same for the same, made at first use.

        Args:
            usual: folder of the authorities that are trusted everywhere; None, or one that is not there, for none.
            authorities: PEM texts.

        Raises:
            OSError: the disk is full.
        """
        if usual is not None and not usual.is_dir():
            usual = None
        words = sorted(set(authorities))
        # When something is added to the usual folder, another one has to be made of it.
        stamp = "" if usual is None else f"{usual}:{usual.stat().st_mtime_ns}"
        name = hashlib.sha256("\0".join([stamp, *words]).encode()).hexdigest()[:32]
        path = self._folder / name
        if not path.is_dir():
            # Another thread may be making the same: each in a folder of its own, and the first one counts.
            part = self._folder / f"{name}.{secrets.token_hex(8)}.part"
            part.mkdir(mode=0o700)
            for entry in sorted(usual.iterdir()) if usual is not None else ():
                # What is written anew there, as revocation lists are, is seen here too.
                (part / entry.name).symlink_to(entry.absolute())
            for pem in words:
                for certificate in read_authorities(pem):
                    _add(part, certificate)
            try:
                part.rename(path)
            except OSError:
                shutil.rmtree(part, ignore_errors=True)
                if not path.is_dir():
                    raise
        return path


def _add(folder: Path, certificate: x509.Certificate) -> None:
    pem = to_pem(certificate)
    for stem in (subject_hash(certificate.subject), subject_hash_old(certificate.subject)):
        number = next(n for n in range(1000) if not (folder / f"{stem}.{n}").exists())
        (folder / f"{stem}.{number}").write_bytes(pem)
        policy = folder / f"{stem}.signing_policy"
        if not policy.exists():
            policy.write_text(_POLICY.format(name=dn(certificate.subject)), encoding="utf-8")
