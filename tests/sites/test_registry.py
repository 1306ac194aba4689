"""The files of sites.d: what they give, what is refused, how they are read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.logger import LogEvent

from pdm.workqueue.config.reader import ConfigError
from pdm.workqueue.domain.enums import JobProtocol, MoverKind
from pdm.workqueue.sites.registry import SiteRegistry, moved_by_tools
from pdm.workqueue.sites.storage_urls import storage_url

Refused = Callable[[str], str]

_GOOD = "[RAL]\nid = 13\ngridftp = gsiftp://ral.example.org:2811\n"
_EXAMPLE = Path(__file__).parents[2] / "etc" / "sites.d" / "example.conf"


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Reads an invalid file; returns the error message."""

    def read(text: str) -> str:
        (tmp_path / "sites.conf").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            SiteRegistry.read(tmp_path)
        told = str(caught.value)
        assert told.startswith(str(tmp_path))
        assert told.isprintable()
        assert len(told) < 600
        return told

    return read


def test_sites_are_read(tmp_path: Path) -> None:
    (tmp_path / "b.conf").write_text(
        _GOOD + "description = Rutherford\ndefault_folder = /store\nhttps = davs://h:443/dav/\n"
    )
    (tmp_path / "a.conf").write_text("[local]\nid=2\nfile = file:///srv/./data%20x/\ndummy = dummy://a/\n")
    (tmp_path / "c.conf~").write_text("not a site file")
    (tmp_path / ".d.conf").write_text("not a site file")
    registry = SiteRegistry.read(tmp_path)
    assert [site.id for site in registry.all()] == [2, 13]
    ral = registry.by_id(13)
    assert ral is not None
    assert (ral.name, ral.description, ral.default_folder) == ("RAL", "Rutherford", "/store")
    assert ral.endpoints == {
        JobProtocol.GRIDFTP: "gsiftp://ral.example.org:2811",
        JobProtocol.HTTPS: "davs://h:443/dav",
    }
    local = registry.by_id(2)
    assert local is not None
    assert local.default_folder == "~"
    assert local.endpoints == {JobProtocol.FILE: "file:///srv/data%20x", JobProtocol.DUMMY: "dummy://a"}
    assert registry.by_id(3) is None


def test_limits(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "sites.conf").write_text("[A]\nid=1\ndummy=dummy://a\nlimit_in = 3\n[B]\nid=2\ndummy=dummy://b\n")
    narrow, wide = SiteRegistry.read(tmp_path).all()
    assert (narrow.limit_in, narrow.limit_out, wide.limit_in, wide.limit_out) == (3, None, None, None)
    for key, number in (("limit_in", "0"), ("limit_out", "1001"), ("limit_out", "")):
        told = refused(f"[RAL]\nid = 1\ndummy = dummy://a\n{key} = {number}\n")
        assert f"[RAL] {key}: a whole number from 1 to 1000 is expected" in told


def test_no_file_is_no_site(tmp_path: Path) -> None:
    assert SiteRegistry.read(tmp_path).all() == []


def test_a_missing_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the directory of sites cannot be read: No such file"):
        SiteRegistry.read(tmp_path / "sites.d")


@pytest.mark.parametrize("number", ["", "0", "-1", "1.0", "x", "٣", "1_0", "0x1", "2147483648", "9" * 40])
def test_ids(refused: Refused, number: str) -> None:
    assert "[RAL] id: a whole number from 1 to 2147483647 is expected" in refused(
        f"[RAL]\nid = {number}\ndummy = dummy://a\n"
    )


def test_a_missing_id(refused: Refused) -> None:
    assert "[RAL] id: a whole number" in refused("[RAL]\ndummy = dummy://a\n")


def test_an_id_given_twice(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "other.conf").write_text("[Other]\nid = 13\ndummy = dummy://a\n")
    told = refused(_GOOD)
    assert "[RAL] has id 13, and so has" in told
    assert "other.conf: [Other]" in told


def test_a_name_given_twice(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "other.conf").write_text("[ral]\nid = 1\ndummy = dummy://a\n")
    assert "has the name RAL, and so has" in refused(_GOOD)


@pytest.mark.parametrize(
    "name", ["12", "1a", "-a", "a:b", "a/b", "a b", " ", "a\tb", "a\x1bb", "a" * 65, "~", "a%b", "١"]
)
def test_names(refused: Refused, name: str) -> None:
    assert "is no name for a site" in refused(f"[{name}]\nid = 1\ndummy = dummy://a\n")


@pytest.mark.parametrize("name", ["A", "local-a", "T2_UK.x", "Zürich"])
def test_good_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "s.conf").write_text(f"[{name}]\nid = 1\ndummy = dummy://a\n", encoding="utf-8")
    assert SiteRegistry.read(tmp_path).all()[0].name == name


def test_a_site_without_endpoint(refused: Refused) -> None:
    assert "[RAL] has no endpoint: give at least one of gridftp, ssh" in refused("[RAL]\nid = 1\n")


@pytest.mark.parametrize(
    ("key", "told"),
    [("gridftpp", "did you mean gridftp?"), ("ftp", "unknown key ftp"), ("ID", "unknown key ID"), ("a\x1b", "\\x1b")],
)
def test_unknown_keys(refused: Refused, key: str, told: str) -> None:
    assert told in refused(f"{_GOOD}{key} = x\n")


@pytest.mark.parametrize(
    ("key", "url", "told"),
    [
        ("gridftp", "", "begins with gsiftp://"),
        ("gridftp", "ftp://h:1", "begins with gsiftp://"),
        ("gridftp", "h:2811", "begins with gsiftp://"),
        ("gridftp", "gsiftp://user:secret@h:2811", "without user and password"),
        ("ssh", "sftp://user@h:22", "without user and password"),
        ("gridftp", "gsiftp://", "SCHEME://HOST:PORT"),
        ("gridftp", "gsiftp://:2811", "SCHEME://HOST:PORT"),
        ("gridftp", "gsiftp://h:", "SCHEME://HOST:PORT"),
        ("gridftp", "gsiftp://h:x", "SCHEME://HOST:PORT"),
        ("gridftp", "gsiftp://h:0", "port from 1 to 65535"),
        ("gridftp", "gsiftp://h:99999", "Port out of range"),
        ("gridftp", "gsiftp://h:1/data", "ends after HOST:PORT"),
        ("gridftp", "gsiftp://h:1?x", "without '?'"),
        ("gridftp", "gsiftp://h:1#x", "without '?'"),
        ("gridftp", "gsiftp://h h:1", "plain characters"),
        ("gridftp", "gsiftp://h:1\n  gsiftp://i:1 x", "plain characters"),
        ("file", "file:///a\n  file:///b", "one directory"),
        ("gridftp", "gsiftp://h\x1b[2J:1", "plain characters"),
        ("gridftp", "gsiftp://hé:1", "plain characters"),
        ("https", "http://h:1", "begins with https:// or davs://"),
        ("s3", "s3://h:1/bucket", "without TLS"),
        ("s3", "s3s://h:1", "s3s://HOST:PORT/BUCKET is expected"),
        ("s3", "s3s://h:1/bucket/../other", "without empty names"),
        ("s3", "s3sv://h:1", "s3sv://BUCKET.HOST:PORT is expected"),
        ("https", "https://h:1/" + "a" * 300, "file name must not be longer"),
        ("file", "file://host/srv", "file:///DIRECTORY"),
        ("file", "/srv", "begins with file://"),
        ("file", "file:///srv/../etc", "without NUL and '..'"),
        ("file", "file:///srv/%2e%2e/etc", "without NUL and '..'"),
        ("file", "file:///srv%00", "without NUL and '..'"),
    ],
)
def test_endpoints(refused: Refused, key: str, url: str, told: str) -> None:
    answer = refused(f"[S]\nid = 1\n{key} = {url}\n")
    assert f"[S] {key}: " in answer
    assert told in answer
    assert "secret" not in answer


@pytest.mark.parametrize("directory", ["data", "", "~user", "/a/../b", "/a\n  b"])
def test_default_directories(refused: Refused, directory: str) -> None:
    assert "[RAL] default_folder: " in refused(f"{_GOOD}default_folder = {directory}\n")


def test_descriptions(refused: Refused) -> None:
    assert "[RAL] description: one line" in refused(f"{_GOOD}description = a\n  b\n")


def test_reload_takes_what_is_new(tmp_path: Path) -> None:
    file = tmp_path / "sites.conf"
    file.write_text(_GOOD)
    registry = SiteRegistry.read(tmp_path)
    file.write_text(_GOOD.replace("13", "14"))
    assert registry.reload() is None
    assert registry.by_id(13) is None
    assert registry.by_id(14) is not None


def test_reload_of_a_bad_file_keeps_what_was(tmp_path: Path, lost_errors: list[LogEvent]) -> None:
    file = tmp_path / "sites.conf"
    file.write_text(_GOOD)
    registry = SiteRegistry.read(tmp_path)
    file.write_text(_GOOD + "bad = 1\n")
    told = registry.reload()
    assert told is not None
    assert "unknown key bad" in told
    assert registry.by_id(13) is not None
    (event,) = lost_errors
    assert event["reason"] == told
    lost_errors.clear()


def test_the_example_is_good(tmp_path: Path) -> None:
    text = _EXAMPLE.read_text(encoding="utf-8")
    (tmp_path / "as_it_is.conf").write_text(text)
    assert SiteRegistry.read(tmp_path).all() == []
    example = text.partition("# For example:")[2].replace("#   ", "").replace("#\n", "\n")
    (tmp_path / "used.conf").write_text(example)
    (site,) = SiteRegistry.read(tmp_path).all()
    assert site.id == 13


@pytest.mark.parametrize("text", ["host", ":7512", "host:", "host:0", "host:65536", "-s:1", "a b:1", "host:1/x", ""])
def test_a_myproxy_server_is_host_and_port(tmp_path: Path, text: str) -> None:
    file = tmp_path / "sites.conf"
    file.write_text(f"[A]\nid = 1\ndummy = dummy://a/\nmyproxy = {text}\n")
    with pytest.raises(ConfigError, match="myproxy: HOST:PORT is expected"):
        SiteRegistry.read(tmp_path)
    file.write_text("[A]\nid = 1\ndummy = dummy://a/\nmyproxy = proxy.example.org:7512\n")
    site = SiteRegistry.read(tmp_path).by_id(1)
    assert site is not None
    assert site.myproxy == "proxy.example.org:7512"


def test_a_site_that_is_moved_by_the_tools(tmp_path: Path) -> None:
    """It may be of a scheme that only they know."""
    file = tmp_path / "sites.conf"
    srm = "srm://se.example.org:8443/srm/managerv2?SFN="
    for url in (srm, "srm://se.example.org:8443", "dcap://se.example.org:22125", "gsiftp://se.example.org:2811"):
        file.write_text(f"[A]\nid = 1\ngridftp = {url}\nmover = tools\n")
        site = SiteRegistry.read(tmp_path).by_id(1)
        assert site is not None
        assert site.mover is MoverKind.TOOLS
        assert storage_url(site, JobProtocol.GRIDFTP, "/store/a b") == f"{url}/store/a%20b"
    for text, message in (
        (f"gridftp = {srm}\n", "gridftp: a URL that begins with gsiftp:// is expected"),
        (f"gridftp = {srm}x\nmover = tools\n", "gridftp: a URL without '[?]'"),
        ("gridftp = gsiftp://a:1\nmover = fts\n", "mover: native or tools is expected"),
    ):
        file.write_text(f"[A]\nid = 1\n{text}")
        with pytest.raises(ConfigError, match=message):
            SiteRegistry.read(tmp_path)


def test_a_site_with_an_fts3(tmp_path: Path) -> None:
    file = tmp_path / "sites.conf"
    file.write_text("[A]\nid = 1\ngridftp = gsiftp://a:1\nfts = https://fts3.example.org:8446/\n")
    site = SiteRegistry.read(tmp_path).by_id(1)
    assert site is not None
    assert site.fts == "https://fts3.example.org:8446"
    for bad in ("http://f:1", "https://f", "https://f:0", "https://f:1/rest", "f:8446"):
        file.write_text(f"[A]\nid = 1\ngridftp = gsiftp://a:1\nfts = {bad}\n")
        with pytest.raises(ConfigError, match="fts: "):
            SiteRegistry.read(tmp_path)


def test_whose_movement_a_job_has(tmp_path: Path) -> None:
    (tmp_path / "sites.conf").write_text(
        "[A]\nid = 1\ngridftp = gsiftp://a:1\nmover = tools\n[B]\nid = 2\ngridftp = gsiftp://b:1\n"
    )
    tools, native = SiteRegistry.read(tmp_path).all()
    assert moved_by_tools(JobProtocol.GRIDFTP, None, [native, tools])
    assert not moved_by_tools(JobProtocol.GRIDFTP, None, [native])
    assert moved_by_tools(JobProtocol.GRIDFTP, "tools", [native])
    assert not moved_by_tools(JobProtocol.GRIDFTP, "native", [tools])
    assert not moved_by_tools(JobProtocol.SSH, None, [tools])
