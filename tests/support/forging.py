"""Certificates that no authority should sign: of others' subjects, odd proxies, authorities below others."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa

from pdm.workqueue.certificates.authority import Authority, Credential
from pdm.workqueue.certificates.names import parse_dn
from pdm.workqueue.certificates.proxies import PROXY_CERT_INFO, key_usage

#: ProxyCertInfo: "inherit all", "independent", an unknown policy, the same with a path length of 0, invalid.
INHERIT_ALL = bytes.fromhex("300c300a06082b06010505071501")
INDEPENDENT = bytes.fromhex("300c300a06082b06010505071502")
UNKNOWN_POLICY = bytes.fromhex("3011300f06082b060105050715630403616263")
NO_MORE_PROXIES = bytes.fromhex("300f020100300a06082b06010505071501")
_KEYS: list[rsa.RSAPrivateKey] = []


def certified(
    issuer: Credential | Authority,
    subject: str | x509.Name,
    *extensions: tuple[x509.ExtensionType, bool],
    ca: bool = False,
    key: rsa.RSAPrivateKey | None = None,
    **validity: Any,
) -> Credential:
    """Sign any subject with any extensions; all share one key, because generating keys takes long."""
    if not _KEYS:
        _KEYS.append(rsa.generate_private_key(65537, 2048))
    own = key or _KEYS[0]
    start = datetime.now(UTC).replace(microsecond=0) + validity.get("start", timedelta(minutes=-5))
    builder = (
        x509.CertificateBuilder()
        .subject_name(parse_dn(subject) if isinstance(subject, str) else subject)
        .issuer_name(issuer.certificate.subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + validity.get("lifetime", timedelta(days=1)))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(key_usage(digital_signature=not ca, signs_certificates=ca), critical=True)
    )
    for extension, critical in extensions:
        builder = builder.add_extension(extension, critical=critical)
    root = isinstance(issuer, Authority) and issuer.certificate.issuer == issuer.certificate.subject
    chain = () if root else (issuer.certificate, *issuer.chain)
    return Credential(builder.sign(issuer.key, hashes.SHA256()), own, chain)


def as_authority(credential: Credential) -> Authority:
    """An authority's certificate that `certified` has signed, to sign with."""
    return Authority(credential.certificate, credential.key, credential.chain)


def odd_proxy(issuer: Credential, info: bytes | None, *, critical: bool = True, name: str = "1") -> Credential:
    """A proxy with this ProxyCertInfo, None for a legacy one without."""
    own = x509.RelativeDistinguishedName([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    subject = x509.Name([*issuer.certificate.subject.rdns, own])
    extensions = [] if info is None else [(x509.UnrecognizedExtension(PROXY_CERT_INFO, info), critical)]
    return certified(issuer, subject, *extensions, lifetime=timedelta(hours=1))
