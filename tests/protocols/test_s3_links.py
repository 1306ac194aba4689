"""Copies of objects to WebDAV servers that read them by a presigned link, and what becomes of the link."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from pdm.testgrid.identities import GridCredentials, make_credentials
from pdm.workqueue.wire.agent_events import AgentEvent, DoneEvent, FailedEvent
from pdm.workqueue.wire.agent_requests import CopyRequest
from tests.helpers.driver import LIMITS, HelperProcess, adler, copy_item, outcomes
from tests.security import canary
from tests.support.quirk_server import QuirkServer, Reply, Request
from tests.support.s3_server import ACCESS_KEY, SmallS3Server

RELAY = ["-m", "pdm.workqueue.helpers.main_relay"]
SECRET = canary.watched("canary/secret+of=links/4711")
CONTENT = b"content" * 100_000
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def credentials(open_directory: Path) -> GridCredentials:
    directory = open_directory / "links"
    directory.mkdir()
    return make_credentials(directory, ("alice",))


@pytest.fixture
def objects(credentials: GridCredentials) -> Iterator[SmallS3Server]:
    with SmallS3Server(credentials.host.certificate, credentials.host.key, SECRET) as running:
        running.put("d/an object +%é", CONTENT)
        yield running


@pytest.fixture
def webdav(credentials: GridCredentials) -> Iterator[QuirkServer]:
    with QuirkServer(credentials.host.certificate, credentials.host.key) as running:
        yield running


@pytest.fixture
def helper(credentials: GridCredentials, objects: SmallS3Server, tmp_path: Path) -> Iterator[HelperProcess]:
    keys = tmp_path / "keys"
    keys.write_text(json.dumps({"access_key": ACCESS_KEY, "secret_key": SECRET}))
    environment = {
        "X509_USER_PROXY": str(credentials.users["alice"].proxy),
        "X509_CERT_DIR": str(credentials.trust),
        "PDM_CREDENTIALS": json.dumps({objects.endpoint: {"file": str(keys), "account": None}}),
    }
    with HelperProcess(RELAY, environment) as process:
        yield process


@pytest.fixture(params=[None, canary.watched("canary/session+token=4711")])
def token(objects: SmallS3Server, tmp_path: Path, request: pytest.FixtureRequest) -> str | None:
    """A session token that the server wants."""
    objects.session_token = request.param
    (tmp_path / "keys").write_text(
        json.dumps({"access_key": ACCESS_KEY, "secret_key": SECRET, "session_token": request.param})
    )
    return objects.session_token


def _link_of(request: Request) -> str | None:
    return request.headers.get("Source") if request.method == "COPY" else None


def _read(link: str) -> bytes:
    """What anybody reads by a link."""
    context = ssl._create_unverified_context()
    with urllib.request.urlopen(link, context=context, timeout=30) as response:
        content: bytes = response.read()
    return content


def _copied(
    helper: HelperProcess, objects: SmallS3Server, webdav: QuirkServer, name: str, verify: str = "size"
) -> tuple[AgentEvent, str]:
    """The outcome of a copy, and all that the helper has said."""
    source = f"{objects.endpoint}/{quote('d/an object +%é')}"
    item = copy_item(1, source, f"{webdav.url}/d/{name}", len(CONTENT))
    request = CopyRequest(helper.new_id(), [item], "never", verify, LIMITS)  # type: ignore[arg-type]
    events = helper.run(request)
    return outcomes(events)[1], repr(events)


def _reads_of(objects: SmallS3Server) -> tuple[int, int]:
    """Reads of the object by links, and by the service."""
    reads = [request for request in objects.seen if request.method == "GET" and request.key.startswith(b"d/an")]
    by_link = sum("X-Amz-Signature" in request.query for request in reads)
    return by_link, len(reads) - by_link


def test_the_destination_reads_by_a_link(
    helper: HelperProcess, objects: SmallS3Server, webdav: QuirkServer, token: str | None
) -> None:
    links = []

    def pull(request: Request) -> Reply | None:
        if (link := _link_of(request)) is None:
            return None
        links.append(link)
        webdav.tree[request.path] = _read(link)
        return Reply(201, b"success: Created\n")

    webdav.rules.append(pull)
    done, said = _copied(helper, objects, webdav, "f")
    assert isinstance(done, DoneEvent), done
    assert webdav.tree[b"/d/f"] == CONTENT
    assert _reads_of(objects) == (1, 0), "the bytes went through the service"
    (asked,) = (parse_qs(urlsplit(link).query) for link in links)
    assert asked.get("X-Amz-Security-Token", [None]) == [token]
    assert int(asked["X-Amz-Expires"][0]) <= LIMITS.total_s + len(CONTENT)
    assert "X-Amz" not in said
    # A checksum of both ends, if one is asked for.
    done, _ = _copied(helper, objects, webdav, "g", "checksum")
    assert isinstance(done, DoneEvent) and done.checksum == adler(CONTENT)


@pytest.mark.parametrize("answer", [Reply(501), Reply(403), Reply(201, b"failure: 403 from the source\n")])
def test_a_server_that_does_not_is_remembered(
    helper: HelperProcess, objects: SmallS3Server, webdav: QuirkServer, answer: Reply
) -> None:
    webdav.rules.append(lambda request: answer if request.method == "COPY" else None)
    for name in ("f", "g"):
        done, _ = _copied(helper, objects, webdav, name)
        assert isinstance(done, DoneEvent), done
        assert webdav.tree[b"/d/" + name.encode()] == CONTENT
    assert webdav.methods().count("COPY") == 1


_ECHOES: list[Callable[[str], str]] = [
    lambda link: link,
    quote,
    lambda link: link.replace("&", "&amp;"),
    lambda link: link.rpartition("=")[2],
    lambda link: unquote(link.partition("?")[2]),
    lambda link: "x" * 240 + link.rpartition("=")[2] + "y" * 1000,
]


@pytest.mark.parametrize("echo", _ECHOES)
def test_nobody_is_told_the_link(
    helper: HelperProcess, objects: SmallS3Server, webdav: QuirkServer, token: str | None, echo: Callable[[str], str]
) -> None:
    links = []

    def fails(request: Request) -> Reply | None:
        if (link := _link_of(request)) is None:
            return None
        links.append(link)
        markers = b"Perf Marker\nStripe Bytes Transferred: 7\nEnd\n"
        return Reply(201, markers + f"failure: cannot go on with {echo(link)}\n".encode())

    webdav.rules.append(fails)
    failed, said = _copied(helper, objects, webdav, "f")
    assert isinstance(failed, FailedEvent) and "failure: " in failed.fault.message
    (link,) = links
    signature = link.rpartition("=")[2]
    assert not any(signature[at : at + 12] in said for at in range(len(signature) - 12)), said
    assert token is None or not any(form in said for form in (token, quote(token), quote(token, safe="")))
    # The link itself is good: what was hidden would have let the reader in.
    assert _read(link) == CONTENT


def test_a_link_is_of_one_object(helper: HelperProcess, objects: SmallS3Server, webdav: QuirkServer) -> None:
    links = []

    def pull(request: Request) -> Reply | None:
        if (link := _link_of(request)) is not None:
            links.append(link)
        return None

    webdav.rules.append(pull)
    _copied(helper, objects, webdav, "f")
    objects.put("d/other")
    path, _, query = links[0].partition("?")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        _read(f"{path.rpartition('/')[0]}/other?{query}")
