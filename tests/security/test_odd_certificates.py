"""Certificates with parts that cannot be read are refused in words, wherever they come from."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_twisted

from pdm.workqueue.certificates.pem import ProxyBundleError, read_bundle
from tests.http.service import Service
from tests.security.odd_certificates import KINDS, odd_certificate

#: An authority is asked for no end of its time.
_OF_AUTHORITIES = [kind for kind in KINDS if kind != "the year 0"]


def _site(name: str, authorities: str) -> dict[str, Any]:
    return {"name": name, "endpoints": {"gridftp": "gsiftp://far.example.org"}, "authorities": authorities}


@pytest.mark.parametrize("kind", _OF_AUTHORITIES)
@pytest_twisted.ensureDeferred
async def test_as_the_authority_of_a_site(service: Service, kind: str) -> None:
    certificate, _ = odd_certificate(kind)
    answer = await service.call("odd", "POST", "/sites", _site(f"odd-{KINDS.index(kind)}", certificate))
    assert (answer.status, answer.problem) == (400, "invalid-input $.authorities"), answer.body
    site = _site(f"plain-{KINDS.index(kind)}", "")
    made = (await service.call("odd", "POST", "/sites", site)).json
    answer = await service.call("odd", "PATCH", f"/sites/{made['id']}", {"authorities": certificate})
    assert (answer.status, answer.problem) == (400, "invalid-input $.authorities"), answer.body


@pytest.mark.parametrize("kind", KINDS)
@pytest_twisted.ensureDeferred
async def test_as_a_delegated_proxy(service: Service, kind: str) -> None:
    place = "/delegation/" + (await service.call("odd", "GET", "/whoami")).json["delegation_id"]
    assert (await service.call("odd", "GET", f"{place}/request")).status == 200
    certificate, _ = odd_certificate(kind)
    answer = await service.call("odd", "PUT", f"{place}/credential", raw=certificate.encode())
    assert answer.status == 400, answer.body
    assert "cannot be read" in answer.json["detail"]


@pytest.mark.parametrize("kind", KINDS)
def test_as_what_a_myproxy_server_gives(kind: str) -> None:
    certificate, key = odd_certificate(kind)
    with pytest.raises(ProxyBundleError, match="cannot be read"):
        read_bundle((certificate + key).encode())
