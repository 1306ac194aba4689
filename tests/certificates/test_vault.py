"""Sealed secrets: they open where they belong, and nowhere else."""

from __future__ import annotations

import base64
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.certificates.vault import Vault, VaultError


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault.open(tmp_path / "vault.key")


def test_key_file_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "var" / "vault.key"
    first = Vault.open(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["vault.key"]
    assert Vault.open(path).unseal(first.seal(b"secret", "a"), "a") == b"secret"


def test_sealed_shows_nothing(vault: Vault) -> None:
    sealed = vault.seal(b"secret", "proxy of user 7")
    assert sealed.startswith(b"pdm1")
    assert b"secret" not in sealed
    assert vault.seal(b"secret", "proxy of user 7") != sealed
    assert "_keys" not in repr(vault)


def test_sealed_belongs_to_its_context(vault: Vault) -> None:
    sealed = vault.seal(b"secret", "proxy of user 7")
    for other in ("proxy of user 8", "proxy of user 77", "", "pending of user 7"):
        with pytest.raises(VaultError, match="belongs to something else"):
            vault.unseal(sealed, other)


def test_each_changed_bit_is_noticed(vault: Vault) -> None:
    sealed = vault.seal(b"secret", "a")
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= 1
        with pytest.raises(VaultError):
            vault.unseal(bytes(changed), "a")
    for length in range(len(sealed)):
        with pytest.raises(VaultError):
            vault.unseal(sealed[:length], "a")
    with pytest.raises(VaultError):
        vault.unseal(sealed + b"x", "a")


@given(st.binary(max_size=200))
def test_garbage_is_refused_in_words(tmp_path_factory: pytest.TempPathFactory, garbage: bytes) -> None:
    vault = Vault.open(tmp_path_factory.getbasetemp() / "garbage.key")
    with pytest.raises(VaultError):
        vault.unseal(garbage, "a")


def test_key_can_be_changed(vault: Vault, tmp_path: Path) -> None:
    sealed = vault.seal(b"old", "a")
    other = Vault.open(tmp_path / "other.key")
    with pytest.raises(VaultError, match="not in"):
        other.unseal(sealed, "a")
    both = tmp_path / "both.key"
    both.touch(0o600)
    both.write_text((tmp_path / "other.key").read_text() + (tmp_path / "vault.key").read_text())
    changed = Vault.open(both)
    assert changed.unseal(sealed, "a") == b"old"
    assert other.unseal(changed.seal(b"new", "a"), "a") == b"new"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("hello", "is no key file"),
        ("pdm-vault-1 " + base64.b64encode(b"short").decode(), "is no key file"),
        ("pdm-vault-9 " + base64.b64encode(bytes(32)).decode(), "is no key file"),
        ("\xff\xfe", "is no key file"),
    ],
)
def test_other_files_are_no_key_files(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(VaultError, match=words):
        Vault.open(path)


def test_key_file_that_others_can_read_is_refused(vault: Vault) -> None:
    vault.path.chmod(0o640)
    with pytest.raises(VaultError, match="chmod 600"):
        Vault.open(vault.path)


def test_key_file_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(VaultError, match="cannot be used"):
        Vault.open(tmp_path / "file" / "key")
