"""The test authority: what it writes is what other software reads."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.certificates.proxies import end_entity, is_limited, is_proxy, lifetime_end


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_openssl_accepts_users_hosts_and_proxies(pki: Any, tmp_path: Path) -> None:
    trust = tmp_path / "trust"
    pki.authority.write_trust(trust)
    pki.authority.write_crl(trust, pki.authority.crl([pki.bob.serial]))
    below = pki.authority.subordinate("Below")
    below.write_trust(trust)
    command = ["openssl", "verify", "-CApath", str(trust), "-crl_check", "-allow_proxy_certs", "-purpose", "sslclient"]
    for label, credential, verdict in (
        ("user", pki.alice, 0),
        ("host", pki.host, 0),
        ("proxy", pki.alice_proxy, 0),
        ("proxy of a proxy", pki.alice_proxy.proxy(limited=True), 0),
        ("revoked", pki.bob, 2),
    ):
        path = tmp_path / f"{label}.pem"
        credential.write_certificate(path)
        done = subprocess.run([*command, "-untrusted", str(path), str(path)], capture_output=True, check=False)
        assert done.returncode == verdict, (label, done)
    below.user("Dave").write_certificate(tmp_path / "dave.pem")
    command.remove("-crl_check")
    assert subprocess.run([*command, str(tmp_path / "dave.pem")], capture_output=True, check=False).returncode == 0


def test_private_files_are_private(pki: Any, tmp_path: Path) -> None:
    pki.alice.write_key(tmp_path / "key")
    (tmp_path / "bundle").write_text("was readable by all")
    (tmp_path / "bundle").chmod(0o644)
    pki.alice_proxy.write_bundle(tmp_path / "bundle")
    pki.authority.write(tmp_path / "ca")
    assert [_mode(tmp_path / each) for each in ("key", "bundle", "ca/ca.key")] == [0o600] * 3
    # The order that grid tools want: certificate, key, then the chain.
    words = [line for line in (tmp_path / "bundle").read_text().splitlines() if line.startswith("-----BEGIN")]
    assert words == ["-----BEGIN CERTIFICATE-----", "-----BEGIN RSA PRIVATE KEY-----", "-----BEGIN CERTIFICATE-----"]


def test_keys_are_not_shown(pki: Any) -> None:
    assert "key" not in repr(pki.alice)
    assert "key" not in repr(pki.authority)


def test_authority_can_be_loaded_again(pki: Any, tmp_path: Path) -> None:
    pki.authority.write(tmp_path)
    assert (
        Authority.load(tmp_path) == pki.authority or Authority.load(tmp_path).certificate == pki.authority.certificate
    )


def test_signing_policy_covers_what_is_signed(pki: Any, tmp_path: Path) -> None:
    pki.authority.write_trust(tmp_path)
    for path in tmp_path.glob("*.signing_policy"):
        assert "'\"/DC=org/DC=test/CN=*\"'" in path.read_text()
    assert pki.alice.dn == "/DC=org/DC=test/CN=Alice Jones"


def test_proxy_words(pki: Any) -> None:
    limited = pki.alice.proxy(limited=True)
    above = limited.proxy()
    chain = (above.certificate, *above.chain)
    assert [is_proxy(each) for each in chain] == [True, True, False]
    assert [is_limited(each) for each in chain] == [True, True, False]
    assert end_entity(chain) == pki.alice.certificate
    assert lifetime_end(chain) == min(each.not_valid_after_utc for each in chain)
    with pytest.raises(ValueError, match="only proxies"):
        end_entity(chain[:2])


def test_host_names_and_addresses(pki: Any) -> None:
    names = pki.host.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(each) for each in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
