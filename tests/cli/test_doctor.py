"""``pdm doctor``: findings of sites, and lines that fit a terminal."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from pdm.workqueue.cli.doctor import Finding, finding_lines, site_finding
from pdm.workqueue.wire.credentials import CredentialView
from pdm.workqueue.wire.sites import SiteView

_NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)


def site(*protocols: str, **more: Any) -> SiteView:
    return SiteView(
        id=7, name="ral", description="", default_folder="/", protocols=list(protocols), endpoints={}, **more
    )


def credential(kind: str, hours: float | None, site_id: int | None = None) -> CredentialView:
    until = None if hours is None else _NOW + timedelta(hours=hours)
    values = {"id": 1, "subject": "/CN=a", "label": None, "stored_at": _NOW, "voms": [], "account": None}
    return msgspec.convert(
        {**values, "kind": kind, "site": site_id, "valid_until": until, "public_key": None}, CredentialView
    )


@pytest.mark.parametrize(
    ("found", "credentials", "what", "advice"),
    [
        (site("FILE"), [], "ok", ""),
        (site("GRIDFTP"), [], "ok, no credential", "Run 'pdm delegate'."),
        (site("GRIDFTP", myproxy="h:7512"), [], "ok, no credential", "Run 'pdm login ral'."),
        (site("GRIDFTP"), [credential("proxy", 9)], "ok, proxy valid 9 h", ""),
        (site("GRIDFTP"), [credential("proxy", 9, 8)], "ok, no credential", "Run 'pdm delegate'."),
        (site("GRIDFTP"), [credential("proxy", 0.5)], "ok, proxy valid 30 m", "Run 'pdm delegate'."),
        (site("GRIDFTP"), [credential("proxy", -1)], "ok, proxy expired", "Run 'pdm delegate'."),
        (site("SSH"), [credential("ssh-key", None, 7)], "ok, SSH key", ""),
        (site("SSH"), [], "ok, no credential", "Run 'pdm ssh-key ral', and install the public key at the site."),
        (
            site("GRIDFTP", state="drained", reason="disks"),
            [credential("proxy", 9)],
            "drained: disks, proxy valid 9 h",
            "",
        ),
        (site("A_LATER_PROTOCOL"), [], "ok", ""),
    ],
)
def test_a_site(found: SiteView, credentials: list[CredentialView], what: str, advice: str) -> None:
    assert site_finding(found, credentials, [], _NOW) == Finding("site ral", what, advice)


def test_lines_fit_a_terminal() -> None:
    lines = finding_lines([Finding("you", "word " * 40), Finding("site a", "ok", "Run this. " * 12)])
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("you     word")
    assert any(line.startswith("        -> Run this.") for line in lines)
