"""Private files of credentials, and directories of trusted authorities."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.certificates.files import (
    FILE_PREFIXES,
    CredentialFiles,
    CredentialFilesError,
    TrustDirectories,
    read_authorities,
)
from pdm.workqueue.certificates.pem import to_pem
from pdm.workqueue.certificates.trust import read_trust


def test_files_are_private_and_distinct(tmp_path: Path) -> None:
    directory = tmp_path / "var" / "credentials"
    files = CredentialFiles(directory)
    first, second = files.write(b"one"), files.write(b"two")
    assert (first.read_bytes(), second.read_bytes()) == (b"one", b"two")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    files.remove(first)
    files.remove(first)
    assert list(directory.iterdir()) == [second]


def test_sweep_removes_what_a_daemon_before_left(tmp_path: Path) -> None:
    for kind in FILE_PREFIXES:
        assert CredentialFiles(tmp_path / "c").write(b"left", kind).name.startswith(kind)
    (tmp_path / "c" / "notes.txt").touch()
    files = CredentialFiles(tmp_path / "c")
    assert (files.sweep(), files.sweep()) == (len(FILE_PREFIXES), 0)
    assert [each.name for each in (tmp_path / "c").iterdir()] == ["notes.txt"]


def test_open_directory_is_closed(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir(mode=0o755)
    CredentialFiles(tmp_path / "c")
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o700


def test_unsafe_directories_are_refused(tmp_path: Path) -> None:
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


# -- directories of authorities for some sites only


@pytest.fixture(scope="module")
def authorities() -> list[Authority]:
    return [Authority.create(f"/DC=org/DC=test/CN=CA {number}") for number in range(3)]


def pem(authority: Authority) -> str:
    return to_pem(authority.certificate).decode()


def test_usual_ones_and_those_of_the_sites(tmp_path: Path, authorities: list[Authority]) -> None:
    usual, own, other = authorities
    usual.write_trust(tmp_path / "usual")
    directories = TrustDirectories(tmp_path / "run")
    directories.sweep()
    one = directories.directory_for(tmp_path / "usual", [pem(own)])
    assert set(read_trust(one).authorities) == {usual.certificate, own.certificate}
    both = directories.directory_for(tmp_path / "usual", [pem(other), pem(own), pem(own)])
    assert set(read_trust(both).authorities) == {each.certificate for each in authorities}
    assert directories.directory_for(tmp_path / "usual", [pem(own), pem(other)]) == both
    alone = directories.directory_for(None, [pem(own)])
    assert alone != one
    assert directories.directory_for(tmp_path / "nothing", [pem(own)]) == alone
    assert one.stat().st_mode & 0o777 == (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    assert len(list(one.glob("*.signing_policy"))) == 4
    # A list that comes to the usual ones comes here too.
    usual.write_crl(tmp_path / "usual", usual.crl())
    os.utime(tmp_path / "usual", (1, 1))
    assert len(read_trust(directories.directory_for(tmp_path / "usual", [pem(own)])).crls) == 1
    directories.sweep()
    assert list((tmp_path / "run").iterdir()) == []


def test_many_ask_at_once(tmp_path: Path, authorities: list[Authority]) -> None:
    directories = TrustDirectories(tmp_path / "run")
    directories.sweep()
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(lambda _: directories.directory_for(None, [pem(authorities[0])]), range(50)))
    assert list((tmp_path / "run").iterdir()) == list(found)


def test_an_authority_of_the_same_name_stands_beside_the_usual_one(
    tmp_path: Path, authorities: list[Authority]
) -> None:
    usual = authorities[0]
    twin = Authority.create("/DC=org/DC=test/CN=CA 0")
    usual.write_trust(tmp_path / "usual")
    directories = TrustDirectories(tmp_path / "run")
    directories.sweep()
    found = directories.directory_for(tmp_path / "usual", [pem(twin)])
    assert set(read_trust(found).authorities) == {usual.certificate, twin.certificate}
    assert set(read_trust(tmp_path / "usual").authorities) == {usual.certificate}


def test_what_is_no_authority_is_refused(authorities: list[Authority]) -> None:
    host = authorities[0].host(["localhost"], [])
    for text, words in (
        ("", "PEM form"),
        ("-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n", "damaged"),
        (pem(authorities[0]) + "-----BEGIN PRIVATE KEY-----\n", "private key"),
        (to_pem(host.certificate).decode(), "CN=localhost is no authority"),
        (pem(authorities[0]) * 21, "at most 20"),
        (pem(authorities[0]) + "é", "PEM form"),
        (to_pem(Authority.create("/CN=it's").certificate).decode(), "signing policy"),
    ):
        with pytest.raises(ValueError, match=words):
            read_authorities(text)
    assert len(read_authorities("a comment\0\n" + pem(authorities[0]) + pem(authorities[1]))) == 2
