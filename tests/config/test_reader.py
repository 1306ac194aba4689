"""The configuration file: values, defaults and error messages."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import make_url

from pdm.workqueue.config.reader import ConfigError, read_settings
from pdm.workqueue.config.settings import Settings

ReadText = Callable[[str], Settings]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "workqueue.conf"


@pytest.fixture
def read_text(file: Path) -> ReadText:
    def read_it(text: str) -> Settings:
        file.write_text(text, encoding="utf-8")
        return read_settings(file)

    return read_it


def test_an_empty_file_gives_the_defaults_beside_itself(read_text: ReadText, tmp_path: Path) -> None:
    settings = read_text("")
    assert settings.server.port == 8443
    assert settings.tls.trust == tmp_path / "certificates" / "trust"
    assert settings.database.url == f"sqlite:///{tmp_path}/var/workqueue.sqlite"
    assert settings.logs.folder == tmp_path / "var" / "logs"
    assert settings.credentials.key_file == tmp_path / "var" / "credentials.key"
    assert settings.credentials.trust_dir == Path("/etc/grid-security/certificates")
    assert settings.users.listed_users is None


def test_what_is_written_is_read(read_text: ReadText, tmp_path: Path) -> None:
    settings = read_text(
        "\ufeff# first\n"
        "[server]\nhost = ::\nport=0\nbody_limit = 2MiB\n"
        "[users]\n; a comment\noperators =\n  /DC=org/CN=One\n\n  # another\n  /DC=org/CN=Two # %(not a comment)\n"
        "[queue]\nlease = 2m\nleast_rate = 1MB\n"
        "[tls]\ntrust = /etc/grid-security/certificates\ncrl = require\n"
        "[logs]\nfile = daemon.log\n"
        "[credentials]\nkey_bits = 3072\n"
    )
    assert settings.server.host == "::"
    assert settings.server.port == 0
    assert settings.server.body_limit_bytes == 2 * 1024**2
    assert settings.users.operators == ("/DC=org/CN=One", "/DC=org/CN=Two # %(not a comment)")
    assert settings.queue.lease_s == 120
    assert settings.queue.least_rate_bytes == 1_000_000
    assert settings.tls.trust == Path("/etc/grid-security/certificates")
    assert settings.tls.crl == "require"
    assert settings.logs.file == tmp_path / "daemon.log"
    assert settings.credentials.key_bits == 3072


def test_what_is_not_set_follows_the_state_directory(read_text: ReadText, tmp_path: Path) -> None:
    settings = read_text("[state]\nfolder = /var/lib/pdm\n[logs]\nfolder = logs\n")
    assert settings.database.url == "sqlite:////var/lib/pdm/workqueue.sqlite"
    assert settings.credentials.folder == Path("/var/lib/pdm/credentials")
    assert settings.logs.folder == tmp_path / "logs"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///a/b.db", "sqlite:///{directory}/a/b.db"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://u:p%40@h/db", "postgresql://u:p%40@h/db"),
    ],
)
def test_database_urls(read_text: ReadText, tmp_path: Path, url: str, expected: str) -> None:
    assert read_text(f"[database]\nurl = {url}\n").database.url == expected.format(directory=tmp_path)


def test_a_state_directory_with_odd_letters(read_text: ReadText) -> None:
    url = read_text("[state]\nfolder = /a b%41#?é\n").database.url
    assert make_url(url).database == "/a b%41#?é/workqueue.sqlite"


def test_a_configuration_directory_with_odd_letters(tmp_path: Path) -> None:
    directory = tmp_path / "a b%41?"
    directory.mkdir()
    (directory / "x.conf").write_text("[database]\nurl = sqlite:///my%20data.db\n")
    assert make_url(read_settings(directory / "x.conf").database.url).database == f"{directory}/my data.db"


def test_a_wrong_database_url_keeps_its_password(read_text: ReadText) -> None:
    with pytest.raises(ConfigError, match=r"\[database\] url: a URL is expected") as caught:
        read_text("[database]\nurl = secret word\n")
    assert "secret" not in str(caught.value)


def test_the_helpers_python(read_text: ReadText, tmp_path: Path) -> None:
    assert read_text("").agents.python == Path(sys.executable)
    assert read_text("[agents]\npython = bin/python\n").agents.python == tmp_path / "bin/python"


def test_overrides_are_stronger(file: Path) -> None:
    file.write_text("[server]\nport = 1\nhost = a\n")
    settings = read_settings(file, {"server.port": "0", "logs.level": "debug"})
    assert (settings.server.port, settings.server.host, settings.logs.level) == (0, "a", "debug")
    with pytest.raises(ConfigError, match=r"\[server\] unknown key prt; did you mean port\?"):
        read_settings(file, {"server.prt": "0"})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[servr]\n", r"unknown section \[servr\]; did you mean server\?"),
        ("[DEFAULT]\na=1\n", r"unknown section \[DEFAULT\]; known are admin, agents, credentials"),
        ("[server]\nprt = 1\n", r"\[server\] unknown key prt; did you mean port\?"),
        ("[server]\nPort = 1\n", r"\[server\] unknown key Port"),
        ("[server]\nbody_limit_bytes = 1\n", r"unknown key body_limit_bytes; did you mean body_limit\?"),
        ("[server]\nport = x\n", r"\[server\] port: a whole number is expected"),
        ("[server]\nport = -1\n", r"\[server\] port: '-1' is out of range: at least 0 is expected"),
        ("[server]\nport = 65536\n", r"\[server\] port: '65536' is out of range: at most 65535"),
        ("[server]\nhost =\n", r"\[server\] host: a value is expected"),
        ("[server]\nhost = a\n  port = 2\n", r"\[server\] host: one line is expected: is the line after it indented"),
        ("[queue]\nlease = 30\n", r"\[queue\] lease: a duration is expected, such as 500ms"),
        ("[queue]\nstall = 0\n", r"\[queue\] stall: '0' is out of range: more than 0"),
        ("[node]\nname = a/b\n", r"\[node\] name: 'a/b': letters, digits"),
        ("[node]\naddress = node1:8443\n", r"\[node\] address: 'node1:8443': https://HOST:PORT is expected"),
        ("[node]\naddress = https://node1:8443/\n", r"\[node\] address: .*: https://HOST:PORT is expected"),
        ("[node]\naddress = https://u@node1:8443\n", r"\[node\] address: .*: https://HOST:PORT is expected"),
        ("[logs]\nhead = 0\n", r"\[logs\] head: '0' is out of range: at least 1"),
        ("[logs]\nformat = xml\n", r"\[logs\] format: 'xml' is not known: one of text, json is expected"),
        ("[credentials]\nkey_bits = 1024\n", r"\[credentials\] key_bits: '1024' is not known: one of 2048"),
        ("[users]\noperators = bob\n", r"\[users\] operators: 'bob' is no subject"),
        ("[tls]\nkey =\n", r"\[tls\] key: a path is expected"),
        ("port = 1\n", "line 1: a key is before the first"),
        ("[server]\nport = 1\nport = 2\n", r"line 3: \[server\] port is there twice"),
        ("[server]\n[tls]\n[server]\n", r"line 3: section \[server\] is there twice"),
        ("[server]\nport\n", "line 2: 'key = value'"),
        ("[server\nport = 1\n", "line 1: "),
    ],
)
def test_mistakes_are_named(read_text: ReadText, file: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        read_text(text)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_long_wrong_value_is_cut(read_text: ReadText) -> None:
    with pytest.raises(ConfigError) as caught:
        read_text("[logs]\nformat = " + "x" * 10_000)
    assert len(str(caught.value)) < 400


def test_files_that_cannot_be_read(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_settings(file)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        read_settings(tmp_path)
    file.write_bytes(b"[server]\nhost = \xff\n")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_settings(file)


def test_a_relative_file_is_found_from_here(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("")
    monkeypatch.chdir(file.parent)
    settings = read_settings(Path(file.name))
    os.chdir("/")
    assert settings.source == file
    assert settings.state.folder == file.parent / "var"


def test_how_long_things_are_kept(read_text: ReadText) -> None:
    kept = read_text("[retention]\njobs = 90d\nlogs = forever\n").retention
    assert (kept.jobs_s, kept.logs_s, kept.receipts_s) == (90 * 86400, math.inf, math.inf)
    assert kept.events_s == 30 * 86400
    assert read_text("[events]\nkeep = 12h\n").retention.events_s == 12 * 3600


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[retention]\njobs = 6d\n", r"\[retention\] jobs: '6d' is out of range: at least 604800"),
        ("[retention]\njobs = always\n", r"\[retention\] jobs: a duration is expected, .* or forever"),
        ("[events]\nkeep = 1m\n", r"\[events\] keep: '1m' is out of range: at least 3600"),
        ("[events]\nkeep = 2d\n[retention]\nevents = 3d\n", r"\[events\] keep is the earlier name of .*: remove it"),
    ],
)
def test_mistakes_in_what_is_kept_are_named(read_text: ReadText, text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_text(text)
