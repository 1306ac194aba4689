"""S3 against a small server with the quirks and faults of real ones."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

import pytest

from pdm.testgrid.identities import GridCredentials, make_credentials
from pdm.workqueue.domain.enums import ChecksumAlgorithm
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.helpers import credentials as helpers_credentials
from pdm.workqueue.helpers.backends import s3, s3_uploads
from pdm.workqueue.helpers.backends.http_servers import known_server
from pdm.workqueue.helpers.storage import StorageError, Timeouts
from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent, FailedEvent, UnnamedEvent
from pdm.workqueue.wire.agent_requests import (
    CopyRequest,
    FoundBefore,
    MkdirRequest,
    PathItem,
    RemoveRequest,
    RenameItem,
    RenameRequest,
    TimeLimits,
)
from tests.helpers.driver import LIMITS, HelperProcess, adler, copy_item, entries, outcomes
from tests.protocols.places import judged, mover_named
from tests.security import canary
from tests.support.s3_server import ACCESS_KEY, S3Reply, S3Request, S3Rule, SmallS3Server, once, s3_error

RELAY = ["-m", "pdm.workqueue.helpers.main_relay"]
SECRET = canary.watched("canary/secret+of=S3/4711")
_PART = 8 * 1024 * 1024
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def credentials(open_directory: Path) -> GridCredentials:
    directory = open_directory / "s3"
    directory.mkdir()
    return make_credentials(directory, ("alice",))


@pytest.fixture(scope="module")
def shared(credentials: GridCredentials) -> Iterator[SmallS3Server]:
    with SmallS3Server(credentials.host.certificate, credentials.host.key, SECRET) as running:
        yield running


@pytest.fixture(scope="module")
def helper(
    credentials: GridCredentials, shared: SmallS3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HelperProcess]:
    with HelperProcess(RELAY, _environment(credentials, shared, tmp_path_factory.getbasetemp())) as process:
        yield process


@pytest.fixture
def server(shared: SmallS3Server) -> SmallS3Server:
    shared.reset()
    return shared


def _environment(credentials: GridCredentials, server: SmallS3Server, directory: Path) -> dict[str, str]:
    keys = directory / "keys"
    keys.write_text(json.dumps({"access_key": ACCESS_KEY, "secret_key": SECRET}))
    return {
        "X509_CERT_DIR": str(credentials.trust),
        "PDM_CREDENTIALS": json.dumps(
            {endpoint: {"file": str(keys), "account": None} for endpoint in (server.endpoint, server.slashless)}
        ),
        "PDM_FILE_ROOTS": json.dumps([quote(str(directory))]),
    }


def _url(server: SmallS3Server, key: bytes | str) -> str:
    raw = key.encode() if isinstance(key, str) else key
    return f"{server.endpoint}/{quote_from_bytes(raw, safe='/~')}"


def _copy(
    helper: HelperProcess, source: str, destination: str, size: int, attempt: int = 1, **options: str
) -> AgentEvent:
    item = copy_item(1, source, destination, size, attempt)
    asked = {"overwrite": "different", "verify": "checksum", **options}
    return outcomes(helper.run(CopyRequest(helper.new_id(), [item], limits=LIMITS, **asked)))[1]  # type: ignore[arg-type]


def _run(helper: HelperProcess, kind: type, *items: object, **options: object) -> AgentEvent:
    return outcomes(helper.run(kind(helper.new_id(), items, limits=LIMITS, **options)))[1]


def _file(directory: Path, content: bytes) -> str:
    path = directory / "file"
    path.write_bytes(content)
    os.utime(path, (1_000_000_000, 1_000_000_000))
    return f"file://{path}"


# -- all types of jobs


def test_a_small_file_goes_there_by_one_request_and_comes_back(
    helper: HelperProcess, server: SmallS3Server, tmp_path: Path
) -> None:
    done = _copy(helper, _file(tmp_path, b"content"), _url(server, "d/a +%.txt"), 7, overwrite="never")
    assert isinstance(done, DoneEvent)
    assert done.checksum == adler(b"content")
    assert server.objects[b"d/a +%.txt"][0] == b"content"
    (written,) = [request for request in server.seen if request.what == "PUT" and request.key == b"d/a +%.txt"]
    assert (written.headers["if-none-match"], "content-md5" in written.headers) == ("*", True)
    # Nothing was stored under a temporary name, and the directory is kept.
    assert set(server.objects) == {b"d/", b"d/a +%.txt"}
    back = _copy(helper, _url(server, "d/a +%.txt"), f"file://{tmp_path}/back", 7)
    assert isinstance(back, DoneEvent)
    assert (tmp_path / "back").read_bytes() == b"content"


def test_directories_are_prefixes_of_keys(helper: HelperProcess, server: SmallS3Server) -> None:
    for key in ("a", "a-1", "a/b", "a/c/d", "marked/", "odd//x", "odd/../y", "odd/ü", "late\x01\n", "n" * 255):
        server.put(key)
    server.page = 2
    events = helper.list(server.endpoint)
    assert {path: entry.type for path, entry in entries(events).items()} == {
        "a": "directory", "a-1": "file", "a/b": "file", "a/c": "directory", "a/c/d": "file", "marked": "directory",
        "odd": "directory", "odd/%C3%BC": "file", "late%01%0A": "file", "n" * 255: "file",
    }  # fmt: skip
    # The object "a" beside "a/b", and the keys that no path leads to.
    unnamed = [(event.path, event.count) for event in events if isinstance(event, UnnamedEvent)]
    assert sorted(unnamed) == [("", 1), ("odd", 2)]
    assert {path: entry.type for path, entry in entries(helper.list(_url(server, "a"))).items()} == {"": "file"}


@pytest.mark.parametrize("keeps_slashes", [True, False])
def test_empty_directories_are_kept(helper: HelperProcess, server: SmallS3Server, keeps_slashes: bool) -> None:
    endpoint = server.endpoint if keeps_slashes else server.slashless

    def path(name: str) -> PathItem:
        return PathItem(1, f"{endpoint}/{name}", directory=True)

    assert isinstance(_run(helper, MkdirRequest, path("x%20y"), parents=False), DoneEvent)
    assert set(server.objects) == {b"x y/" if keeps_slashes else b"x y/.pdm-directory"}
    assert set(entries(helper.list(endpoint))) == {"x%20y"}
    assert judged("s3", _run(helper, MkdirRequest, path("x%20y"), parents=False)) == "destination EXISTS"
    assert judged("s3", _run(helper, MkdirRequest, path("no/such"), parents=False)) == "destination NOT_FOUND"
    server.put("x y/inside")
    assert judged("s3", _run(helper, RemoveRequest, path("x%20y"))) == "source NOT_EMPTY"
    del server.objects[b"x y/inside"]
    assert isinstance(_run(helper, RemoveRequest, path("x%20y")), DoneEvent)
    assert server.objects == {}


def test_renames_copy_and_remove(helper: HelperProcess, server: SmallS3Server) -> None:
    for key in ("d/", "d/a", "d/e/b", "taken/x", "file"):
        server.put(key, key.encode())
    moved = RenameItem(1, _url(server, "d"), _url(server, "new"))
    assert isinstance(_run(helper, RenameRequest, moved, overwrite="never"), DoneEvent)
    assert set(server.objects) == {b"new/", b"new/a", b"new/e/b", b"taken/x", b"file"}
    for destination in ("taken", "new/a"):
        moved = RenameItem(1, _url(server, "file"), _url(server, destination))
        assert judged("s3", _run(helper, RenameRequest, moved, overwrite="never")) == "destination EXISTS"
    assert isinstance(_run(helper, RenameRequest, moved, overwrite="always"), DoneEvent)
    assert server.objects[b"new/a"][0] == b"file"
    assert b"file" not in server.objects


def test_a_server_that_copies_no_markers_renames_directories(helper: HelperProcess, server: SmallS3Server) -> None:
    for key in ("a/", "a/b", "a/empty/"):
        server.put(key, b"content" if key == "a/b" else b"")
    server.rules.append(
        lambda request: (
            s3_error(404, "NoSuchKey") if request.headers.get("x-amz-copy-source", "").endswith("/") else None
        )
    )
    item = RenameItem(1, _url(server, "a"), _url(server, "c"))
    assert isinstance(_run(helper, RenameRequest, item, overwrite="never"), DoneEvent)
    assert {key: data for key, (data, _) in server.objects.items()} == {
        b"c/": b"",
        b"c/b": b"content",
        b"c/empty/": b"",
    }


def test_a_rename_of_a_directory_that_was_killed_is_continued(helper: HelperProcess, server: SmallS3Server) -> None:
    server.put("d/a", b"not yet")
    server.put("new/b", b"renamed before")
    found = FoundBefore(source=["directory"], destination=None)
    moved = RenameItem(1, _url(server, "d"), _url(server, "new"), found)
    assert isinstance(_run(helper, RenameRequest, moved, overwrite="never"), DoneEvent)
    assert {key: data for key, (data, _) in server.objects.items()} == {
        b"new/a": b"not yet",
        b"new/b": b"renamed before",
    }


# -- uploads in parts


def test_a_large_file_goes_in_parts_and_nobody_sees_it_before(
    helper: HelperProcess, server: SmallS3Server, tmp_path: Path
) -> None:
    content = os.urandom(2 * _PART + 5)
    visible: list[set[bytes]] = []

    def look(request: S3Request) -> S3Reply | None:
        if request.what == "POST uploadId":
            visible.append(set(server.objects))
        # A part fails once.
        if request.what == "PUT uploadId partNumber" and request.query["partNumber"] == "2":
            return failing(request)
        return None

    failing = once(lambda request: s3_error(503, "SlowDown"))
    server.rules.append(look)
    done = _copy(helper, _file(tmp_path, content), _url(server, "d/large"), len(content))
    assert isinstance(done, DoneEvent), done
    assert done.checksum == adler(content)
    assert server.objects.keys() == {b"d/", b"d/large"}
    assert server.objects[b"d/large"][0] == content
    assert [sorted(keys) for keys in visible] == [[b"d/", b"d/.pdm-0123456789abcdef.1.1.part"]]
    # It comes back in ranges; one of them is cut off.
    server.rules[:] = [once(lambda request: _cut(request, content))]
    back = _copy(helper, _url(server, "d/large"), f"file://{tmp_path}/back", len(content))
    assert isinstance(back, DoneEvent)
    assert (tmp_path / "back").read_bytes() == content


def test_ranges_of_two_versions_are_found_at_a_server_that_ignores_conditions(
    helper: HelperProcess, server: SmallS3Server, tmp_path: Path
) -> None:
    content, other = os.urandom(2 * _PART), os.urandom(2 * _PART)
    server.put("large", content)

    def replaced(request: S3Request) -> S3Reply | None:
        start, _, end = request.headers.get("range", "").removeprefix("bytes=").partition("-")
        if request.method != "GET" or int(start or 0) != _PART:
            return None
        headers = {"Content-Range": f"bytes {start}-{end}/{len(other)}", "ETag": f'"{server.tag_of(other)}"'}
        return S3Reply(206, other[_PART:], headers)

    server.rules.append(replaced)
    done = _copy(helper, _url(server, "large"), f"file://{tmp_path}/back", len(content))
    assert judged("s3", done) == "source SIZE_CHANGED"
    assert list(tmp_path.glob("*back*")) == []


def _cut(request: S3Request, content: bytes) -> S3Reply | None:
    start, _, end = request.headers.get("range", "").removeprefix("bytes=").partition("-")
    if request.method != "GET" or int(start or 0) != _PART:
        return None
    data = content[_PART : int(end) + 1]
    headers = {"Content-Length": str(len(data)), "Content-Range": f"bytes {start}-{end}/{len(content)}"}
    return S3Reply(206, data, headers, cut=1000)


def test_what_a_killed_helper_has_uploaded_is_continued_or_aborted(
    credentials: GridCredentials, server: SmallS3Server, tmp_path: Path
) -> None:
    content = os.urandom(3 * _PART)
    source, destination = _file(tmp_path, content), _url(server, "d/large")
    for ends_in, attempt_goes_on in (("POST uploadId", True), ("POST uploads", False)):
        server.rules[:] = [lambda request, what=ends_in: S3Reply(0) if request.what == what else None]  # type: ignore[misc]
        with HelperProcess(RELAY, _environment(credentials, server, tmp_path)) as killed:
            asked = CopyRequest(1, [copy_item(1, source, destination, len(content))], "never", "checksum", LIMITS)
            killed.send(asked)
            while ends_in not in server.whats():
                pass
            killed.process.kill()
        server.rules.clear()
        assert len(server.uploads) == int(attempt_goes_on)
        server.seen.clear()
        with HelperProcess(RELAY, _environment(credentials, server, tmp_path)) as helper:
            done = _copy(helper, source, destination, len(content), attempt=2, overwrite="always")
        assert isinstance(done, DoneEvent), done
        # All parts were there: none is sent again.
        assert server.whats().count("PUT uploadId partNumber") == (0 if attempt_goes_on else 3)
        assert (server.uploads, server.objects[b"d/large"][0]) == ({}, content)
        assert server.objects.keys() == {b"d/", b"d/large"}
        server.seen.clear()
        del server.objects[b"d/large"]


# -- copies within a server


@pytest.mark.parametrize("is_large", [False, True])
def test_the_server_copies_by_itself(
    credentials: GridCredentials,
    helper: HelperProcess,
    server: SmallS3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_large: bool,
) -> None:
    server.put("source +é", b"content" * 1000)
    asked = (_url(server, "source +é"), _url(server, "d/copy"), 7000)
    if is_large:
        # In this process, where an object of a few bytes can be a very large one.
        for name, value in _environment(credentials, server, tmp_path).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(s3, "LARGEST_COPY", 1000)
        monkeypatch.setattr(s3_uploads, "_COPIED_PART", 3000)
        monkeypatch.setattr(helpers_credentials, "_DEFAULT_TRUST", str(credentials.trust))
        backend = s3.S3Backend()
        backend.timeouts = Timeouts.within(30.0)
        source, temporary, destination = map(StorageUrl, (asked[0], _url(server, "d/.pdm-1.part"), asked[1]))
        backend.expect_rename(temporary, destination, (), ChecksumAlgorithm.ADLER32)
        backend.transfer(source, temporary, 7000, None, lambda _: None)
        assert backend.checksum(temporary, ChecksumAlgorithm.ADLER32) == adler(b"content" * 1000).partition(":")[2]
        backend.rename(temporary, destination, replace=False)
        assert server.whats(b"d/copy").count("PUT uploadId partNumber") == 3
        # Of a part that arrives otherwise, the size of the whole says nothing.
        other = StorageUrl(_url(server, "d/other"))
        server.rules.append(_completed_otherwise(server, lambda data: data[::-1]))
        backend.expect_rename(temporary, other, (), ChecksumAlgorithm.ADLER32)
        backend.transfer(source, temporary, 7000, None, lambda _: None)
        with pytest.raises(StorageError, match="other bytes arrived"):
            backend.rename(temporary, other, replace=False)
        for client in (backend._client, *backend._workers.clients):
            client.close_idle(known_server(source))
    else:
        assert isinstance(_copy(helper, *asked, overwrite="never"), DoneEvent)
    assert server.objects[b"d/copy"][0] == b"content" * 1000
    assert (b"d/.pdm-1.part" in server.objects, server.uploads) == (False, {})


@pytest.mark.parametrize("what", ["POST uploadId", "PUT"], ids=["completes an upload", "copies"])
def test_a_server_that_writes_a_large_object_for_long_is_waited_for(
    what: str, helper: HelperProcess, server: SmallS3Server, tmp_path: Path
) -> None:
    """Longer than anything else may take without a byte: its size says how long."""
    content = os.urandom(_PART + 5)
    server.put("source", content)
    source = _url(server, "source") if what == "PUT" else _file(tmp_path, content)
    taken: list[str] = []

    def takes_long(request: S3Request) -> None:
        if (request.what, request.key) == (what, b"d/new"):
            taken.append(what)
            time.sleep(2.0)

    server.rules.append(takes_long)
    item = copy_item(1, source, _url(server, "d/new"), len(content))
    limits = TimeLimits(stall_s=0.5, total_s=30.0, least_rate=500_000.0)
    done = outcomes(helper.run(CopyRequest(helper.new_id(), [item], "never", "checksum", limits)))[1]
    assert isinstance(done, DoneEvent), done
    assert (taken, server.objects[b"d/new"][0]) == ([what], content)


def _completed_otherwise(server: SmallS3Server, change: Callable[[bytes], bytes]) -> S3Rule:
    """A rule: the server answers that an upload is complete, and keeps other bytes than it was sent."""

    def complete(request: S3Request) -> S3Reply | None:
        if request.what != "POST uploadId":
            return None
        reply = server._own(request)
        data, tag = server.objects[request.key]
        server.objects[request.key] = change(data), tag
        return reply

    return complete


# -- servers of other habits


def test_the_region_of_a_bucket_is_learnt(credentials: GridCredentials, server: SmallS3Server, tmp_path: Path) -> None:
    server.region = "eu-west-7"
    server.put("a")
    with HelperProcess(RELAY, _environment(credentials, server, tmp_path)) as helper:
        assert set(entries(helper.list(server.endpoint))) == {"a"}
        assert len(server.seen) > len(
            [request for request in server.seen if "eu-west-7" in request.headers["authorization"]]
        )
        server.seen.clear()
        assert isinstance(_copy(helper, _file(tmp_path, b"x"), _url(server, "b"), 1), DoneEvent)
        assert all("eu-west-7" in request.headers["authorization"] for request in server.seen)


def test_a_server_without_conditions_is_asked_before(
    helper: HelperProcess, server: SmallS3Server, tmp_path: Path
) -> None:
    server.rules.append(lambda request: s3_error(501, "NotImplemented") if "if-none-match" in request.headers else None)
    source = _file(tmp_path, b"content")
    assert isinstance(_copy(helper, source, _url(server, "a"), 7, overwrite="never"), DoneEvent)
    server.put("a", b"another")
    assert judged("s3", _copy(helper, source, _url(server, "a"), 7, overwrite="never")) == "destination EXISTS"
    assert server.objects[b"a"][0] == b"another"


def test_bytes_that_a_server_changes_are_found(helper: HelperProcess, server: SmallS3Server, tmp_path: Path) -> None:
    source = _file(tmp_path, b"content")
    put = server.put

    def damaged(key: str | bytes, data: bytes = b"") -> None:
        put(key, data[::-1])

    server.put = damaged  # type: ignore[method-assign]
    try:
        assert judged("s3", _copy(helper, source, _url(server, "a"), 7)) == "transfer CHECKSUM_MISMATCH"
        # The tag is no MD5: what the server has is read.
        server.tag_of = lambda data: f"{len(data)}-of-no-digest"
        assert judged("s3", _copy(helper, source, _url(server, "b"), 7)) == "transfer CHECKSUM_MISMATCH"
    finally:
        del server.put
    assert isinstance(_copy(helper, source, _url(server, "c"), 7), DoneEvent)


# -- faults


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (s3_error(403, "AccessDenied"), "source PERMISSION_DENIED"),
        (s3_error(400, "ExpiredToken"), "service CREDENTIAL_EXPIRED"),
        (s3_error(403, "SignatureDoesNotMatch"), "source CREDENTIAL_REFUSED"),
        (s3_error(403, "InvalidAccessKeyId"), "source CREDENTIAL_REFUSED"),
        (s3_error(403, "RequestTimeTooSkewed"), "source SERVER_ERROR"),
        (s3_error(404, "NoSuchBucket"), "source NOT_FOUND"),
        (s3_error(503, "SlowDown", Retry_After="7"), "source BUSY"),
        (s3_error(301, "PermanentRedirect", "<Endpoint>other.example.org</Endpoint>"), "source UNSUPPORTED"),
        (s3_error(500, "InternalError"), "source SERVER_ERROR"),
        (S3Reply(200, b"<ListBucketResult><Contents></ListBucketResult>"), "source BAD_LISTING"),
        (S3Reply(200, b"<html/>"), "source BAD_LISTING"),
        (S3Reply(200, b"<!DOCTYPE a [<!ENTITY b 'c'>]><ListBucketResult>&b;</ListBucketResult>"), "source BAD_LISTING"),
        (S3Reply(200, b"<ListBucketResult>" + b"<a>" * 60_000), "source BAD_LISTING"),
        (S3Reply(200, b"x" * (9 << 20)), "source BAD_LISTING"),
        (S3Reply(200, b"<Error><Code>InternalError</Code></Error>"), "source SERVER_ERROR"),
        (S3Reply(302, b"", {"Location": "https://localhost:1/"}), "source UNKNOWN"),
        (S3Reply(0), "source SERVER_ERROR"),
    ],
)
def test_errors_of_servers(helper: HelperProcess, server: SmallS3Server, reply: S3Reply, expected: str) -> None:
    server.rules.append(lambda request: reply)
    failed = helper.list(server.endpoint)[-1]
    assert judged("s3", failed) == expected
    assert isinstance(failed, FailedEvent)
    assert SECRET not in failed.fault.message
    if "Retry-After" in reply.headers:
        assert failed.fault.retry_after_s == 7.0


def test_a_signature_that_a_server_sends_back_is_left_out(helper: HelperProcess, server: SmallS3Server) -> None:
    server.rules.append(lambda request: S3Reply(500, request.headers["authorization"].encode()))
    failed = helper.list(server.endpoint)[-1]
    assert isinstance(failed, FailedEvent)
    signature = server.seen[-1].headers["authorization"].rpartition("Signature=")[2]
    message = mover_named("s3").classify(failed.fault).message
    assert "Signature=***" in message
    assert signature not in message


# -- answers that are not true


@pytest.mark.parametrize("what", ["nothing", "shorter", "shorter, and the answer is lost", "blanks"])
def test_a_completed_upload_is_looked_at(
    helper: HelperProcess, server: SmallS3Server, tmp_path: Path, what: str
) -> None:
    content = os.urandom(_PART + 5)

    def complete(request: S3Request) -> S3Reply | None:
        if request.what != "POST uploadId":
            return None
        reply = server._own(request)
        if what == "blanks":
            return S3Reply(200, b"  \n " + reply.body)
        data, tag = server.objects.pop(request.key)
        if what != "nothing":
            server.objects[request.key] = data[:_PART], tag
        # As a second request is answered.
        return s3_error(404, "NoSuchUpload") if "lost" in what else reply

    server.rules.append(complete)
    outcome = _copy(helper, _file(tmp_path, content), _url(server, "large"), len(content), verify="size")
    if what == "blanks":
        assert isinstance(outcome, DoneEvent), outcome
        assert server.objects[b"large"][0] == content
    else:
        assert judged("s3", outcome) == "transfer CHECKSUM_MISMATCH"


def test_an_upload_that_the_server_does_not_confirm_is_looked_at(
    helper: HelperProcess, server: SmallS3Server, tmp_path: Path
) -> None:
    server.rules.append(lambda request: S3Reply(200) if request.what == "PUT" else None)
    outcome = _copy(helper, _file(tmp_path, b"content"), _url(server, "a"), 7, verify="size")
    assert judged("s3", outcome) == "transfer CHECKSUM_MISMATCH"


@pytest.mark.parametrize(("tokens", "keys"), [(2, 1000), (1000, 1), (1000, 2)])
def test_a_listing_that_does_not_end_is_given_up(
    helper: HelperProcess, server: SmallS3Server, tokens: int, keys: int
) -> None:
    pages = itertools.count()

    def page(request: S3Request) -> S3Reply:
        number = next(pages)
        token, key = number % tokens, number % keys
        rows = (
            f"<NextContinuationToken>{token}</NextContinuationToken><Contents><Key>{key}</Key><Size>1</Size></Contents>"
        )
        return S3Reply(200, f"<ListBucketResult><IsTruncated>true</IsTruncated>{rows}</ListBucketResult>".encode())

    server.rules.append(page)
    assert judged("s3", helper.list(server.endpoint)[-1]) == "source BAD_LISTING"
    assert next(pages) < 5


def test_a_list_of_parts_that_does_not_end_is_given_up(
    credentials: GridCredentials, server: SmallS3Server, tmp_path: Path
) -> None:
    content = os.urandom(2 * _PART)
    source, destination = _file(tmp_path, content), _url(server, "large")
    server.rules.append(lambda request: S3Reply(0) if request.what == "POST uploadId" else None)
    with HelperProcess(RELAY, _environment(credentials, server, tmp_path)) as killed:
        asked = CopyRequest(1, [copy_item(1, source, destination, len(content))], "never", "checksum", LIMITS)
        killed.send(asked)
        while "POST uploadId" not in server.whats():
            time.sleep(0.01)
        killed.process.kill()
    markers = itertools.count()

    def again(request: S3Request) -> S3Reply | None:
        if request.what != "GET uploadId":
            return None
        rows = "<Part><PartNumber>1</PartNumber><Size>1</Size><ETag>a</ETag></Part><IsTruncated>true</IsTruncated>"
        more = f"<NextPartNumberMarker>{next(markers)}</NextPartNumberMarker>"
        return S3Reply(200, f"<ListPartsResult>{rows}{more}</ListPartsResult>".encode())

    server.rules[:] = [again]
    with HelperProcess(RELAY, _environment(credentials, server, tmp_path)) as helper:
        assert isinstance(_copy(helper, source, destination, len(content), attempt=2), DoneEvent)
    assert next(markers) == 2
    assert server.objects[b"large"][0] == content


def test_an_object_with_the_name_of_a_temporary_one_is_removed(helper: HelperProcess, server: SmallS3Server) -> None:
    for content in (b"some text", b"", b'{"key": "a"}', b"x" * 20_000, b"[" * 16_000):
        server.put("d/.pdm-mine.part", content)
        item = PathItem(1, _url(server, "d/.pdm-mine.part"))
        assert isinstance(_run(helper, RemoveRequest, item), DoneEvent)
        assert server.objects == {}
    server.put("d/.pdm-mine.part")
    server.rules.append(lambda request: s3_error(403, "AccessDenied") if request.method == "GET" else None)
    assert isinstance(_run(helper, RemoveRequest, item), DoneEvent)
    assert server.objects == {}
    server.put("d/.pdm-mine.part")
    server.rules.append(lambda request: s3_error(403, "AccessDenied") if request.method != "HEAD" else None)
    assert judged("s3", _run(helper, RemoveRequest, item)) == "source PERMISSION_DENIED"


def test_an_upload_is_aborted_with_keys_that_may_only_write(
    helper: HelperProcess, server: SmallS3Server, tmp_path: Path
) -> None:
    content = os.urandom(_PART + 5)

    def refuse(request: S3Request) -> S3Reply | None:
        is_record = request.method == "GET" and request.key.endswith(b".part")
        return s3_error(403, "AccessDenied") if is_record or request.what == "PUT uploadId partNumber" else None

    server.rules.append(refuse)
    failed = _copy(helper, _file(tmp_path, content), _url(server, "large"), len(content))
    assert judged("s3", failed) == "destination PERMISSION_DENIED"
    assert (server.uploads, server.objects) == ({}, {})
