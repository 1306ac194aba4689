"""SSH keys: made here, or uploaded and checked."""

from __future__ import annotations

import base64
import hashlib

from attrs import field, frozen
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

_FEWEST_RSA_BITS, _MOST_RSA_BITS = 2048, 8192
_OPENSSH = b"-----BEGIN OPENSSH PRIVATE KEY-----"


class SshKeyError(Exception):
    """The key cannot be used; the text says why and what to do, and never contains the key."""


@frozen
class SshKey:
    """A key for SSH.

    Attributes:
        fingerprint: ``SHA256:...``, as ssh-keygen shows it.
        private: in OpenSSH's format, without a passphrase; secret.
    """

    fingerprint: str
    public_line: str
    private: bytes = field(repr=False)


def make_ssh_key(comment: str) -> SshKey:
    """Make an ed25519 key.

    Args:
        comment: one word after the public key, which shows its purpose to its owner.
    """
    return _ssh_key(ed25519.Ed25519PrivateKey.generate(), comment)


def read_ssh_key(text: bytes, comment: str) -> SshKey:
    """Check a private key that was uploaded. Takes some computing for RSA: to be called in a thread.

    Raises:
        SshKeyError: it has a passphrase, is of a weak or strange type, or no private key at all.
    """
    key = _load_private_key(_normalised(text))
    if isinstance(key, rsa.RSAPrivateKey):
        if not _FEWEST_RSA_BITS <= key.key_size <= _MOST_RSA_BITS:
            raise SshKeyError(
                f"an RSA key of {key.key_size} bits: use one of {_FEWEST_RSA_BITS} to {_MOST_RSA_BITS}, or ed25519"
            )
    elif not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise SshKeyError("a key of a type that SSH servers refuse (DSA, or none of SSH): use an ed25519 key")
    try:
        return _ssh_key(key, comment)
    except (ValueError, UnsupportedAlgorithm):
        raise SshKeyError("a key on a curve that SSH does not know: use an ed25519 key") from None


def _normalised(text: bytes) -> bytes:
    """The key as ssh-keygen writes it: editors on Windows put a mark before it and end its lines in two characters."""
    if b"\0" in text or text.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise SshKeyError("this is no plain text, UTF-16 perhaps: send the file as ssh-keygen wrote it, or as UTF-8")
    return text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").strip() + b"\n"


def _load_private_key(text: bytes) -> object:
    if b"PUBLIC KEY-----" in text or text.startswith((b"ssh-", b"ecdsa-", b"sk-")):
        raise SshKeyError("this is a public key: send the private one, or let the service make a key")
    if b"PuTTY-User-Key-File" in text:
        raise SshKeyError("this is a key in PuTTY's format: export it in OpenSSH's format")
    if b"PRIVATE KEY-----" not in text:
        raise SshKeyError("this is no private key: it must begin with -----BEGIN OPENSSH PRIVATE KEY-----")
    if b"ENCRYPTED" in text:
        raise SshKeyError(_LOCKED)
    try:
        if text.startswith(_OPENSSH):
            return load_ssh_private_key(text, password=None)
        return load_pem_private_key(text, password=None)
    except TypeError:
        raise SshKeyError(_LOCKED) from None
    except (ValueError, UnsupportedAlgorithm) as error:
        if "password" in str(error).lower():
            raise SshKeyError(_LOCKED) from None
        # Not the library's message: it might contain parts of the key.
        raise SshKeyError("the private key is damaged, or of a type that is not supported") from None


_LOCKED = (
    "the key has a passphrase, which the service cannot type: let the service make a key of its own,"
    " or take the passphrase off a copy (ssh-keygen -p)"
)


def _ssh_key(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey, comment: str) -> SshKey:
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    return SshKey(
        "SHA256:" + base64.b64encode(digest).decode().rstrip("="),
        f"{public.decode('ascii')} {comment}",
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
    )
