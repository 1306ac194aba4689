"""Logins at a certified token issuer, for an XRootD server that verifies each token: all that a user sees of it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from pdm.testgrid.service import TestService
from pdm.testgrid.storages import TestStorages
from tests.support.instances import until
from tests.support.token_issuers import SCOPES, SECRET, OidcProvider, TokenStorage, issuer_and_storage, require_issuer

pytestmark = pytest.mark.full
#: Seconds of an access token: it is renewed at half of it.
_LIFETIME_S = 16


@frozen
class Stand:
    """A daemon with one site, whose issuer and storage run.

    Attributes:
        root: the exported directory; scopes are relative to it.
    """

    service: TestService
    issuer: OidcProvider
    storage: TokenStorage
    root: Path

    def log_in(self) -> str:
        """``pdm login`` with an approval meanwhile; returns what it prints."""
        command = [str(Path(".venv/bin/pdm").absolute()), "login", "TOKENS", "--oidc"]
        shown = subprocess.Popen(
            command,
            env=self.service.environment("admin"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert shown.stderr is not None
        lines = []
        for line in shown.stderr:
            lines.append(line)
            if line.startswith("The code is valid"):
                break
        self.issuer.approve(lines[-2].strip())
        printed, more = shown.communicate(timeout=60)
        assert shown.returncode == 0, [*lines, more]
        return printed

    def login(self) -> dict[str, Any]:
        found: dict[str, Any] = self.service.call("admin", "GET", "/sites/9/login")[1]
        return found

    def copy(self, source: Path, destination: Path) -> int:
        paths = {"src_filepath": str(source), "dst_filepath": str(destination)}
        submitted = self.service.submit("admin", "copy", src_siteid=9, dst_siteid=9, protocol="HTTPS", **paths)
        return int(submitted["id"])


@pytest.fixture
def stand(storages: TestStorages, tmp_path: Path) -> Iterator[Stand]:
    require_issuer()
    assert storages.credentials is not None
    directory = storages.directory / "token-issuer"
    directory.mkdir(mode=0o755)
    root = directory / "exported"
    root.mkdir()
    (root / "file").write_bytes(b"content")
    storages.give(root)
    trust = storages.credentials.trust
    with issuer_and_storage(directory, root, storages.credentials, storages.account, _LIFETIME_S) as (issuer, storage):
        service = TestService(tmp_path / "instance")
        service.init(
            credentials={"trust_dir": str(trust), "minimum_lifetime": "0s"},
            oidc={"ca": str(trust), "allowed": "127.0.0.0/8", "timeout": "5s"},
        )
        (tmp_path / "secret").write_text(SECRET)
        (service.directory / "sites.d" / "more.conf").write_text(
            f"[TOKENS]\nid = 9\nhttps = {storage.url}\noidc = {issuer.url}\noidc_client = pdm\n"
            f"oidc_secret_file = {tmp_path / 'secret'}\noidc_scope = openid offline_access {SCOPES}\n"
            f"oidc_base_path = {root}\n"
        )
        with service.running():
            yield Stand(service, issuer, storage, root)
        assert "Traceback" not in service.log_path.read_text()


def test_a_login_lasts_longer_than_its_tokens(stand: Stand) -> None:
    service, root = stand.service, stand.root
    printed = stand.log_in()
    assert "logged in at TOKENS as alice at" in printed
    assert "the service renews the token" in printed
    copied = service.wait_for("admin", stand.copy(root / "file", root / "copy"))
    assert copied["status"] == "DONE", service.tail()
    assert (root / "copy").read_bytes() == b"content"
    # No scope leads out of the base path: the storage is not asked.
    outside = service.wait_for("admin", stand.copy(Path("/etc/passwd"), root / "stolen"), until=("HELD", "RUNNING"))
    (listing,) = service.call("admin", "GET", f"/jobs/{outside['id']}/elements")[1]
    assert listing["error"]["code"] == "CREDENTIAL_UNFIT", listing
    assert "'scope'" in listing["error"]["message"]
    service.call("admin", "DELETE", f"/jobs/{outside['id']}")

    # Two renewals, with rotated refresh tokens, and a daemon that is killed in between.
    first = stand.login()
    until(service, lambda: stand.login()["refreshed_at"] > first["refreshed_at"])
    service.kill()
    service.start()
    second = stand.login()
    until(service, lambda: stand.login()["refreshed_at"] > second["refreshed_at"])
    assert stand.login()["valid_until"] > first["valid_until"]
    assert service.wait_for("admin", stand.copy(root / "file", root / "later"))["status"] == "DONE"

    # The issuer is away until the token ends: its fault, and the job waits.
    stand.issuer.stop()
    until(service, lambda: stand.login()["state"] == "retrying")
    until(service, lambda: held(service, root, stand) == "ISSUER_UNAVAILABLE", 60)
    # It has lost its state: the login is over, and the next one resumes what waits.
    stand.issuer.start()
    until(service, lambda: stand.login()["state"] == "ended", 60)
    until(service, lambda: "CREDENTIAL_EXPIRED" in codes(service), 30)
    asked = {"src_siteid": 9, "src_filepath": str(root), "protocol": "HTTPS"}
    status, refused = service.call("admin", "POST", "/list", asked)
    assert (status, "run 'pdm login 9 --oidc', then submit again" in refused["detail"]) == (409, True), refused
    assert "run 'pdm login TOKENS --oidc'" in service.pdm("admin", "credentials").stdout
    stand.log_in()
    until(service, lambda: not codes(service), 60)
    assert service.pdm("admin", "logout", "TOKENS", "--oidc").returncode == 0
    assert service.call("admin", "GET", "/credentials")[1] == []


def held(service: TestService, root: Path, stand: Stand) -> str:
    """The code for which the element of a new job is HELD, or empty."""
    job = service.wait_for("admin", stand.copy(root / "file", root / "waits"), until=("HELD", "DONE", "FAILED"))
    return next(iter(codes(service)), "") if job["status"] == "HELD" else ""


def codes(service: TestService) -> set[str]:
    """The codes for which elements are HELD."""
    found = set()
    for job in service.call("admin", "GET", "/jobs")[1]:
        elements = service.call("admin", "GET", f"/jobs/{job['id']}/elements?status=HELD")[1]
        found |= {each["error"]["code"] for each in elements}
    return found
