"""The search for secrets that ends each session finds some where there are some."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.security import canary


@pytest.mark.parametrize("secret", [canary.PASSWORD, canary.TOKEN, "-----BEGIN RSA PRIVATE KEY-----"])
def test_what_it_finds(tmp_path: Path, secret: str) -> None:
    logs = tmp_path / "logs" / "ab"
    logs.mkdir(parents=True)
    for name in ("log", "log-host-01", "daemon.log"):
        (logs / name).write_bytes(b"x" * (1024 * 1024 - 5) + secret.encode() + b"\n")
    (tmp_path / "workqueue.sqlite").write_text(f"a row {secret}")
    (tmp_path / "host.key").write_text(secret)
    found = list(canary.found_in(tmp_path))
    # It would be found once more when the session ends.
    shutil.rmtree(logs)
    (tmp_path / "workqueue.sqlite").unlink()
    assert len(found) == 4
    assert all(secret[:10] in line for line in found)
