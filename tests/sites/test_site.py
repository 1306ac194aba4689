"""The URL of a path at a site."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.paths import InvalidPathError, bytes_from_text
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.sites.storage_urls import EndpointUrls, NotOfferedError, storage_url

SITE = Site(
    1,
    "S",
    "",
    "/store/user",
    {
        JobProtocol.GRIDFTP: "gsiftp://h:2811",
        JobProtocol.FILE: "file:///srv/data%20x",
        JobProtocol.XROOT: "root://h:1094",
        JobProtocol.HTTPS: "https://h/dav",
        JobProtocol.DUMMY: "dummy://a",
    },
)


@pytest.mark.parametrize(
    ("protocol", "path", "url"),
    [
        (JobProtocol.GRIDFTP, "/a b/%41#?*", "gsiftp://h:2811/a%20b/%2541%23%3F%2A"),
        (JobProtocol.GRIDFTP, "x", "gsiftp://h:2811/store/user/x"),
        (JobProtocol.GRIDFTP, "~", "gsiftp://h:2811/~"),
        (JobProtocol.GRIDFTP, "~/x", "gsiftp://h:2811/~/x"),
        (JobProtocol.GRIDFTP, "~x", "gsiftp://h:2811/store/user/~x"),
        (JobProtocol.GRIDFTP, "/é\n\uef80", "gsiftp://h:2811/%C3%A9%0A%80"),
        (JobProtocol.GRIDFTP, "/a/", "gsiftp://h:2811/a/"),
        (JobProtocol.XROOT, "/a", "root://h:1094//a"),
        (JobProtocol.HTTPS, "/a", "https://h/dav/a"),
        *[
            (protocol, path, url + below)
            for protocol, url in ((JobProtocol.HTTPS, "https://h/dav"), (JobProtocol.XROOT, "root://h:1094/"))
            for path, below in (
                ("~", "/"),
                ("~/x", "/x"),
                ("/a//./b/../c/", "/a/c"),
                ("/~", "/~"),
                ("x", "/store/user/x"),
            )
        ],
        (JobProtocol.DUMMY, "/a", "dummy://a/a"),
        (JobProtocol.FILE, "/", "file:///srv/data%20x/"),
        (JobProtocol.FILE, "~", "file:///srv/data%20x/"),
        (JobProtocol.FILE, "~/a", "file:///srv/data%20x/a"),
        (JobProtocol.FILE, "~a", "file:///srv/data%20x/store/user/~a"),
        (JobProtocol.FILE, "/x/./y//../z", "file:///srv/data%20x/x/z"),
        (JobProtocol.FILE, "..", "file:///srv/data%20x/store"),
        (JobProtocol.FILE, "/..x/...", "file:///srv/data%20x/..x/..."),
    ],
)
def test_urls(protocol: JobProtocol, path: str, url: str) -> None:
    assert storage_url(SITE, protocol, path) == url


@pytest.mark.parametrize("path", ["/..", "/a/../..", "../../..", "~/..", "/a/../../srv/data x/b", "/./.."])
def test_no_way_out_of_a_root(path: str) -> None:
    with pytest.raises(InvalidPathError, match="leads out of the site's directory"):
        storage_url(SITE, JobProtocol.FILE, path)
    with pytest.raises(InvalidPathError, match="leads out of the site's server"):
        storage_url(SITE, JobProtocol.HTTPS, path)


@pytest.mark.parametrize("path", ["", "a\0b", "/" + "a" * 256, "/a" * 3000, "\ud800"])
def test_paths_that_no_site_can_hold(path: str) -> None:
    with pytest.raises(InvalidPathError):
        storage_url(SITE, JobProtocol.GRIDFTP, path)


def test_a_protocol_that_is_not_offered() -> None:
    with pytest.raises(
        NotOfferedError, match=r"site S does not offer SSH: it offers DUMMY, FILE, GRIDFTP, HTTPS, XROOT"
    ):
        storage_url(SITE, JobProtocol.SSH, "/a")


def test_the_root_directory_itself() -> None:
    site = Site(1, "S", "", "/", {JobProtocol.FILE: "file:///"})
    assert storage_url(site, JobProtocol.FILE, "/a") == "file:///a"


@given(
    st.lists(
        st.one_of(
            st.sampled_from(["..", ".", "", "~", "a"]),
            st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=8),
        ),
        max_size=8,
    )
)
def test_a_file_url_is_always_below_its_root(parts: list[str]) -> None:
    path = "/".join(parts)
    try:
        url = storage_url(SITE, JobProtocol.FILE, path)
    except InvalidPathError:
        return
    assert url.startswith("file:///srv/data%20x/")
    place = unquote_to_bytes(url.removeprefix("file://"))
    assert b".." not in place.split(b"/")
    assert Path(place.decode("utf-8", "surrogateescape")).is_relative_to("/srv/data x")
    if parts and not {"..", ".", "", "~"} & set(path.split("/")):
        assert place.endswith(bytes_from_text(path))


_names = st.one_of(
    st.sampled_from(["..", ".", "", "~", "a", "b.root", "x" * 255, "x" * 256, "-", "..."]),
    st.text(st.characters(exclude_characters="\0/", codec="utf-8"), max_size=8),
)


@given(st.lists(st.lists(_names, max_size=6), max_size=6), st.sampled_from(sorted(SITE.endpoints)))
def test_urls_of_many_paths_are_those_of_each(paths: list[list[str]], protocol: JobProtocol) -> None:
    urls = EndpointUrls(SITE, protocol, SITE.endpoints[protocol])
    for path in ["/".join(names) for names in paths for _ in range(2)]:
        try:
            expected = storage_url(SITE, protocol, path)
        except InvalidPathError as error:
            with pytest.raises(InvalidPathError, match=str(error)[:20]):
                urls.of(path)
        else:
            assert urls.of(path) == expected


def test_a_name_for_which_its_directory_leaves_no_room() -> None:
    urls = EndpointUrls(SITE, JobProtocol.GRIDFTP, SITE.endpoints[JobProtocol.GRIDFTP])
    directory = "/" + "a/" * 2046
    for name in "ab":
        assert urls.of(directory + name) == f"gsiftp://h:2811{directory}{name}"
    with pytest.raises(InvalidPathError, match="longer than 4096 bytes"):
        urls.of(directory + "aaaa")
