"""Who gets in: real handshakes over loopback."""

from __future__ import annotations

import re
import socket
import ssl
import subprocess
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from OpenSSL import SSL
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from pdm.workqueue.certificates.authority import Authority, Credential
from pdm.workqueue.certificates.pem import CertificateFilesError, to_pem
from pdm.workqueue.certificates.proxies import PROXY_CERT_INFO, key_usage, sign_proxy
from pdm.workqueue.certificates.tls_client import refusal_reason
from pdm.workqueue.certificates.tls_server import ServerTls
from tests.security.odd_certificates import INFORMATION_ACCESS, ODD_NAMES

ALICE = "/DC=org/DC=test/CN=Alice Jones"


async def refusal(ask: Callable[..., Any], host: str = "localhost") -> str:
    """The reason that the client gives for a refused certificate; the test fails if it got an answer."""
    try:
        answer = await ask(host)
    except Exception:
        failure = Failure()
        reason = refusal_reason(failure)
        assert reason is not None, failure.getTraceback()
        return reason
    pytest.fail(f"not refused: {answer}")


@pytest_twisted.ensureDeferred
async def test_user_is_known_by_subject(serve: Any, pki: Any) -> None:
    code, answer = await serve().client(pki.alice)()
    assert code == 200
    assert answer["subject"] == ALICE
    assert answer["limited"] is False
    assert answer["ends_at"] == pki.alice.certificate.not_valid_after_utc.isoformat()


@pytest_twisted.ensureDeferred
async def test_proxies_are_known_as_their_user(serve: Any, pki: Any) -> None:
    server = serve()
    second = pki.alice_proxy.proxy(lifetime=timedelta(hours=2))
    for proxy in (pki.alice_proxy, second):
        code, answer = await server.client(proxy)()
        assert (code, answer["subject"], answer["limited"]) == (200, ALICE, False)
        # The end of a chain is that of its first certificate to expire, not that of the user's.
        assert answer["ends_at"] == proxy.certificate.not_valid_after_utc.isoformat()


@pytest_twisted.ensureDeferred
async def test_end_of_chain_is_not_always_that_of_the_leaf(serve: Any, pki: Any) -> None:
    short = pki.alice.proxy(lifetime=timedelta(hours=1))
    long = short.proxy(lifetime=timedelta(hours=20))
    _, answer = await serve().client(long)()
    assert answer["ends_at"] == short.certificate.not_valid_after_utc.isoformat()


@pytest_twisted.ensureDeferred
async def test_limited_proxy_is_flagged_also_behind_another(serve: Any, pki: Any) -> None:
    server = serve()
    limited = pki.alice.proxy(limited=True)
    for proxy in (limited, limited.proxy()):
        _, answer = await server.client(proxy)()
        assert (answer["subject"], answer["limited"]) == (ALICE, True)


@pytest_twisted.ensureDeferred
async def test_missing_certificate_reaches_the_application(serve: Any) -> None:
    code, _ = await serve().client(None)()
    assert code == 401


@pytest.mark.parametrize("crl", ["require", "if-present", "off"])
@pytest_twisted.ensureDeferred
async def test_every_policy_lets_the_good_in(serve: Any, pki: Any, crl: str) -> None:
    server = serve(crl)
    for credential in (pki.alice, pki.alice_proxy):
        code, _ = await server.client(credential)()
        assert code == 200
    assert server.refused == []


@pytest.fixture(scope="module")
def refused_credentials(pki: Any) -> dict[str, tuple[Credential, str, str]]:
    """Name → credential, reason in the log, a part of the client's error."""
    expired = {"start": timedelta(hours=-2), "lifetime": timedelta(hours=1)}
    carol = pki.authority.user("Carol", **expired)
    return {
        "expired user": (carol, "certificate expired", "expired"),
        "proxy of an expired user": (carol.proxy(), "certificate expired", "expired"),
        "expired proxy": (pki.alice.proxy(**expired), "certificate expired", "expired"),
        "future proxy": (pki.alice.proxy(start=timedelta(hours=1)), "certificate not yet valid", "refused"),
        "unknown authority": (
            pki.stranger,
            "its authority is not trusted here, or part of the chain is missing",
            "authority",
        ),
        "chain incomplete": (
            Credential(pki.alice_proxy.certificate, pki.alice_proxy.key),
            "its authority is not trusted here, or part of the chain is missing",
            "chain",
        ),
        "revoked user": (pki.bob, "certificate revoked", "revoked"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "expired user",
        "proxy of an expired user",
        "expired proxy",
        "future proxy",
        "unknown authority",
        "chain incomplete",
        "revoked user",
    ],
)
@pytest_twisted.ensureDeferred
async def test_bad_certificate_dies_in_the_handshake(
    serve: Any, pki: Any, refused_credentials: dict[str, Any], tls_lines: list[str], name: str
) -> None:
    server = serve(revoked=(pki.bob,))
    credential, logged, told = refused_credentials[name]
    assert told in await refusal(server.client(credential))
    (line,) = tls_lines
    found = re.fullmatch(r"tls refused peer=127\.0\.0\.1:\d+ subject=(/DC=.*) reason=(.*)", line)
    assert found is not None, line
    assert found[2] == logged
    assert server.refused == [logged]


@pytest.mark.parametrize("kind", sorted(ODD_NAMES))
@pytest_twisted.ensureDeferred
async def test_proxy_that_cannot_be_read_is_refused_in_words(
    serve: Any, pki: Any, tls_lines: list[str], kind: str
) -> None:
    """OpenSSL finds nothing wrong with it, and any user can sign one."""
    key = rsa.generate_private_key(65537, 2048)
    plain = pki.alice.proxy()
    builder = (
        x509.CertificateBuilder()
        .subject_name(plain.certificate.subject)
        .issuer_name(pki.alice.certificate.subject)
        .public_key(key.public_key())
        .serial_number(plain.serial)
        .not_valid_before(plain.certificate.not_valid_before_utc)
        .not_valid_after(plain.certificate.not_valid_after_utc)
        .add_extension(x509.UnrecognizedExtension(INFORMATION_ACCESS, ODD_NAMES[kind]), critical=False)
    )
    for extension in plain.certificate.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    odd = Credential(builder.sign(pki.alice.key, hashes.SHA256()), key, (pki.alice.certificate,))
    server = serve()
    assert "its operator finds the reason" in await refusal(server.client(odd))
    (line,) = tls_lines
    assert " reason=certificate cannot be read: " in line
    assert len(server.refused) == 1
    code, _ = await server.client(pki.alice)()
    assert code == 200


@pytest_twisted.ensureDeferred
async def test_proxy_of_a_revoked_user_is_refused(serve: Any, pki: Any, tls_lines: list[str]) -> None:
    server = serve(revoked=(pki.bob,))
    for proxy in (pki.bob_proxy, pki.bob_proxy.proxy()):
        assert "revoked" in await refusal(server.client(proxy))
    assert [line.split("subject=")[1] for line in tls_lines] == [f"{pki.bob.dn} reason=certificate revoked"] * 2
    # The same list does not touch others.
    code, _ = await server.client(pki.alice_proxy)()
    assert code == 200


@pytest_twisted.ensureDeferred
async def test_policy_off_looks_at_no_list(serve: Any, pki: Any) -> None:
    code, _ = await serve("off", revoked=(pki.bob,)).client(pki.bob_proxy)()
    assert code == 200


@pytest_twisted.ensureDeferred
async def test_authority_without_list(serve: Any, pki: Any, tls_lines: list[str]) -> None:
    code, _ = await serve("if-present", revoked=None).client(pki.alice_proxy)()
    assert code == 200
    assert tls_lines == []
    server = serve("require", revoked=None)
    assert "no revocation list" in await refusal(server.client(pki.alice_proxy))
    assert server.refused == ["no usable revocation list of its authority"]
    assert any("no revocation list of /DC=org/DC=test/CN=Test CA" in line for line in tls_lines)


@pytest_twisted.ensureDeferred
async def test_some_authorities_have_lists(serve: Any, pki: Any, tmp_path: Path) -> None:
    """``if-present``: a missing list excuses one authority only, and each level of the chain by itself."""
    below = pki.authority.subordinate("Below")
    dave, erin = below.user("Dave"), below.user("Erin")
    below.write_trust(tmp_path / "trust")
    pki.stranger_authority.write_trust(tmp_path / "trust")
    # The root has no list, the authority below it has one: the missing one must not switch off the one there is.
    below.write_crl(tmp_path / "trust", below.crl([dave.serial]))
    server = serve("if-present", revoked=None)
    await refusal(server.client(dave))
    await refusal(server.client(dave.proxy()))
    for credential in (erin, erin.proxy(), pki.stranger, pki.alice):
        code, _ = await server.client(credential)()
        assert code == 200
    # And the other way round: the root's list names the authority below it.
    pki.authority.write_crl(tmp_path / "trust", pki.authority.crl([below.certificate.serial_number]))
    server.tls.reload()
    await refusal(server.client(erin.proxy()))
    assert server.refused == ["certificate revoked"] * 3


@pytest.mark.parametrize("crl", ["require", "if-present"])
@pytest_twisted.ensureDeferred
async def test_expired_list_refuses(serve: Any, pki: Any, tmp_path: Path, tls_lines: list[str], crl: str) -> None:
    server = serve(crl)
    ended = pki.authority.crl(start=timedelta(days=-2), lifetime=timedelta(days=1))
    pki.authority.write_crl(tmp_path / "trust", ended)
    server.tls.reload()
    assert any("is valid until" in line and "fetch-crl" in line for line in tls_lines)
    await refusal(server.client(pki.alice_proxy))
    assert server.refused == ["the revocation list of its authority has expired"]


@pytest.mark.parametrize("content", [b"<html>404 not found</html>", b"", b"-----BEGIN X509 CRL-----\nAAAA\n"])
@pytest_twisted.ensureDeferred
async def test_damaged_list_refuses(serve: Any, pki: Any, tmp_path: Path, tls_lines: list[str], content: bytes) -> None:
    """With ``if-present`` a broken download must not let in whom the list names."""
    server = serve("if-present")
    for path in (tmp_path / "trust").glob("*.r0"):
        path.write_bytes(content)
    server.tls.reload()
    assert any(".r0 holds no revocation list that can be read" in line for line in tls_lines)
    await refusal(server.client(pki.alice))
    assert server.refused == ["no usable revocation list of its authority"]


@pytest_twisted.ensureDeferred
async def test_list_signed_by_another_refuses(serve: Any, pki: Any, tmp_path: Path, tls_lines: list[str]) -> None:
    server = serve("if-present", revoked=None)
    namesake = Authority.create(pki.authority.dn)
    pki.authority.write_crl(tmp_path / "trust", namesake.crl())
    server.tls.reload()
    assert any("is not signed by" in line for line in tls_lines)
    await refusal(server.client(pki.alice))


@pytest_twisted.ensureDeferred
async def test_new_list_is_in_force_without_restart(serve: Any, pki: Any, tmp_path: Path, tls_lines: list[str]) -> None:
    server = serve()
    bob, alice = server.client(pki.bob_proxy), server.client(pki.alice)
    assert (await bob())[0] == 200
    assert (await alice())[0] == 200
    assert await server.tls.refresh_if_changed(deferToThread) is False
    pki.authority.write_crl(tmp_path / "trust", pki.authority.crl([pki.bob.serial]))
    assert await server.tls.refresh_if_changed(deferToThread) is True
    # Also the connection that Bob still held was closed: his next request needs a new one.
    assert "revoked" in await refusal(bob)
    assert [line.split(" peer=")[0] for line in tls_lines if "peer=" in line] == ["tls closed", "tls refused"]
    assert (await alice())[0] == 200
    assert await server.tls.refresh_if_changed(deferToThread) is False


@pytest_twisted.ensureDeferred
async def test_unfit_files_leave_the_former_in_force(
    serve: Any, pki: Any, tmp_path: Path, lost_errors: list[Any]
) -> None:
    server = serve(revoked=(pki.bob,))
    (tmp_path / "host.key").write_text("nonsense")
    assert await server.tls.refresh_if_changed(deferToThread) is False
    assert len(lost_errors) == 1
    assert "holds no private key" in lost_errors.pop()["error"]
    assert (await server.client(pki.alice)())[0] == 200
    await refusal(server.client(pki.bob))


@pytest_twisted.ensureDeferred
async def test_renewed_host_certificate_is_taken(serve: Any, pki: Any, tmp_path: Path) -> None:
    server = serve(host=pki.other_host)
    assert "host name" in await refusal(server.client(pki.alice))
    pki.host.write_certificate(tmp_path / "host.crt")
    pki.host.write_key(tmp_path / "host.key")
    assert await server.tls.refresh_if_changed(deferToThread) is True
    assert (await server.client(pki.alice)())[0] == 200


@pytest_twisted.ensureDeferred
async def test_handshake_begun_before_a_new_list_ends_by_it(serve: Any, pki: Any, tmp_path: Path) -> None:
    server = serve()

    class Peer:
        def getPeer(self) -> str:
            return "in memory"

        def getHandle(self) -> None:
            return None

    judging = server.tls.serverConnectionForTLS(Peer())
    judging.set_accept_state()
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.use_certificate(pki.bob.certificate)
    context.use_privatekey(pki.bob.key)
    showing = SSL.Connection(context, None)
    showing.set_connect_state()
    _step(showing)
    judging.bio_write(showing.bio_read(1 << 16))
    _step(judging)
    pki.authority.write_crl(tmp_path / "trust", pki.authority.crl([pki.bob.serial]))
    server.tls.reload()
    showing.bio_write(judging.bio_read(1 << 16))
    _step(showing)
    judging.bio_write(showing.bio_read(1 << 16))
    with pytest.raises(SSL.Error):
        judging.do_handshake()
    assert server.refused == ["certificate revoked"]


def _step(connection: SSL.Connection) -> None:
    with suppress(SSL.WantReadError):
        connection.do_handshake()


@pytest_twisted.ensureDeferred
async def test_kept_connection_outlives_its_proxy(serve: Any, pki: Any) -> None:
    """OpenSSL does not look again, so the end of the chain must be told to who answers each request."""
    server = serve()
    ask = server.client(pki.alice_proxy)
    _, first = await ask()
    server.application.now = pki.alice_proxy.certificate.not_valid_after_utc
    _, second = await ask()
    assert second["peer"] == first["peer"]
    assert (first["expired"], second["expired"]) == (False, True)


# Certificates that are formally chained, and must not count


def _signed_by(issuer: Credential, name: x509.Name, *, ca: bool = False, info: bytes | None = None) -> Credential:
    key = issuer.proxy().key
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(key_usage(digital_signature=True), critical=True)
    )
    if info is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(PROXY_CERT_INFO, info), critical=True)
    return Credential(builder.sign(issuer.key, hashes.SHA256()), key, (issuer.certificate, *issuer.chain))


def _common_name(*texts: str) -> list[x509.NameAttribute[Any]]:
    return [x509.NameAttribute(x509.NameOID.COMMON_NAME, text) for text in texts]


_INFO = bytes.fromhex("300c300a06082b06010505071501")


@pytest_twisted.ensureDeferred
async def test_user_is_no_authority(serve: Any, pki: Any) -> None:
    server = serve()
    victim = x509.Name([*list(pki.alice.certificate.subject)[:-1], *_common_name("Victim")])
    for forged in (_signed_by(pki.bob, victim), _signed_by(pki.bob_proxy, victim)):
        await refusal(server.client(forged))
    assert server.refused == ["signed by a certificate that is no authority"] * 2


@pytest_twisted.ensureDeferred
async def test_old_style_proxy_is_refused(serve: Any, pki: Any) -> None:
    server = serve()
    old = _signed_by(pki.alice, x509.Name([*pki.alice.certificate.subject, *_common_name("proxy")]))
    await refusal(server.client(old))


@pytest_twisted.ensureDeferred
async def test_proxy_must_be_named_after_its_issuer(serve: Any, pki: Any) -> None:
    server = serve()
    bob = list(pki.bob.certificate.subject)
    for name in (
        [*list(pki.alice.certificate.subject), *_common_name("1")],
        [*bob, *_common_name("1", "2")],
        bob,
        bob[:-1],
        [*bob, x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "1")],
    ):
        await refusal(server.client(_signed_by(pki.bob, x509.Name(name), info=_INFO)))
    no_name, self_signed = "the subject of a proxy is not that of its issuer plus one CN", "certificate is self-signed"
    assert server.refused.count(no_name) == 4
    assert sum(reason.startswith(self_signed) for reason in server.refused) == 1


@pytest_twisted.ensureDeferred
async def test_authority_is_no_client(serve: Any, pki: Any) -> None:
    server = serve()
    root = Credential(pki.authority.certificate, pki.authority.key)
    acting = _signed_by(root, x509.Name(_common_name("Acting CA")), ca=True)
    await refusal(server.client(acting))
    name = x509.Name(_common_name("Acting CA", "1"))
    await refusal(server.client(_signed_by(acting, name, info=_INFO)))
    assert server.refused == ["certificate of an authority, not of a client", "a proxy of an authority's certificate"]


@pytest_twisted.ensureDeferred
async def test_short_keys_are_refused_in_words(serve: Any, pki: Any) -> None:
    server = serve()
    key = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    now = datetime.now(UTC)
    weak = sign_proxy(
        pki.alice.certificate, pki.alice.key, key.public_key(), now - timedelta(hours=1), now + timedelta(hours=1)
    )
    # OpenSSL does not let us show such a certificate at the usual level of security: ask for less.
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_cipher_list(b"DEFAULT:@SECLEVEL=0")
    context.use_certificate(weak)
    context.add_extra_chain_cert(pki.alice.certificate)
    context.use_privatekey(key)

    def connect() -> None:
        with socket.create_connection(("127.0.0.1", server.port)) as plain:
            connection = SSL.Connection(context, plain)
            connection.set_connect_state()
            connection.setblocking(True)
            connection.do_handshake()
            connection.recv(1)

    with pytest.raises(SSL.Error):
        await deferToThread(connect)
    assert server.refused == ["key too short (2048 bits are needed)"]


# The connection itself


@pytest_twisted.ensureDeferred
async def test_hosts_are_checked_by_name_and_address(serve: Any, pki: Any) -> None:
    server = serve()
    ask = server.client(pki.alice)
    assert (await ask("localhost"))[0] == 200
    assert (await ask("127.0.0.1"))[0] == 200
    other = serve(host=pki.other_host)
    for host in ("localhost", "127.0.0.1"):
        assert await refusal(other.client(pki.alice), host) == "the service's certificate is for another host name"


@pytest_twisted.ensureDeferred
async def test_untrusted_service_is_refused(serve: Any, pki: Any, tmp_path: Path) -> None:
    pki.stranger_authority.write_trust(tmp_path / "stranger")
    reason = await refusal(serve().client(pki.alice, tmp_path / "stranger"))
    assert reason.startswith("the service's certificate is not trusted")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest_twisted.ensureDeferred
async def test_no_session_is_resumed(serve: Any, pki: Any, tmp_path: Path, version: ssl.TLSVersion) -> None:
    """A resumed session would not show its certificate again: a list that came meanwhile would be passed by."""
    server = serve()
    pki.alice.write_bundle(tmp_path / "alice.pem")
    context = ssl.create_default_context(capath=str(tmp_path / "trust"))
    context.minimum_version = context.maximum_version = version
    context.load_cert_chain(tmp_path / "alice.pem")

    def connect(session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool | None]:
        with (
            socket.create_connection(("127.0.0.1", server.port)) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as secured,
        ):
            secured.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            while secured.recv(4096):
                pass
            return secured.session, secured.session_reused

    session, _ = await deferToThread(connect, None)
    _, reused = await deferToThread(connect, session)
    assert reused is False


@pytest_twisted.ensureDeferred
async def test_old_tls_is_refused(serve: Any, pki: Any) -> None:
    server = serve()
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", "-tls1_1", "-cipher", "ALL:@SECLEVEL=0"]
    done = await deferToThread(subprocess.run, command, input=b"", capture_output=True)
    assert done.returncode != 0
    assert b"protocol version" in done.stderr


@pytest_twisted.ensureDeferred
async def test_subject_cannot_forge_a_line(serve: Any, pki: Any, tls_lines: list[str]) -> None:
    evil = pki.stranger_authority.user("x\ntls refused peer=1.2.3.4:5 subject=/CN=admin reason=none")
    await refusal(serve().client(evil))
    (line,) = tls_lines
    assert "\n" not in line
    assert r"x\x0atls refused" in line


def test_start_with_unfit_files_says_which(pki: Any, serve: Any, expired: dict[str, timedelta], tmp_path: Path) -> None:
    serve()
    certificate, key, trust = tmp_path / "host.crt", tmp_path / "host.key", tmp_path / "trust"
    empty = tmp_path / "empty"
    empty.mkdir()
    ended = pki.authority.host(["localhost"], **expired)
    ended.write_certificate(tmp_path / "ended.crt")
    ended.write_key(tmp_path / "ended.key")
    for arguments, words in (
        ((tmp_path / "none.crt", key, trust), "none.crt cannot be read"),
        ((certificate, certificate, trust), "holds no private key"),
        ((certificate, key, tmp_path / "none"), "none cannot be read"),
        ((certificate, key, empty), "holds no authority"),
        ((certificate, tmp_path / "ended.key", trust), "does not belong"),
        ((tmp_path / "ended.crt", tmp_path / "ended.key", trust), "expired at"),
    ):
        with pytest.raises(CertificateFilesError, match=re.escape(words)):
            ServerTls(*arguments)


@pytest_twisted.ensureDeferred
async def test_trust_may_be_one_file(serve: Any, pki: Any, tmp_path: Path) -> None:
    crl = pki.authority.crl([pki.bob.serial])
    bundle = tmp_path / "ca.pem"
    bundle.write_bytes(to_pem(pki.authority.certificate) + crl.public_bytes(Encoding.PEM))
    server = serve("require", trust=bundle)
    assert (await server.client(pki.alice_proxy)())[0] == 200
    assert "revoked" in await refusal(server.client(pki.bob_proxy))
