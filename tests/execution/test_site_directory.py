"""A site that cannot be reached keeps out all jobs that would go there, whatever protocol they name."""

from __future__ import annotations

from pathlib import Path

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.execution.site_directory import blocked_sites
from pdm.workqueue.sites.registry import SiteRegistry

FILE, SSH, HTTPS = JobProtocol.FILE, JobProtocol.SSH, JobProtocol.HTTPS
GRIDFTP, XROOT, S3 = JobProtocol.GRIDFTP, JobProtocol.XROOT, JobProtocol.S3


def test_what_would_go_there_through_the_service_is_kept_out_too(tmp_path: Path) -> None:
    (tmp_path / "sites.conf").write_text(
        "[dav]\nid = 1\nhttps = https://h:1\n[both]\nid = 2\nhttps = https://h:2\nssh = sftp://h:3\n"
    )
    sites = SiteRegistry.read(tmp_path)
    assert blocked_sites(sites, []) == frozenset()
    assert blocked_sites(sites, [(1, HTTPS)]) == {(1, HTTPS), (1, SSH), (1, FILE), (1, XROOT), (1, GRIDFTP), (1, S3)}
    assert blocked_sites(sites, [(2, HTTPS)]) == {(2, HTTPS)}
    assert blocked_sites(sites, [(2, SSH)]) == {(2, SSH), (2, FILE), (2, XROOT), (2, GRIDFTP), (2, S3)}
    assert blocked_sites(sites, [(9, GRIDFTP)]) == {(9, GRIDFTP)}
