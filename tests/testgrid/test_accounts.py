"""The accounts of grids are made by the first and removed by the last."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

import pytest

from pdm.testgrid import identities

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make accounts")


def exists(account: str) -> bool:
    return account in {entry.pw_name for entry in pwd.getpwall()}


def test_the_last_grid_removes_what_the_first_made(tmp_path: Path) -> None:
    registry, first, second = tmp_path / "registry", tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    user = f"t{os.getpid()}"

    local = identities.acquire_accounts(first, [user], registry)
    assert identities.acquire_accounts(second, [user], registry) == local == {user: f"pdm{user}"}
    assert exists(local[user])

    identities.release_accounts(first, registry)
    assert exists(local[user])
    identities.release_accounts(second, registry)
    assert not exists(local[user])
    assert not registry.exists()


def test_a_grid_whose_directory_is_gone_does_not_count(tmp_path: Path) -> None:
    registry, lost, mine = tmp_path / "registry", tmp_path / "lost", tmp_path / "mine"
    lost.mkdir()
    mine.mkdir()
    user = f"u{os.getpid()}"
    identities.acquire_accounts(lost, [user], registry)
    local = identities.acquire_accounts(mine, [user], registry)
    lost.rmdir()

    identities.release_accounts(mine, registry)

    assert not exists(local[user])


def test_an_account_with_processes_of_a_killed_run_is_removed_later(tmp_path: Path) -> None:
    registry, first, second = tmp_path / "registry", tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    user = f"v{os.getpid()}"
    local = identities.acquire_accounts(first, [user], registry)
    with subprocess.Popen(["sleep", "60"], user=local[user]) as left:
        identities.release_accounts(first, registry)
        assert exists(local[user])
        left.kill()
    identities.acquire_accounts(second, [], registry)

    identities.release_accounts(second, registry)

    assert not exists(local[user])
    assert not registry.exists()


def test_sshd_lets_an_account_in_that_a_grid_has_made(tmp_path: Path) -> None:
    registry, user = tmp_path / "registry", f"w{os.getpid()}"
    local = identities.acquire_accounts(tmp_path, [user], registry)
    try:
        for earlier in ("*", "!"):
            subprocess.run(["usermod", "--password", earlier, local[user]], check=True)
            identities.acquire_accounts(tmp_path, [user], registry)
            shadow = subprocess.run(["getent", "shadow", local[user]], capture_output=True, text=True, check=True)
            assert shadow.stdout.startswith(f"{local[user]}:*:")
    finally:
        identities.release_accounts(tmp_path, registry)


def test_an_account_that_was_there_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "_PREFIX", "")
    registry = tmp_path / "registry"

    assert identities.acquire_accounts(tmp_path, ["nobody"], registry) == {"nobody": "nobody"}
    identities.release_accounts(tmp_path, registry)

    assert exists("nobody")
