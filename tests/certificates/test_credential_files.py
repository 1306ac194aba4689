from __future__ import annotations

import stat
from pathlib import Path

import pytest

from pdm.workqueue.certificates.files import FILE_PREFIXES, CredentialFiles, CredentialFilesError


def test_files_are_private_and_distinct(tmp_path: Path) -> None:
    folder = tmp_path / "var" / "credentials"
    files = CredentialFiles(folder)
    first, second = files.write(b"one"), files.write(b"two")
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    files.remove(first)
    files.remove(first)
    assert list(folder.iterdir()) == [second]


def test_sweep_removes_what_a_daemon_before_left(tmp_path: Path) -> None:
    for kind in FILE_PREFIXES:
        assert CredentialFiles(tmp_path / "c").write(b"left", kind).name.startswith(kind)
    (tmp_path / "c" / "notes.txt").touch()
    files = CredentialFiles(tmp_path / "c")
    assert (files.sweep(), files.sweep()) == (len(FILE_PREFIXES), 0)
    assert [each.name for each in (tmp_path / "c").iterdir()] == ["notes.txt"]


def test_open_folder_is_closed(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir(mode=0o755)
    CredentialFiles(tmp_path / "c")
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700


def test_unsafe_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").touch()
    for name in ("link", "file", "file/below"):
        with pytest.raises(CredentialFilesError):
            CredentialFiles(tmp_path / name)


def test_only_own_files_are_removed(tmp_path: Path) -> None:
    files = CredentialFiles(tmp_path / "c")
    (tmp_path / "other").touch()
    with pytest.raises(ValueError, match="is not in"):
        files.remove(tmp_path / "other")
    assert (tmp_path / "other").exists()
