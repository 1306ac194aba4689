"""The seam between the queue and a protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from attrs import frozen

from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.wire.agent_messages import Fault, Limits, Work
from pdm.workqueue.wire.options import Options

#: URL of a path at a site: ``(site number, path) -> URL``.
SiteUrl = Callable[[int, str], str]

ALL_JOB_TYPES = frozenset(JobType)


@frozen
class Access:
    """What a helper may be told about who it acts for and whom it trusts; files, never secrets themselves.

    Attributes:
        credential: file with the user's delegated proxy; None where none is needed.
        trust_dir: folder with the authorities that storage servers are checked against.
        roots: folders on disk that FILE sites serve.
        ssh_key: file with the private key for SSH.
        ssh_known_hosts: file with the host keys of SSH servers.
        ssh_user: account at SSH servers; empty for the service's own name.
        token: file with a bearer token for HTTPS.
    """

    credential: Path | None = None
    trust_dir: Path | None = None
    roots: Sequence[str] = ()
    ssh_key: Path | None = None
    ssh_known_hosts: Path | None = None
    ssh_user: str = ""
    token: Path | None = None


class Mover(Protocol):
    """How one protocol lists, copies, removes, renames and makes directories."""

    @property
    def job_types(self) -> frozenset[JobType]:
        """What it can do."""
        ...

    @property
    def helper(self) -> str:
        """Module of the helper program."""
        ...

    @property
    def needs_credential(self) -> bool:
        """Whether the helper works with a delegated credential of the user."""
        ...

    def request_for(self, batch: Batch, urls: SiteUrl, options: Options, limits: Limits, request_id: int) -> Work:
        """What the helper is asked for a batch; the key of each item is its element's place in there."""
        ...

    @property
    def relays_to(self) -> frozenset[JobProtocol]:
        """Other protocols that its helper can copy to; such a copy passes through the service."""
        ...

    def environment(self, access: Access) -> Mapping[str, str]:
        """What the helper's environment has to tell it."""
        ...

    def judge(self, fault: Fault) -> AttemptFailure:
        """What a fault means for the user and the queue."""
        ...
