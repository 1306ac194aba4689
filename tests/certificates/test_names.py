"""Subjects as text: one text for each name, never one text for two."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from pdm.workqueue.certificates.authority import Authority
from pdm.workqueue.certificates.names import dn, parse_dn, subject_hash, subject_hash_old
from pdm.workqueue.domain.subjects import normal_subject


def name(*parts: tuple[x509.ObjectIdentifier, str]) -> x509.Name:
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in parts])


_CN, _DC, _UID = NameOID.COMMON_NAME, NameOID.DOMAIN_COMPONENT, NameOID.USER_ID


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([(_DC, "org"), (_DC, "example"), (_CN, "Alice Jones")], "/DC=org/DC=example/CN=Alice Jones"),
        ([(_CN, "Åsa Öberg (prod) + x=y")], "/CN=Åsa Öberg (prod) + x=y"),
        ([(_CN, "host/www.example.org")], "/CN=host/www.example.org"),
        ([(_CN, "a/"), (_CN, "/b/1.2=c\\/d")], r"/CN=a//CN=/b\/1.2=c\\/d"),
        ([(_CN, "a\\b")], r"/CN=a\\b"),
        ([(_CN, "a\nb\x00\x7f\u202e")], r"/CN=a\x0ab\x00\x7f\xe2\x80\xae"),
        ([(NameOID.EMAIL_ADDRESS, "a@example.org"), (_UID, "7")], "/emailAddress=a@example.org/UID=7"),
        ([(x509.ObjectIdentifier("1.2.3.4"), "v")], "/1.2.3.4=v"),
    ],
)
def test_slash_form(parts: list[Any], text: str) -> None:
    assert dn(name(*parts)) == text
    assert parse_dn(text) == name(*parts)


def test_one_value_cannot_pass_for_two_parts() -> None:
    honest = name((_DC, "org"), (_CN, "alice"), (_CN, "admin"))
    forged = name((_DC, "org"), (_CN, "alice/CN=admin"))
    assert dn(honest) == "/DC=org/CN=alice/CN=admin"
    assert dn(forged) == r"/DC=org/CN=alice\/CN=admin"


def test_values_of_one_part_cannot_pass_for_one_value() -> None:
    one_part = [x509.NameAttribute(_CN, "a"), x509.NameAttribute(_UID, "b")]
    joined = x509.Name([x509.RelativeDistinguishedName(one_part)])
    texts = {dn(joined), dn(name((_CN, "a+UID=b"))), dn(name((_CN, r"a\+UID=b"))), dn(name((_CN, "a"), (_UID, "b")))}
    assert len(texts) == 4


def test_values_that_are_no_text() -> None:
    kind = NameOID.X500_UNIQUE_IDENTIFIER
    binary = x509.NameAttribute(kind, b"\x01\xff", _type=x509.name._ASN1Type.BitString)
    assert dn(x509.Name([binary])).endswith(r"=\#01ff")


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("/DC=org/CN=host/www.example.org", "/DC=org/CN=host/www.example.org"),
        (r"/DC=org/CN=host\/www.example.org", "/DC=org/CN=host/www.example.org"),
        (r"/CN=alice\/CN=admin", r"/CN=alice\/CN=admin"),
        (r"/CN=DOMAIN\user", r"/CN=DOMAIN\\user"),
        (r"/CN=DOMAIN\\user", r"/CN=DOMAIN\\user"),
        (r"/CN=\xC3\x85sa", "/CN=Åsa"),
        ("/CN=Åsa", "/CN=Åsa"),
        ("/Email=a@b/E=c@d/EMAILADDRESS=e@f", "/emailAddress=a@b/emailAddress=c@d/emailAddress=e@f"),
        ("/dc=org/USERID=7/cn=x", "/DC=org/UID=7/CN=x"),
        (r"/CN=a\+OU=b/O=\#01ff", r"/CN=a\+OU=b/O=\#01ff"),
    ],
)
def test_what_people_write_is_read_as_the_same_subject(written: str, text: str) -> None:
    assert normal_subject(written) == text
    assert normal_subject(text) == text


# Surrogates cannot stand in a certificate, whose texts are UTF-8.
_texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
_names = st.lists(
    st.tuples(st.sampled_from([_CN, _DC, _UID, NameOID.ORGANIZATION_NAME]), _texts), min_size=1, max_size=5
)


@given(_names)
def test_text_leads_back_to_the_name(parts: list[Any]) -> None:
    text = dn(name(*parts))
    assert text.isprintable()
    assert parse_dn(text) == name(*parts)
    assert normal_subject(text) == text


@pytest.mark.parametrize("text", ["", "CN=x", "/", "/CN", "/CN=a\\", r"/CN=\q", "/NONSENSE=a", "/CN="])
def test_what_is_no_subject(text: str) -> None:
    with pytest.raises(ValueError, match=r"subject|length"):
        parse_dn(text)


@pytest.mark.parametrize(
    "subject",
    ["/DC=org/DC=Test/CN=My  Test CA", "/C=XX/O=Über GmbH/CN=CA", r"/CN=a\/b", "/CN=" + "x" * 64 + "/O=" + "y" * 64],
)
def test_hashes_are_those_of_openssl(subject: str, tmp_path: Path) -> None:
    authority = Authority.create(subject)
    authority.write(tmp_path)
    asked = ["openssl", "x509", "-noout", "-subject_hash", "-subject_hash_old", "-in", str(tmp_path / "ca.crt")]
    told = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()
    assert told == [subject_hash(authority.certificate.subject), subject_hash_old(authority.certificate.subject)]
