"""Behaviour of WebDAV servers that the standard does not specify, or that is unexpected."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import ssl
import threading
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_from_bytes, unquote_to_bytes, urlsplit

import pytest

from pdm.testgrid.identities import GridCredentials, make_credentials
from pdm.workqueue.domain.enums import ChecksumAlgorithm, JobProtocol
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers.backends import http_connection
from pdm.workqueue.helpers.backends.http_client import HttpClient
from pdm.workqueue.helpers.backends.http_connection import HttpConnection
from pdm.workqueue.helpers.backends.http_servers import known_server
from pdm.workqueue.helpers.storage import Timeouts
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent, FailedEvent, LogEvent
from pdm.workqueue.wire.agent_requests import CopyItem, CopyRequest, PathItem, TimeLimits
from tests.helpers.driver import HelperProcess, copy_item, digest, entries, outcomes
from tests.protocols.places import judged
from tests.support.quirk_server import QuirkServer, Reply, Request, on, written
from tests.support.variants import usual

RELAY = ["-m", "pdm.workqueue.helpers.main_relay"]
pytestmark = pytest.mark.timeout(180)

_REFUSALS = [(423, "LOCKED"), (503, "BUSY"), (403, "PERMISSION_DENIED"), (507, None)]


@pytest.fixture(scope="module")
def credentials(open_directory: Path) -> GridCredentials:
    directory = open_directory / "quirks"
    directory.mkdir()
    return make_credentials(directory, ("alice",))


@pytest.fixture
def server(credentials: GridCredentials) -> Iterator[QuirkServer]:
    # On a new port each time: the helper remembers what a server cannot do.
    with QuirkServer(credentials.host.certificate, credentials.host.key) as running:
        yield running


@pytest.fixture(scope="module")
def helper(credentials: GridCredentials, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HelperProcess]:
    environment = {
        "X509_USER_PROXY": str(credentials.users["alice"].proxy),
        "X509_CERT_DIR": str(credentials.trust),
        "PDM_FILE_ROOTS": json.dumps([quote(str(tmp_path_factory.getbasetemp()))]),
    }
    with HelperProcess(RELAY, environment) as process:
        yield process


def upload(
    server: QuirkServer, directory: Path, name: str, to: str, content: bytes = b"content", key: int = 1
) -> CopyItem:
    path = directory / name
    path.write_bytes(content)
    return copy_item(key, f"file://{quote(str(path))}", f"{server.url}{to}", len(content))


def download(server: QuirkServer, source: str, to: Path, size: int = 7) -> CopyItem:
    return copy_item(1, f"{server.url}{source}", f"file://{quote(str(to))}", size)


def failure(event: AgentEvent) -> AttemptFailure:
    assert isinstance(event, FailedEvent), event
    return MOVERS[JobProtocol.HTTPS].classify(event.fault)


def left(server: QuirkServer) -> list[bytes]:
    return [path for path in server.tree if b".pdm-" in path]


# -- directories


def test_a_server_that_always_says_conflict_is_not_asked_for_ever(server: QuirkServer, helper: HelperProcess) -> None:
    server.rules.append(on("MKCOL", 409))
    assert judged("https", helper.make(f"{server.url}/d/x/y", parents=True)[0]) == "destination SERVER_ERROR"
    assert len(server.seen) < 40


@pytest.mark.parametrize("status", usual([405, 301, 409, 500], [405]))
def test_a_directory_that_another_job_has_made_meanwhile_is_good(
    status: int, server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    def other_was_first(request: Request) -> Reply | None:
        if request.method != "MKCOL":
            return None
        server.tree[request.path.rstrip(b"/")] = None
        return Reply(status, headers={"Location": "/elsewhere"})

    server.rules.append(other_was_first)
    items = [upload(server, tmp_path, f"f{key}", f"/d/new/deep/f{key}", key=key) for key in range(12)]
    assert all(isinstance(done, DoneEvent) for done in helper.copy(items).values())
    assert judged("https", helper.make(f"{server.url}/d/other")[0]) == "destination EXISTS"


def test_directories_have_a_slash_and_a_redirect_that_adds_it_is_followed(
    server: QuirkServer, helper: HelperProcess
) -> None:
    server.tree |= {b"/d/sub": None, b"/d/sub/f": b"content"}

    def wants_slash(request: Request) -> Reply | None:
        path = request.path
        if request.method in ("OPTIONS", "PUT") or path.endswith(b"/"):
            return None
        if request.method == "MKCOL" or server.tree.get(path, b"") is None:
            # As from behind a proxy: neither scheme nor host are those that we know.
            return Reply(301, headers={"Location": "http://behind:8080" + quote_from_bytes(path) + "/"})
        return None

    server.rules.append(wants_slash)
    assert set(entries(helper.list(f"{server.url}/d"))) == {"sub", "sub/f"}
    assert isinstance(helper.make(f"{server.url}/d/new")[0], DoneEvent)
    assert isinstance(helper.rename(f"{server.url}/d/sub", f"{server.url}/d/moved"), DoneEvent)
    assert server.tree == {b"": None, b"/d": None, b"/d/new": None, b"/d/moved": None, b"/d/moved/f": b"content"}
    assert isinstance(helper.remove(PathItem(0, f"{server.url}/d/new", directory=True))[0], DoneEvent)
    paths = [request.path for request in server.seen if request.method in ("MKCOL", "DELETE", "MOVE")]
    assert paths and all(path.endswith(b"/") for path in paths)


def test_a_redirect_elsewhere_is_no_slash(server: QuirkServer, helper: HelperProcess) -> None:
    server.rules.append(on("PROPFIND", 301, Location="/other/"))
    (event,) = [event for event in helper.list(f"{server.url}/d") if isinstance(event, FailedEvent)]
    assert judged("https", event) == "source UNSUPPORTED"


@pytest.mark.parametrize(("status", "form"), [(502, "/"), (400, "/"), (502, "http://")])
def test_destination_is_written_as_a_proxy_needs_it(
    status: int, form: str, server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    def only(request: Request) -> Reply | None:
        wrong = request.method == "MOVE" and not request.headers["Destination"].startswith(form)
        return Reply(status) if wrong else None

    server.rules.append(only)
    items = [upload(server, tmp_path, f"f{key}", f"/d/f{key}", key=key) for key in range(2)]
    assert all(isinstance(done, DoneEvent) for done in helper.copy(items).values())
    moves = server.methods().count("MOVE")
    assert moves == (3 if form == "/" else 4), "the form that works was not remembered"
    assert not left(server)


# -- names


@pytest.mark.parametrize(
    ("name", "stored"),
    usual(
        [
            ("a;b", b"a"),
            ("q?q", b"q"),
            ("x&amp;y", b"x&y"),
            ("100%41", b"100A"),
            ("tab\tx", b"tab"),
            ("cr\rx", b"cr"),
            ("lf\nx", b"lf"),
        ],
        [("a;b", b"a"), ("lf\nx", b"lf")],
    ),
)
def test_a_server_that_stores_under_another_name_harms_no_file(
    name: str, stored: bytes, server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    def cut(request: Request) -> Reply | None:
        """MOVE of a server that decodes its Destination once too often, or cuts it."""
        if request.method != "MOVE":
            return None
        path = unquote_to_bytes(urlsplit(request.headers["Destination"]).path)
        path = re.split(rb"[?\t\r\n]|(?<!&amp);", path)[0].replace(b"&amp;", b"&")
        return server._move(request.path, unquote_to_bytes(path), request.headers["Overwrite"] != "F")

    server.rules.append(cut)
    server.tree[b"/d/" + stored] = b"precious"
    items = [upload(server, tmp_path, f"f{key}", f"/d/{quote(name)}{key or ''}", key=key) for key in range(3)]
    outcomes = helper.copy(items, overwrite="always")
    assert {judged("https", outcomes[key]) for key in range(3)} == {"destination INVALID_NAME"}
    assert server.tree == {b"": None, b"/d": None, b"/d/" + stored: b"precious"}
    # The server is not asked again.
    before = server.methods().count("MOVE")
    assert judged("https", helper.rename(f"{server.url}/d/{quote_from_bytes(stored)}", f"{server.url}/d/{quote(name)}"))
    assert server.methods().count("MOVE") == before
    assert server.tree[b"/d/" + stored] == b"precious"


def test_a_name_that_is_missing_after_the_move_is_reported(
    server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    server.rules.append(on("MOVE", 201))
    outcome = helper.copy([upload(server, tmp_path, "f", "/d/plain")])[1]
    assert judged("https", outcome) == "destination INVALID_NAME"


def test_a_busy_server_is_not_taken_for_one_that_keeps_names(
    server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    def busy(request: Request) -> Reply | None:
        return Reply(503) if request.method == "PUT" and request.path.endswith(b".probe") else None

    server.rules += [busy, on("MOVE", 201)]
    assert failure(helper.copy([upload(server, tmp_path, "f", "/d/a%3Bb")])[1]).code == "BUSY"
    server.rules.remove(busy)
    assert failure(helper.copy([upload(server, tmp_path, "f", "/d/a%3Bb")])[1]).code == "INVALID_NAME"
    assert server.tree == {b"": None, b"/d": None}


def test_odd_names_of_servers_that_keep_them(server: QuirkServer, helper: HelperProcess, tmp_path: Path) -> None:
    names = ["a;b", "q?q", "x&amp;y", "100%41", "a b+c", "#1", "%2F"]
    items = [
        upload(server, tmp_path, f"f{key}", f"/d/{quote(name, safe='')}", key=key) for key, name in enumerate(names)
    ]
    assert all(isinstance(done, DoneEvent) for done in helper.copy(items).values())
    assert {path for path in server.tree if path.startswith(b"/d/")} == {b"/d/" + name.encode() for name in names}


# -- listings


@pytest.mark.parametrize(
    "response",
    [
        b'<response xmlns="DAV:"><href>{}</href><propstat><prop><getcontentlength>7</getcontentlength></prop>'
        b"</propstat></response>",
        b'<x:response xmlns:x="DAV:"><x:href><![CDATA[{}]]></x:href><x:propstat><x:prop><x:getcontentlength>'
        b"<![CDATA[7]]></x:getcontentlength></x:prop><x:status>HTTP/1.1 200 OK</x:status></x:propstat></x:response>",
        b'<response xmlns="DAV:">\n <href>\n  http://behind:80{}\n </href><propstat><prop>'
        b"<getcontentlength>7</getcontentlength></prop></propstat></response>",
        b"<D:response><D:href>{}</D:href><D:propstat><D:prop><D:resourcetype/></D:prop>"
        b"<D:status>HTTP/1.1 200 OK</D:status></D:propstat>"
        b"<D:propstat><D:prop><D:getcontentlength>9</D:getcontentlength></D:prop>"
        b"<D:status>HTTP/1.1 404 Not Found</D:status></D:propstat></D:response>",
    ],
)
@pytest.mark.parametrize("itself", [True, False])
def test_every_way_to_write_a_multistatus(
    response: bytes, itself: bool, server: QuirkServer, helper: HelperProcess
) -> None:
    server.tree |= {b"/d/a&b <\xc3\xa9>": b"content"}
    own = server.written

    def write(path: bytes, content: bytes | None) -> bytes:
        if content is None:
            return own(path, content) if itself else b""
        return response.replace(b"{}", quote_from_bytes(path).encode())

    def without_itself(request: Request) -> Reply | None:
        if request.method != "PROPFIND" or request.headers["Depth"] == "1":
            server.written = write
        else:
            server.written = own
        return None

    server.rules.append(without_itself)
    (found,) = entries(helper.list(f"{server.url}/d")).items()
    assert (found[0], found[1].type, found[1].size) == ("a%26b%20%3C%C3%A9%3E", "file", 7)


def test_relative_hrefs_and_inner_statuses(server: QuirkServer, helper: HelperProcess) -> None:
    server.tree |= {b"/d/f": b"content"}
    own = server.written

    def write(path: bytes, content: bytes | None) -> bytes:
        if content is None:
            return own(path, content) + (
                b"<D:response><D:href>/d/broken</D:href><D:status>HTTP/1.1 404 Not Found</D:status></D:response>"
            )
        return own(path, content).replace(b"<D:href>/d/f<", b"<D:href>f<")

    server.written = write
    found = entries(helper.list(f"{server.url}/d"))
    assert {path: entry.type for path, entry in found.items()} == {"f": "file", "broken": "other"}


@pytest.mark.parametrize(
    "document",
    [
        b'<!DOCTYPE m [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><multistatus>&b;</multistatus>',
        b'<!DOCTYPE m [<!ENTITY x SYSTEM "file:///etc/passwd">]><multistatus><response><href>&x;</href></response>',
        b"<multistatus>" + b"<a>" * 100_000,
        b"<multistatus><response><href>" + b"x" * 3_000_000,
        b"<multistatus><response " + b"x" * 3_000_000,
        b"<html><body>Log in</body></html>",
        b"<multistatus><response></response></multistatus>",
        b"<multistatus/>",
    ],
)
def test_a_document_that_is_no_listing(document: bytes, server: QuirkServer, helper: HelperProcess) -> None:
    server.rules.append(on("PROPFIND", 207, document))
    assert judged("https", helper.list(f"{server.url}/d")[-1]) == "source BAD_LISTING"


def test_a_listing_that_is_cut_short_is_none(server: QuirkServer, helper: HelperProcess) -> None:
    server.rules.append(on("PROPFIND", 207, b"<multistatus><response><href>/d/</href></response>"))
    assert judged("https", helper.list(f"{server.url}/d")[-1]) == "source SERVER_ERROR"


def test_a_listing_that_is_broken_off_fails_no_copy(server: QuirkServer, helper: HelperProcess, tmp_path: Path) -> None:
    """As rclone does when a file goes while it lists: it writes an error behind the end of the document."""

    def broken_off(request: Request) -> Reply | None:
        if request.method != "PROPFIND" or request.headers["Depth"] != "1":
            return None
        return Reply(207, server._listing(b"/d", "1") + b"Internal Server Error")

    server.rules.append(broken_off)
    items = [upload(server, tmp_path, f"f{key}", f"/d/f{key}", key=key) for key in range(10)]
    assert all(isinstance(done, DoneEvent) for done in helper.copy(items).values())
    assert judged("https", helper.list(f"{server.url}/d")[-1]) == "source SERVER_ERROR"


# -- bytes


def test_sizes_come_from_the_listing_if_head_has_none_or_a_wrong_one(
    server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    server.rules.append(on("HEAD", 200, b"what HEAD would have"))
    for key, content in enumerate([b"", b"content"]):
        item = upload(server, tmp_path, f"f{key}", f"/d/f{key}", content)
        assert isinstance(helper.copy([item])[1], DoneEvent)
        assert isinstance(
            helper.copy([download(server, f"/d/f{key}", tmp_path / f"b{key}", len(content))])[1], DoneEvent
        )
        assert (tmp_path / f"b{key}").read_bytes() == content


def test_a_server_that_compresses_unasked_is_refused(
    server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    server.tree[b"/d/f"] = b"content"
    server.rules.append(on("GET", 200, b"x" * 30, Content_Encoding="gzip"))
    assert judged("https", helper.copy([download(server, "/d/f", tmp_path / "f")])[1]) == "source UNSUPPORTED"
    assert {request.headers["Accept-Encoding"] for request in server.seen if request.method == "GET"} == {"identity"}


@pytest.mark.parametrize("status", usual([400, 404, 405, 409, 500, 501], [400, 501]))
def test_copies_that_the_destination_does_not_begin_go_through_here(
    status: int, server: QuirkServer, helper: HelperProcess
) -> None:
    server.tree[b"/d/f"] = b"content"
    server.rules += [on("POST", 200, b'{"macaroon": "xyz"}'), on("COPY", status)]
    for name in ("one", "two"):
        done = helper.copy([copy_item(1, f"{server.url}/d/f", f"{server.url}/d/{name}", 7)])[1]
        assert isinstance(done, DoneEvent), done
    assert server.methods().count("COPY") == 1, "it was asked again"
    assert server.tree[b"/d/two"] == b"content"


@pytest.mark.parametrize("answer", [b"[" * 50_000, b'{"macaroon": "x\\r\\ny"}'])
def test_without_a_usable_macaroon_a_copy_goes_through_here(
    answer: bytes, server: QuirkServer, helper: HelperProcess
) -> None:
    server.tree[b"/d/f"] = b"content"
    server.rules.append(on("POST", 200, answer))
    done = helper.copy([copy_item(1, f"{server.url}/d/f", f"{server.url}/d/g", 7)])[1]
    assert isinstance(done, DoneEvent), done
    assert "COPY" not in server.methods()
    assert server.tree[b"/d/g"] == b"content"


@pytest.mark.parametrize("algorithm", ChecksumAlgorithm)
def test_a_copy_with_a_status_only_is_verified(
    algorithm: ChecksumAlgorithm, server: QuirkServer, helper: HelperProcess
) -> None:
    server.tree[b"/d/f"] = b"content"

    def pull(request: Request) -> Reply | None:
        if request.method != "COPY":
            return None
        server.tree[request.path] = b"content" if b"good" in server.tree else b"damaged"
        return Reply(201)

    server.rules += [on("POST", 200, b'{"macaroon": "xyz"}'), pull]
    item = copy_item(1, f"{server.url}/d/f", f"{server.url}/d/g", 7)
    assert judged("https", helper.copy([item], checksum=algorithm)[1]) == "transfer CHECKSUM_MISMATCH"
    server.tree[b"good"] = b""
    done = helper.copy([item], checksum=algorithm)[1]
    assert isinstance(done, DoneEvent) and done.checksum == digest(algorithm, b"content")
    assert server.methods().count("COPY") == 2 and server.tree[b"/d/g"] == b"content"


_MD5, _SHA256 = hashlib.md5(b"content", usedforsecurity=False), hashlib.sha256(b"content")


@pytest.mark.parametrize(
    ("algorithm", "header", "is_read"),
    [
        ("ADLER32", "adler32=bcb02fc", False),
        ("ADLER32", f"md5={_MD5.hexdigest()}, ADLER32=0bcb02fc", False),
        ("MD5", f"md5={base64.b64encode(_MD5.digest()).decode()}", False),
        ("MD5", f"MD5={_MD5.hexdigest()}", False),
        ("SHA256", f"SHA-256={base64.b64encode(_SHA256.digest()).decode()},md5=x", False),
        ("MD5", "md5=", True),
        ("MD5", "md5=dGVzdA==", True),
        ("MD5", "adler32=0bcb02fc", True),
        ("SHA256", "sha-256=é", True),
    ],
)
def test_a_checksum_of_the_server_is_taken_if_it_is_of_the_algorithm(
    algorithm: str, header: str, is_read: bool, server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    server.tree |= {b"/d/f": b"content"}
    server.rules.append(on("HEAD", 200, b"content", Digest=header, ETag='"1"'))
    (tmp_path / "f").write_bytes(b"content")
    item = download(server, "/d/f", tmp_path / "f")
    done = helper.copy([item], "different", checksum=ChecksumAlgorithm(algorithm))[1]
    assert isinstance(done, DoneEvent) and done.already_there, done
    assert ("GET" in server.methods()) == is_read
    wanted = {request.headers["Want-Digest"] for request in server.seen if "Want-Digest" in request.headers}
    assert wanted == {{"ADLER32": "adler32", "MD5": "md5", "SHA256": "sha-256"}[algorithm]}


@pytest.mark.parametrize("status", usual([401, 403, 404, 405, 409, 415], [403, 405]))
def test_copies_from_a_source_without_macaroons_go_through_here(
    status: int, server: QuirkServer, helper: HelperProcess
) -> None:
    server.tree[b"/d/f"] = b"content"
    server.rules.append(on("POST", status))
    for name in ("one", "two"):
        done = helper.copy([copy_item(1, f"{server.url}/d/f", f"{server.url}/d/{name}", 7)])[1]
        assert isinstance(done, DoneEvent), done
    assert server.methods().count("POST") == 1, "it was asked again"


# -- what goes wrong


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (408, "TIMEOUT", True),
        (413, "TOO_LARGE", False),
        (417, "UNSUPPORTED", False),
        (423, "LOCKED", True),
        (425, "BUSY", True),
        (429, "BUSY", True),
        (500, "SERVER_ERROR", True),
        (502, "SERVER_ERROR", True),
        (503, "BUSY", True),
        (504, "SERVER_ERROR", True),
        (507, "NO_SPACE", True),
    ],
)
def test_every_status_has_its_code(
    status: int, code: str, retryable: bool, server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    server.rules.append(on("PUT", status, b"<html>no such file or directory</html>", Retry_After="17"))
    if status in (500, 502, 504, 507):
        # Of these the page may tell more.
        server.rules[-1] = on("PUT", status, Retry_After="17")
    found = failure(helper.copy([upload(server, tmp_path, "f", "/d/f", b"x" * 300_000)])[1])
    assert (found.scope, found.code, found.retryable, found.retry_after_s) == ("destination", code, retryable, 17.0)
    assert server.methods().count("PUT") <= 2
    if status == 413:
        assert "300000 bytes" in found.message and "client_max_body_size" in found.message


def test_an_expectation_that_fails_is_not_made_again(
    server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    server.rules.append(lambda request: Reply(417) if "Expect" in request.headers else None)
    items = [upload(server, tmp_path, f"f{key}", f"/d/f{key}", b"x" * 300_000, key) for key in range(3)]
    assert all(isinstance(done, DoneEvent) for done in helper.copy(items).values())
    assert [request.headers.get("Expect") for request in server.seen if request.method == "PUT"].count(
        "100-continue"
    ) == 1


def test_a_refusal_in_the_middle_of_an_upload_is_heard(
    server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    """The server takes bytes unasked, then refuses and closes the connection while more of them are being sent."""
    server.ignores_expect, server.most_read = True, 1_000_000
    server.rules.append(on("PUT", 507))
    for number in range(3):
        item = upload(server, tmp_path, "f", f"/d/f{number}", b"x" * 30_000_000)
        assert failure(helper.copy([item])[1]).code == "NO_SPACE"
    assert server.methods().count("PUT") == 3, "it was asked once more for its reason"


def test_a_redirect_after_the_bytes_is_not_followed_without_them(
    server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    server.ignores_expect = True
    server.rules.append(on("PUT", 307, Location=f"{server.url}/d/elsewhere"))
    item = upload(server, tmp_path, "f", "/d/f", b"x" * 300_000)
    found = failure(helper.copy([item])[1])
    assert (found.code, found.retryable) == ("SERVER_ERROR", True)
    server.ignores_expect = False
    server.rules.clear()
    assert isinstance(helper.copy([item])[1], DoneEvent)


@pytest.mark.parametrize("method", ["PROPFIND", "GET", "PUT", "MOVE"])
def test_a_server_that_hangs_up_on_one_path_is_not_away(
    method: str, server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    server.tree |= {b"/d/bad": None, b"/d/bad/f": b"content"}
    server.rules.append(on(method, 0, at=b"/d/bad"))
    if method == "GET":
        event = helper.copy([download(server, "/d/bad/f", tmp_path / "f")])[1]
    elif method == "PROPFIND":
        event = helper.list(f"{server.url}/d/bad")[-1]
    else:
        event = helper.copy([upload(server, tmp_path, "f", "/d/bad/new")])[1]
    assert failure(event).code == "SERVER_ERROR"


def test_a_kept_connection_that_was_closed_costs_nothing(server: QuirkServer, helper: HelperProcess) -> None:
    server.hangs_up = True
    for number in range(3):
        assert isinstance(helper.make(f"{server.url}/d/n{number}")[0], DoneEvent)


@pytest.mark.parametrize("method", ["PROPFIND", "GET", "PUT"])
def test_a_request_without_an_answer_on_a_kept_connection_is_sent_again(
    method: str, server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    """As when the server closes an idle connection at the very moment at which a request is sent."""
    server.tree[b"/d/f"] = b"content"
    closing = [Reply(0)]
    assert entries(helper.list(f"{server.url}/d"))
    server.rules.append(lambda request: closing.pop() if request.method == method and closing else None)
    if method == "PUT":
        event = helper.copy([upload(server, tmp_path, "f", "/d/new")])[1]
    else:
        event = helper.copy([download(server, "/d/f", tmp_path / "new")])[1]
    assert isinstance(event, DoneEvent), event
    assert not closing


# -- groups of small files


def dated(path: bytes, content: bytes | None) -> bytes:
    """A response of a multistatus with a time that is long ago."""
    time_ = b"<D:getlastmodified>Tue, 14 Nov 2023 22:13:20 GMT</D:getlastmodified>"
    return written(path, content).replace(b"<D:prop>", b"<D:prop>" + time_)


def small_files(server: QuirkServer, count: int = 20) -> list[CopyItem]:
    """Copies of many small files from one folder of the server to another."""
    server.written = dated
    server.tree |= {b"/d/from": None, b"/d/to": None}
    server.tree |= {b"/d/from/f%d" % number: b"content" for number in range(count)}
    base = f"{server.url}/d"
    return [copy_item(number, f"{base}/from/f{number}", f"{base}/to/f{number}", 7) for number in range(count)]


def in_groups(events: list[AgentEvent]) -> set[int]:
    return {event.key for event in events if isinstance(event, LogEvent) and "with others" in event.text}


@pytest.mark.parametrize(("status", "code"), usual(_REFUSALS, _REFUSALS[:1]))
@pytest.mark.parametrize("method", ["PUT", "MOVE"])
def test_a_file_of_a_group_that_the_server_refuses_fails_alone(
    status: int, code: str | None, method: str, server: QuirkServer, helper: HelperProcess
) -> None:
    items = small_files(server)
    temporary = urlsplit(items[3].temporary).path.encode()
    server.rules.append(on(method, status, at=temporary))
    request = CopyRequest(helper.new_id(), items, "never", "checksum", TimeLimits(stall_s=60.0))
    events = helper.run(request)
    ended = outcomes(events)
    assert code in (None, failure(ended[3]).code)
    assert {key for key, event in ended.items() if isinstance(event, DoneEvent)} == set(range(20)) - {3}
    assert in_groups(events) >= set(range(20)) - {3}
    assert (left(server), b"/d/to/f3" in server.tree) == ([], False)


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_kept_connection_that_is_closed_under_a_group_fails_no_file(
    method: str, server: QuirkServer, helper: HelperProcess
) -> None:
    items = small_files(server)
    closing = [Reply(0)]
    server.rules.append(
        lambda request: closing.pop() if request.method == method and b"f1" in request.path and closing else None
    )
    if method == "PUT":
        name = urlsplit(items[12].temporary).path.encode()
        server.rules[:] = [lambda request: closing.pop() if request.path == name and closing else None]
    request = CopyRequest(helper.new_id(), items, "never", "size", TimeLimits(stall_s=60.0))
    events = helper.run(request)
    assert {type(event) for event in outcomes(events).values()} == {DoneEvent}
    # A slow server is given more connections: if it closes a new one, the files are copied alone.
    assert in_groups(events) in (set(range(20)), set())
    assert [server.tree[b"/d/to/f%d" % number] for number in range(20)] == [b"content"] * 20


@pytest.mark.parametrize("overwrite", usual(["never", "always"], ["never"]))
def test_a_name_that_is_taken_while_a_group_comes_is_not_moved_over(
    overwrite: str, server: QuirkServer, helper: HelperProcess
) -> None:
    """MOVE of some servers replaces whatever is there, also a directory with all that is in it."""
    items = small_files(server)

    def takes(request: Request) -> None:
        if request.method == "PUT" and b".4.1." in request.path:
            server.tree |= {b"/d/to/f4": b"another", b"/d/to/f5": None, b"/d/to/f5/inside": b"precious"}

    server.rules.append(takes)
    request = CopyRequest(helper.new_id(), items, overwrite, "size", TimeLimits(stall_s=60.0))  # type: ignore[arg-type]
    ended = outcomes(helper.run(request))
    assert server.tree[b"/d/to/f4"] == (b"another" if overwrite == "never" else b"content")
    assert server.tree[b"/d/to/f5/inside"] == b"precious"
    assert failure(ended[5]).code in ("IS_A_DIRECTORY", "EXISTS")
    assert (left(server), sum(isinstance(event, DoneEvent) for event in ended.values())) == (
        [],
        18 if overwrite == "never" else 19,
    )


# -- destinations that take two names for one


def folding(server: QuirkServer, path: bytes) -> bytes:
    """The path as a storage that ignores case and normalises has it."""

    def folded(name: bytes) -> str:
        return unicodedata.normalize("NFC", name.decode()).casefold()

    found = b""
    for name in path.split(b"/")[1:]:
        below = [key for key in server.tree if key.rpartition(b"/")[0] == found and key]
        same = next((key for key in below if folded(key) == folded(found + b"/" + name)), found + b"/" + name)
        found = same
    return found


def test_two_directories_that_meet_at_the_destination_are_found(
    server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    server.name_of = lambda path: folding(server, path)
    paths = ["/d/Sub/deep/f", "/d/sub/deep/f", "/d/plain/f"]
    items = [
        upload(server, tmp_path, f"f{key}", path, f"content {key}".encode(), key) for key, path in enumerate(paths)
    ]
    outcomes = helper.copy(items, overwrite="always")
    failed = [key for key, event in outcomes.items() if not isinstance(event, DoneEvent)]
    assert len(failed) == 1 and failed[0] in (0, 1), outcomes
    assert judged("https", outcomes[failed[0]]) == "destination INVALID_NAME"
    assert server.tree[paths[1 - failed[0]].encode()] == f"content {1 - failed[0]}".encode()


@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.full)])
@pytest.mark.parametrize("overwrite", ["never", "always", "different"])
@pytest.mark.parametrize("names", [("README", "readme"), ("caf\u00e9", "cafe\u0301")])
def test_two_files_that_meet_at_the_destination_are_found(
    names: tuple[str, str], overwrite: str, count: int, server: QuirkServer, helper: HelperProcess, tmp_path: Path
) -> None:
    """On a server that ignores case and normalises: the second does not replace the first, whatever was asked."""

    server.name_of = lambda path: folding(server, path)
    many = [f"n{number}" for number in range(count - 2)]
    items = [
        upload(server, tmp_path, f"f{key}", f"/d/{quote(name)}", f"content {key}".encode(), key)
        for key, name in enumerate([*names, *many])
    ]
    outcomes = helper.copy(items, overwrite=overwrite)
    failed = [key for key, event in outcomes.items() if not isinstance(event, DoneEvent)]
    assert len(failed) == 1 and failed[0] in (0, 1), outcomes
    assert judged("https", outcomes[failed[0]]) in ("destination INVALID_NAME", "destination EXISTS")
    if overwrite != "never":
        assert failure(outcomes[failed[0]]).code == "INVALID_NAME"
    winner = 1 - failed[0]
    assert server.tree[b"/d/" + names[winner].encode()] == f"content {winner}".encode()
    assert len(server.tree) == 2 + count - 1 and not left(server)


@pytest.mark.parametrize("endless", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n"])
def test_a_server_that_only_announces_answers(endless: bytes, server: QuirkServer, helper: HelperProcess) -> None:
    # Sent in place of a body to an answer that was only announced.
    server.rules.append(on("PROPFIND", 100, endless * 10_000))
    assert failure(helper.list(f"{server.url}/d")[-1]).code in ("SERVER_ERROR", "CONNECTION")


def test_announcements_before_an_answer_are_passed_over(server: QuirkServer, helper: HelperProcess) -> None:
    listing = server._listing(b"/d", "0")
    answer = b"HTTP/1.1 207 Multi-Status\r\nContent-Length: %d\r\n\r\n%s" % (len(listing), listing)
    server.rules.append(on("PROPFIND", 102, answer, Content_Length="0"))
    assert entries(helper.list(f"{server.url}/d", depth=0)).keys() == {""}


# -- connections


def test_a_request_without_an_answer_is_sent_again_on_a_new_connection(
    server: QuirkServer, credentials: GridCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XRootD 5.5 takes some requests on kept connections, and forgets them."""
    monkeypatch.setattr(http_connection, "_ANSWER_S", 0.2)
    monkeypatch.setenv("X509_USER_PROXY", str(credentials.users["alice"].proxy))
    monkeypatch.setenv("PDM_TRUST", json.dumps({server.url: str(credentials.trust)}))
    server.tree[b"/f"] = b"content"
    is_forgotten = threading.Event()

    def forget(request: Request) -> Reply | None:
        if len(server.methods(b"/f")) == 2:
            is_forgotten.wait(30.0)
        return None

    server.rules.append(forget)
    client = HttpClient()
    client.timeouts = Timeouts.within(60.0)
    url = StorageUrl(f"{server.url}/f")
    began_at = time.monotonic()
    try:
        client.call("HEAD", url)
        assert client.call("HEAD", url).header("Content-Length") == "7"
    finally:
        is_forgotten.set()
        client.close_idle(known_server(url))
    assert server.methods(b"/f") == ["HEAD"] * 3
    assert time.monotonic() - began_at < 30.0


def test_xrootd_is_reminded_of_a_request_that_it_has_read(
    credentials: GridCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks at the request when more bytes arrive, and takes them for the next request: the connection ends."""
    monkeypatch.setenv("X509_USER_PROXY", str(credentials.users["alice"].proxy))
    of_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    of_server.load_cert_chain(credentials.host.certificate, credentials.host.key)
    answer = b"HTTP/1.1 201 Created\r\nServer: XrootD/v5.5.3\r\nContent-Length: 3\r\n\r\n:-)"
    received: list[bytes] = []

    def until_its_end(stream: ssl.SSLSocket) -> bytes:
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            data += stream.recv(4096)
        return data.split(b" ")[0]

    with socket.create_server(("localhost", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                plain, _ = listener.accept()
                with of_server.wrap_socket(plain, server_side=True) as stream:
                    received.append(until_its_end(stream))
                    stream.sendall(answer)
                    received.append(until_its_end(stream))
                    received.append(stream.recv(4096))
                    stream.sendall(answer)
                    received.append(stream.recv(4096))

        server = threading.Thread(target=serve)
        server.start()
        url = StorageUrl(f"https://localhost:{listener.getsockname()[1]}/f")
        monkeypatch.setenv("PDM_TRUST", json.dumps({url.server: str(credentials.trust)}))
        client = HttpClient()
        client.timeouts = Timeouts.within(60.0)
        for method in ("PUT", "MOVE", "GET", "MOVE"):
            client.call(method, url, ok=(201,))
        client.close_idle(known_server(url))
        server.join(10.0)
    assert received == [b"PUT", b"MOVE", b"\r\n", b"", b"GET", b"MOVE", b"\r\n", b""]


def test_an_upload_without_an_answer_is_not_sent_again(
    server: QuirkServer, credentials: GridCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may still be writing."""
    monkeypatch.setattr(http_connection, "_ANSWER_S", 0.2)
    monkeypatch.setenv("X509_USER_PROXY", str(credentials.users["alice"].proxy))
    monkeypatch.setenv("PDM_TRUST", json.dumps({server.url: str(credentials.trust)}))

    def slow(request: Request) -> Reply | None:
        if request.method == "PUT":
            time.sleep(1.0)
        return None

    server.rules.append(slow)
    client = HttpClient()
    client.timeouts = Timeouts.within(60.0)
    client.call("HEAD", StorageUrl(f"{server.url}/d"), ok=(200, 404))
    client.call("PUT", StorageUrl(f"{server.url}/f"), body=b"content", ok=(201,))
    client.close_idle(known_server(StorageUrl(server.url)))
    assert server.methods(b"/f") == ["PUT"]


def test_a_handshake_without_an_answer_is_begun_again(
    credentials: GridCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XRootD 5.5 does it when it is busy."""
    monkeypatch.setattr(http_connection, "_ANSWER_S", 0.2)
    of_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    of_server.load_cert_chain(credentials.host.certificate, credentials.host.key)
    of_client = ssl.create_default_context(capath=str(credentials.trust))
    with socket.create_server(("localhost", 0)) as listener:

        def serve() -> None:
            forgotten, _ = listener.accept()
            second, _ = listener.accept()
            with forgotten, of_server.wrap_socket(second, server_side=True) as answered:
                answered.recv(1)

        server = threading.Thread(target=serve)
        server.start()
        connection = HttpConnection(f"localhost:{listener.getsockname()[1]}", of_client, lambda: 60.0)
        try:
            assert connection.connect().version() is not None
        finally:
            connection.close()
            server.join(10.0)
