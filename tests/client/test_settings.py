"""Where the client looks for the service, the caller's certificate and the authorities."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pdm.workqueue.client.errors import SettingsError
from pdm.workqueue.client.settings import ClientSettings, find_settings

URL = {"PDM_URL": "https://queue.example.org:8443"}
#: A user that no file in /tmp belongs to.
NOBODY = 2**31 - 5


def write(home: Path, text: str) -> None:
    directory = home / ".config" / "pdm"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "client.conf").write_text(text)


def test_the_environment_counts_before_the_file_and_the_grid(tmp_path: Path) -> None:
    write(tmp_path, "[client]\nurl = https://other:1\ncertificate = c\nkey = k\nca = a\n")
    environ = {**URL, "PDM_CERT": "/c.pem", "PDM_KEY": "/k.pem", "PDM_CA": "/ca", "X509_USER_PROXY": "/p"}
    assert find_settings(environ, tmp_path, NOBODY) == ClientSettings(
        "https://queue.example.org:8443", Path("/c.pem"), Path("/k.pem"), Path("/ca")
    )


def test_paths_in_the_file_are_relative_to_it(tmp_path: Path) -> None:
    write(tmp_path, "[client]\nurl = https://q:1/\ncertificate = me.crt\nkey = ~/me.key\nca = /etc/ca.pem\n")
    assert find_settings({"X509_USER_PROXY": "/p"}, tmp_path, NOBODY) == ClientSettings(
        "https://q:1", tmp_path / ".config/pdm/me.crt", tmp_path / "me.key", Path("/etc/ca.pem")
    )


def test_the_file_stands_where_xdg_says(tmp_path: Path) -> None:
    (tmp_path / "pdm").mkdir()
    (tmp_path / "pdm" / "client.conf").write_text("[client]\nurl = https://xdg:1\n")
    found = find_settings({"XDG_CONFIG_HOME": str(tmp_path)}, Path("/nowhere"), NOBODY)
    assert found.url == "https://xdg:1"


def test_the_grid_names_a_proxy_or_a_pair(tmp_path: Path) -> None:
    pair = {"X509_USER_CERT": "/c", "X509_USER_KEY": "/k", "X509_CERT_DIR": "/ca.d"}
    found = find_settings({**URL, **pair}, tmp_path, NOBODY)
    assert (found.certificate, found.key, found.ca) == (Path("/c"), Path("/k"), Path("/ca.d"))
    found = find_settings({**URL, **pair, "X509_USER_PROXY": "/p"}, tmp_path, NOBODY)
    assert (found.certificate, found.key) == (Path("/p"), None)


def test_the_usual_proxy_of_the_user_is_the_last_resort(tmp_path: Path) -> None:
    number = 1_900_000_000 + os.getpid()
    proxy = Path(f"/tmp/x509up_u{number}")
    proxy.write_text("")
    try:
        # A file of that name of another account is not used: /tmp is writable for everybody.
        assert find_settings(URL, tmp_path, number).certificate is None
        if os.getuid() == 0:
            os.chown(proxy, number, -1)
            assert find_settings(URL, tmp_path, number).certificate == proxy
    finally:
        proxy.unlink()


def test_the_pair_and_the_authorities_of_globus_are_the_last_resort(tmp_path: Path) -> None:
    directory = tmp_path / ".globus"
    (directory / "certificates").mkdir(parents=True)
    (directory / "usercert.pem").write_text("")
    found = find_settings(URL, tmp_path, NOBODY)
    assert (found.certificate, found.ca) == (None, directory / "certificates")
    (directory / "userkey.pem").write_text("")
    found = find_settings(URL, tmp_path, NOBODY)
    assert (found.certificate, found.key) == (directory / "usercert.pem", directory / "userkey.pem")
    found = find_settings({**URL, "X509_USER_PROXY": "/p", "X509_CERT_DIR": "/ca.d"}, tmp_path, NOBODY)
    assert (found.certificate, found.key, found.ca, found.ca_named_by) == (
        Path("/p"),
        None,
        Path("/ca.d"),
        "X509_CERT_DIR",
    )


def test_certificate_and_key_are_never_mixed(tmp_path: Path) -> None:
    write(tmp_path, "[client]\ncertificate = /file.crt\nkey = /file.key\n")
    found = find_settings({**URL, "PDM_CERT": "/both.pem"}, tmp_path, NOBODY)
    assert (found.certificate, found.key) == (Path("/both.pem"), None)


@pytest.mark.parametrize(
    ("environ", "file", "words"),
    [
        ({}, "", "the service URL is missing"),
        ({**URL, "PDM_KEY": "/k"}, "", "PDM_KEY is set, but not PDM_CERT"),
        (URL, "[client]\nkey = k\n", "has a key, but no certificate"),
        (URL, "[client]\ncertifcate = k\n", "certificate?"),
        (URL, "[server]\nport = 1\n", "unknown section [server]"),
        (URL, "url = https://x\n", "client.conf"),
        (URL, "[client]\nurl = a\nurl = b\n", "client.conf"),
        ({"PDM_URL": "http://plain:80"}, "", "https://HOST:PORT"),
        ({"PDM_URL": "https://"}, "", "https://HOST:PORT"),
        ({"PDM_URL": "https://host:99999"}, "", "https://HOST:PORT"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, environ: dict[str, str], file: str, words: str) -> None:
    write(tmp_path, file)
    with pytest.raises(SettingsError) as caught:
        find_settings(environ, tmp_path, NOBODY)
    assert words in str(caught.value)
