"""VOMS attributes are read out of real proxies, and out of no garbage."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509

from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.certificates.proxies import VomsAttributes, _read, voms_attributes

#: Made with voms-proxy-fake, as a VOMS server's client makes them.
_PROXY = Path(__file__).parent / "data" / "voms-proxy.pem"
_AC_SEQUENCE = x509.ObjectIdentifier("1.3.6.1.4.1.8005.100.100.5")


@pytest.fixture(scope="module")
def proxy() -> x509.Certificate:
    return x509.load_pem_x509_certificate(_PROXY.read_bytes())


def test_the_organisation_and_its_roles_are_read(proxy: x509.Certificate) -> None:
    fqans = ("/testvo/Role=production/Capability=NULL", "/testvo/Role=NULL/Capability=NULL")
    assert voms_attributes([proxy]) == (VomsAttributes("testvo", fqans),)


def test_a_proxy_of_it_has_them_too_and_others_have_none(proxy: x509.Certificate) -> None:
    plain = Authority.create("/DC=org/CN=CA").user("alice").certificate
    assert voms_attributes([plain]) == ()
    assert voms_attributes([plain, proxy]) == voms_attributes([proxy])


def test_garbage_is_nothing(proxy: x509.Certificate) -> None:
    extension = proxy.extensions.get_extension_for_oid(_AC_SEQUENCE).value
    assert isinstance(extension, x509.UnrecognizedExtension)
    whole = extension.value
    assert _read(whole)
    for cut in range(len(whole)):
        _read(whole[:cut])
    for at in range(0, len(whole), 7):
        for value in (0x00, 0x30, 0x80, 0xFF):
            _read(whole[:at] + bytes([value]) + whole[at + 1 :])
    nested = b""
    for _ in range(60):
        nested = bytes([0x30, len(nested)]) + nested
    assert _read(nested) == ()
