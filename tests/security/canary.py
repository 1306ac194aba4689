"""Secrets of the tests, and where they must not be: in logs and databases that tests leave.

Every session of pytest ends with a look for them (``tests/conftest.py``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

#: Tests that need a password or a token use these.
PASSWORD = "canary-passw0rd-4711"
TOKEN = "canarytoken4711.canarytoken4711"
#: What stands in a private key of any kind and nowhere else; keys have their files, which are not looked at.
_MARKS = tuple(f"-----BEGIN {kind}PRIVATE KEY-----".encode() for kind in ("", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED "))
_secrets = [PASSWORD.encode(), TOKEN.encode(), *_MARKS]
_KINDS = (".log", ".sqlite", ".sqlite-wal", ".jsonl")
#: Logs of jobs: `pdm.workqueue.logstore.attempt_log.log_name`.
_JOB_LOG = re.compile(r"log(-.*)?")
_PIECE = 1024 * 1024


def watched(secret: str) -> str:
    """A secret that a test was given, looked for from now on."""
    _secrets.append(secret.encode())
    return secret


def found_in(directory: Path) -> Iterator[str]:
    """Files below a directory that hold a secret, each with the secret's beginning."""
    for place, _, names in os.walk(directory):
        for name in names:
            path = Path(place) / name
            is_watched = name.endswith(_KINDS) or _JOB_LOG.fullmatch(name)
            if is_watched and not path.is_symlink() and path.is_file():
                yield from (f"{path}: {secret[:24].decode()}…" for secret in _secrets_in(path))


def _secrets_in(path: Path) -> set[bytes]:
    seen: set[bytes] = set()
    before, longest = b"", max(map(len, _secrets))
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                text = before + piece
                seen |= {secret for secret in _secrets if secret in text}
                before = text[-longest:]
    except OSError:
        # Some tests take the right to read away.
        return seen
    return seen
