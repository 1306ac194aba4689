"""``pdm`` with a certificate or key of one's own that needs a word: too short, encrypted, legacy."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from pdm.workqueue.certificates.authority import Authority
from tests.support.forging import certified, odd_proxy

#: A closed port: an attempt to connect means that the certificate is usable.
_NOWHERE = "https://localhost:9"
_PDM = [sys.executable, "-m", "pdm.workqueue.cli"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with ``~/.globus``, whose key is encrypted, and other files of certificates."""
    directory = tmp_path_factory.mktemp("home")
    (directory / ".globus").mkdir()
    authority = Authority.create("/DC=org/DC=test/CN=CA")
    alice = authority.user("Alice")
    authority.write(directory)
    alice.write_certificate(directory / ".globus" / "usercert.pem")
    (directory / ".globus" / "userkey.pem").write_bytes(
        alice.key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"o pen"))
    )
    short = rsa.generate_private_key(65537, 1024)
    certified(authority, "/DC=org/DC=test/CN=Short", key=short).write_bundle(directory / "short.pem")
    odd_proxy(alice, None, name="proxy").write_bundle(directory / "legacy.pem")
    return directory


def environment(home: Path, **more: str) -> dict[str, str]:
    return {"HOME": str(home), "PATH": os.defpath, "PDM_URL": _NOWHERE, "PDM_CA": str(home / "ca.crt"), **more}


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        ({"PDM_CERT": "short.pem"}, 2, "(/DC=org/DC=test/CN=Short) has only 1024 bits, and TLS needs 2048: get a new"),
        ({"X509_USER_PROXY": "legacy.pem"}, 4, "holds a legacy proxy (GT2 or GT3): make an RFC 3820 proxy"),
        ({}, 4, "userkey.pem is encrypted with a passphrase, which pdm asks for on a terminal"),
        ({"PDM_CA": "/nowhere"}, 4, "PDM_CA: /nowhere cannot be read"),
    ],
)
def test_one_line_says_what_is_wrong(home: Path, more: dict[str, str], code: int, words: str) -> None:
    done = subprocess.run(
        [*_PDM, "jobs"],
        env=environment(home, **more),
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1), done.stderr
    assert words in done.stderr


@pytest.mark.parametrize(
    ("typed", "code", "words"),
    [
        (["wrong", "o pen"], 5, "cannot be reached"),
        (["wrong", "", "o pe"], 4, "that is not the passphrase of the key in"),
        (["\x03"], 130, "interrupted"),
    ],
)
def test_a_passphrase_is_asked_for(home: Path, typed: list[str], code: int, words: str) -> None:
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(home)
        # A test run that a shell has put into the background passes on that SIGINT is ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.execve(_PDM[0], [*_PDM, "jobs"], environment(home))
    said, asked, deadline = "", 0, time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if select.select([terminal], [], [], 1.0)[0]:
                said += os.read(terminal, 4096).decode()
        except OSError:
            break
        if said.count("userkey.pem: ") > asked < len(typed):
            # The question is there before the echo is off, which discards what was typed.
            time.sleep(0.2)
            os.write(terminal, (typed[asked] + ("\n" if typed[asked] != "\x03" else "")).encode())
            asked += 1
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == code, said
    assert words in said
    assert "o pe" not in said
