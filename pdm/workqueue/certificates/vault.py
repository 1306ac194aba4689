"""Credentials at rest: encrypted with a key that lies in a file beside the database, not in it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import secrets
from pathlib import Path

from attrs import field, frozen
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_KEY_BYTES = 32
_NONCE_BYTES = 12
_KEY_ID_BYTES = 4
_PREFIX = b"pdm1"
_KEY_WORD = "pdm-vault-1"


class VaultError(Exception):
    """The key file cannot be used, or a sealed text cannot be opened."""


@frozen
class Vault:
    """Seals and unseals with AES-256-GCM.

    What is sealed is bound to a context (purpose and owner): moved to another row of the database it does not open.
    Sealed: ``pdm1``, 4 bytes that identify the key, a random nonce of 12 bytes, the encrypted text with its tag.

    Attributes:
        path: the key file. One key a line, ``pdm-vault-1 BASE64``. The first seals; each opens what it sealed, so a new
            one is put on top and the old one stays as long as it is needed.
    """

    path: Path
    _keys: tuple[bytes, ...] = field(repr=False)

    @classmethod
    def open(cls, key_file: Path) -> Vault:
        """Read the key file; make one with a new key, readable by the owner only, if there is none.

        Raises:
            VaultError: it cannot be read or made, others can read it, or it holds no key.
        """
        try:
            if not key_file.exists():
                _make_key_file(key_file)
            status = key_file.stat()
            content = key_file.read_text(encoding="ascii")
        except OSError as error:
            raise VaultError(f"the key file {key_file} cannot be used ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise VaultError(f"{key_file} is no key file") from error
        if status.st_mode & 0o077:
            raise VaultError(f"others can read the key file {key_file}: chmod 600 it")
        keys = tuple(_parse_key(key_file, line) for line in content.splitlines() if line.strip())
        if not keys:
            raise VaultError(f"the key file {key_file} is empty: restore it, or remove it to begin with a new key")
        return cls(key_file, keys)

    def seal(self, plain: bytes, context: str) -> bytes:
        """Encrypt.

        Args:
            context: what it is and whose, such as ``proxy of user 7``; needed again to open it.
        """
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
        for key in self._keys:
            if head == _PREFIX + _key_id(key):
                try:
                    return AESGCM(key).decrypt(nonce, box, _associated_data(head, context))
                except (InvalidTag, ValueError) as error:
                    raise VaultError("the sealed text was changed, or belongs to something else") from error
        raise VaultError(f"sealed with a key that is not in {self.path}: restore the key file, or delegate again")


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


def _make_key_file(path: Path) -> None:
    """Make the key file whole or not at all; if another process was quicker, its file stays."""
    line = f"{_KEY_WORD} {base64.b64encode(secrets.token_bytes(_KEY_BYTES)).decode()}\n"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(part, path)
        except FileExistsError:
            return
    finally:
        part.unlink(missing_ok=True)
