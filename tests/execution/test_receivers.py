"""Messages to receivers that users choose: what is sent, what is refused, and what hostile receivers get."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from attrs import define
from twisted.internet.defer import Deferred, gatherResults
from twisted.web.server import Site

from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.certificates.tls_client import client_policy
from pdm.workqueue.domain.addresses import AddressRange
from pdm.workqueue.domain.notifications import SendResult
from pdm.workqueue.execution.checked_connections import AddressPolicy
from pdm.workqueue.execution.receivers import Receivers
from tests.support.receivers import Names, Receiver, reactor

NAME = "receiver.example.org"
REFUSED = "its address is of the service's own machine or its link, or excluded by the operator"


@define
class Stand:
    """Receivers, and what may be reached of them."""

    authority: Authority
    directory: Path
    receiver: Receiver
    names: Names

    def receivers(self, *allowed: str, timeout_s: float = 5.0, **more: Any) -> Receivers:
        policy = AddressPolicy(allowed=[AddressRange.parse(each) for each in allowed], **more)
        receivers = Receivers(
            reactor=reactor,
            addresses=policy,
            tls=client_policy(self.directory / "trust"),
            timeout_s=timeout_s,
            user_agent="test",
            look_up=self.names,
        )
        receivers.start()
        return receivers

    async def send(self, url: str, *allowed: str, **more: Any) -> SendResult:
        receivers = self.receivers(*allowed, **more)
        try:
            return await receivers.send(url, b'{"a":1}', {"webhook-id": "msg_1"})
        finally:
            receivers.stop()

    def listen(self, host: str = NAME) -> int:
        return self.receiver.listen(self.authority.host([host], ["127.0.0.1"]))


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("/DC=org/DC=test/CN=Receivers CA")


@pytest.fixture
def stand(authority: Authority, tmp_path: Path) -> Iterator[Stand]:
    authority.write_trust(tmp_path / "trust")
    receiver = Receiver()
    yield Stand(authority, tmp_path, receiver, Names({NAME: [["127.0.0.1"]]}))
    pytest_twisted.blockon(Deferred.fromCoroutine(receiver.close()))


@pytest_twisted.ensureDeferred
async def test_a_message_arrives_as_it_is(stand: Stand) -> None:
    port = stand.listen()
    result = await stand.send(f"https://{NAME}:{port}/path?x=1", f"127.0.0.1:{port}")
    assert (result.status, result.error) == (204, None)
    (message,) = stand.receiver.messages
    assert message.body == '{"a":1}'
    assert message.headers["webhook-id"] == "msg_1"
    assert message.headers["content-type"] == "application/json"
    assert message.headers["host"] == f"{NAME}:{port}"


@pytest.mark.parametrize(
    "addresses",
    [
        *(["127.0.0.1"], ["127.8.9.10"], ["::1"], ["::ffff:127.0.0.1"], ["0.0.0.0"], ["::"], ["169.254.169.254"]),
        *(["fe80::1"], ["64:ff9b::7f00:1"], ["2002:7f00:1::1"], ["::127.0.0.1"], ["2130706433"], ["0x7f.1"]),
        *(["224.0.0.1"], ["ff02::1"], ["127.0.0.1", "::1"]),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_name_of_this_machine_or_its_link_is_refused(stand: Stand, addresses: list[str]) -> None:
    port = stand.listen()
    stand.names.addresses[NAME] = [addresses]
    result = await stand.send(f"https://{NAME}:{port}/")
    assert (result.status, result.error) == (None, REFUSED)
    assert not stand.receiver.messages


@pytest_twisted.ensureDeferred
async def test_addresses_of_its_interfaces_are_refused(stand: Stand) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: this chooses the interface.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        own = probe.getsockname()[0]
    stand.names.addresses[NAME] = [[own]]
    assert (await stand.send(f"https://{NAME}:9/")).error == REFUSED


@pytest_twisted.ensureDeferred
async def test_what_the_operator_excludes_is_refused(stand: Stand) -> None:
    stand.names.addresses[NAME] = [["10.1.2.3"]]
    refused = [AddressRange.parse("10.0.0.0/8")]
    assert (await stand.send(f"https://{NAME}/", refused=refused)).error == REFUSED
    stand.names.addresses[NAME] = [["::ffff:10.1.2.3"]]
    assert (await stand.send(f"https://{NAME}/", refused=refused)).error == REFUSED


@pytest_twisted.ensureDeferred
async def test_a_name_that_changes_leads_nowhere_else(stand: Stand) -> None:
    port = stand.listen()
    other = Receiver()
    # The same port at another loopback address, which is not allowed.
    listening = reactor.listenTCP(port, _site(other), interface="127.0.0.2")
    stand.names.addresses[NAME] = [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2", "127.0.0.1"]]
    receivers = stand.receivers(f"127.0.0.1:{port}")
    found = [await receivers.send(f"https://{NAME}:{port}/", b"{}", {}) for _ in range(3)]
    receivers.stop()
    await listening.stopListening()
    assert [each.error for each in found] == [None, REFUSED, None]
    assert (len(stand.receiver.messages), other.messages) == (2, [])


def _site(receiver: Receiver) -> Site:
    site = Site(receiver)
    site.noisy = False
    return site


@pytest_twisted.ensureDeferred
async def test_an_allowed_port_is_not_the_whole_machine(stand: Stand) -> None:
    port = stand.listen()
    assert (await stand.send(f"https://{NAME}:{port}/", f"127.0.0.1:{port + 1}")).error == REFUSED


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest_twisted.ensureDeferred
async def test_redirects_are_not_followed(stand: Stand, status: int) -> None:
    port = stand.listen()
    stand.receiver.answer = lambda _: (status, {"Location": f"https://127.0.0.1:{port}/inside"})
    result = await stand.send(f"https://{NAME}:{port}/", "127.0.0.1")
    assert (result.status, result.error) == (status, f"it answered {status}, a redirect, which is not followed")
    assert len(stand.receiver.messages) == 1


@pytest_twisted.ensureDeferred
async def test_an_error_is_no_success_and_nothing_of_it_is_shown(stand: Stand) -> None:
    port = stand.listen()
    stand.receiver.answer = lambda _: (503, {"Retry-After": "120"})
    result = await stand.send(f"https://{NAME}:{port}/", "127.0.0.1")
    assert (result.status, result.error, result.retry_after_s) == (503, "it answered 503, not a success", 120.0)


@pytest_twisted.ensureDeferred
async def test_a_receiver_that_hangs_is_left_after_the_timeout(stand: Stand) -> None:
    port = stand.listen()
    stand.receiver.answer = lambda _: "hang"
    begun = time.monotonic()
    result = await stand.send(f"https://{NAME}:{port}/", "127.0.0.1", timeout_s=0.5)
    assert result.error == "it did not answer within 0.5 s"
    assert time.monotonic() - begun < 4
    gone: list[Any] = [request.notifyFinish().addErrback(lambda _: None) for request in stand.receiver.hanging]
    await gatherResults(gone)


@pytest_twisted.ensureDeferred
async def test_a_server_that_never_accepts_is_left_after_the_timeout(stand: Stand) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        result = await stand.send(f"https://{NAME}:{port}/", "127.0.0.1", timeout_s=0.5)
    assert result.error == "it did not answer within 0.5 s"


@pytest.mark.parametrize(
    ("first", "again", "error"),
    [
        (
            b"HTTP/1.1 200 OK\r\n",
            b"X-Header: " + b"x" * 8000 + b"\r\n",
            "it answered with more than 65536 bytes before the end of its headers",
        ),
        (b"nonsense\r\n\r\n", b"", "it closed the connection without a complete answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n", b"x" * 8000, None),
    ],
    ids=["endless-headers", "no-http", "endless-body"],
)
@pytest_twisted.ensureDeferred
async def test_what_is_received_is_bounded(stand: Stand, first: bytes, again: bytes, error: str | None) -> None:
    port = stand.receiver.listen_raw(stand.authority.host([NAME], []), first, again)
    begun = time.monotonic()
    result = await stand.send(f"https://{NAME}:{port}/", "127.0.0.1")
    assert result.error == error
    assert time.monotonic() - begun < 4


@pytest_twisted.ensureDeferred
async def test_certificates_are_verified(stand: Stand) -> None:
    stranger = Authority.create("/DC=org/DC=test/CN=Another CA")
    for credential in (stranger.host([NAME], []), stand.authority.host(["other.example.org"], [])):
        port = stand.receiver.listen(credential)
        result = await stand.send(f"https://{NAME}:{port}/", "127.0.0.1")
        assert result.error is not None
        assert result.error.startswith("its TLS certificate is not trusted")
    assert not stand.receiver.messages


@pytest_twisted.ensureDeferred
async def test_servers_that_are_away(stand: Stand) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert (await stand.send(f"https://{NAME}:{port}/", "127.0.0.1")).error == "it refused the connection"
    stand.names.addresses["nowhere.example.org"] = [[]]
    assert (await stand.send("https://nowhere.example.org/")).error == "its name cannot be resolved"


@pytest_twisted.ensureDeferred
async def test_plain_http_only_where_the_operator_allows_it(stand: Stand) -> None:
    port = stand.receiver.listen(None)
    url = f"http://{NAME}:{port}/"
    refused = await stand.send(url, "127.0.0.1")
    assert refused.error is not None
    assert "https://" in refused.error
    assert (await stand.send(url, "127.0.0.1", plain_http=True)).status == 204


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://h/", "https://", "https:///x", "https://u:p@h/", "https://h/#f", "https://h:0/", "https://h:99999/"),
        *("https://h\r\nX: y/", "https://h/\\x", "https://h/ x", "https://ä.example/", "//h/", "https://h@127.0.0.1/"),
        *("https://localhost/", "https://127.1/", "https://0x7f000001/", "https://2130706433/", "https://[::1]/"),
        *("https://[::ffff:127.0.0.1]/", "https://169.254.169.254/", "https://[fe80::1]/", "https://a.localhost./"),
    ],
)
def test_urls_that_are_not_accepted(url: str) -> None:
    with pytest.raises(ValueError, match=r"https://|not accepted|port"):
        AddressPolicy().check_url(url)
