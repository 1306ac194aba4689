"""Credentials at rest: encrypted with a key that lies in a file beside the database, not in it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from attrs import define, field
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_KEY_BYTES = 32
_NONCE_BYTES = 12
_KEY_ID_BYTES = 4
_PREFIX = b"pdm1"
_KEY_WORD = "pdm-vault-1"


class VaultError(Exception):
    """The key file cannot be used, or a sealed text cannot be opened."""


@define(eq=False)
class Vault:
    """Seals and unseals with AES-256-GCM.

    What is sealed is bound to a context (purpose and owner): moved to another row of the database it does not open.
    Sealed: ``pdm1``, 4 bytes that identify the key, a random nonce of 12 bytes, the encrypted text with its tag.

    A changed key file is read again before the next use, so that a running daemon follows ``pdm admin rekey``; keys
    that are no longer in it still open what they have sealed, until the process ends.

    Attributes:
        path: the key file. One key a line, ``pdm-vault-1 BASE64``. The first seals; each opens what it sealed, so a new
            one is put on top and the old one stays as long as it is needed.
    """

    path: Path
    _keys: tuple[bytes, ...] = field(repr=False)
    _stamp: tuple[int, ...] = field(repr=False)

    @classmethod
    def open(cls, key_file: Path) -> Vault:
        """Read the key file; make one with a new key, readable by the owner only, if there is none.

        Raises:
            VaultError: it cannot be read or made, others can read it, or it holds no key.
        """
        try:
            if not key_file.exists():
                _write_key_file(key_file, [secrets.token_bytes(_KEY_BYTES)], replace=False)
            stamp = _stamp(key_file)
        except OSError as error:
            raise VaultError(f"the key file {key_file} cannot be used ({error.strerror})") from error
        return cls(key_file, _read_keys(key_file), stamp)

    def seal(self, plain: bytes, context: str) -> bytes:
        """Encrypt.

        Args:
            context: what it is and whose, such as ``proxy of user 7``; needed again to open it.
        """
        self._follow_file()
        key = self._keys[0]
        head = _PREFIX + _key_id(key)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return head + nonce + AESGCM(key).encrypt(nonce, plain, _associated_data(head, context))

    def unseal(self, sealed: bytes, context: str) -> bytes:
        """Decrypt.

        Raises:
            VaultError: damaged, changed, sealed for another context, or with a key that is not in the file.
        """
        if not sealed.startswith(_PREFIX):
            raise VaultError("this was not sealed by this version of the service")
        head_end = len(_PREFIX) + _KEY_ID_BYTES
        head, nonce, box = (
            sealed[:head_end],
            sealed[head_end : head_end + _NONCE_BYTES],
            sealed[head_end + _NONCE_BYTES :],
        )
        key = self._key_of(head)
        if key is None:
            self._follow_file()
            key = self._key_of(head)
        if key is None:
            raise VaultError(f"sealed with a key that is not in {self.path}: restore the key file, or delegate again")
        try:
            return AESGCM(key).decrypt(nonce, box, _associated_data(head, context))
        except (InvalidTag, ValueError) as error:
            raise VaultError("the sealed text was changed, or belongs to something else") from error

    def is_current(self, sealed: bytes) -> bool:
        """Whether a text was sealed with the first key."""
        return sealed.startswith(_PREFIX + _key_id(self._keys[0]))

    def add_key(self) -> None:
        """Put a new key on top of the file; from now on it seals, in all processes that use the file.

        Raises:
            OSError: the file cannot be written; it is unchanged.
        """
        keys = (secrets.token_bytes(_KEY_BYTES), *self._keys)
        _write_key_file(self.path, keys, replace=True)
        self._keys, self._stamp = keys, _stamp(self.path)

    def drop_old_keys(self) -> None:
        """Leave only the first key in the file.

        Raises:
            OSError: the file cannot be written; it is unchanged.
        """
        _write_key_file(self.path, self._keys[:1], replace=True)
        self._stamp = _stamp(self.path)

    def _key_of(self, head: bytes) -> bytes | None:
        return next((key for key in self._keys if head == _PREFIX + _key_id(key)), None)

    def _follow_file(self) -> None:
        """Read the file again if it was changed; one that cannot be used is ignored, until it can."""
        try:
            stamp = _stamp(self.path)
            if stamp == self._stamp:
                return
            found = _read_keys(self.path)
        except (OSError, VaultError):
            return
        self._keys = tuple(dict.fromkeys((*found, *self._keys)))
        self._stamp = stamp


def _associated_data(head: bytes, context: str) -> bytes:
    return head + context.encode()


def _key_id(key: bytes) -> bytes:
    return hashlib.sha256(b"key id" + key).digest()[:_KEY_ID_BYTES]


def _parse_key(path: Path, line: str) -> bytes:
    word, _, encoded = line.strip().partition(" ")
    try:
        key = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        key = b""
    if word != _KEY_WORD or len(key) != _KEY_BYTES:
        raise VaultError(f"{path} is no key file: its lines must be '{_KEY_WORD} BASE64 OF {_KEY_BYTES} BYTES'")
    return key


def _stamp(path: Path) -> tuple[int, ...]:
    """What differs once the file was written or replaced."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ino, status.st_size


def _read_keys(path: Path) -> tuple[bytes, ...]:
    try:
        status = path.stat()
        content = path.read_text(encoding="ascii")
    except OSError as error:
        raise VaultError(f"the key file {path} cannot be used ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise VaultError(f"{path} is no key file") from error
    if status.st_mode & 0o077:
        raise VaultError(f"others can read the key file {path}: chmod 600 it")
    keys = tuple(_parse_key(path, line) for line in content.splitlines() if line.strip())
    if not keys:
        raise VaultError(f"the key file {path} is empty: restore it, or remove it to begin with a new key")
    return keys


def _write_key_file(path: Path, keys: Sequence[bytes], *, replace: bool) -> None:
    """Write the key file whole or not at all; without `replace`, a file that another process has made stays."""
    lines = "".join(f"{_KEY_WORD} {base64.b64encode(key).decode()}\n" for key in keys)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            if replace:
                owner = path.stat()
                os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            part.replace(path)
        else:
            try:
                os.link(part, path)
            except FileExistsError:
                return
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    finally:
        part.unlink(missing_ok=True)
