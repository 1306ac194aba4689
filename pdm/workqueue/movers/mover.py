"""The seam between the queue and a protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from attrs import frozen

from pdm.workqueue.domain.credentials import CredentialKind, Need
from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.wire.agent_messages import Fault, Limits, Work
from pdm.workqueue.wire.options import Options

#: URL of a path at a site: ``(site number, path) -> URL``.
SiteUrl = Callable[[int, str], str]

NO_FAILURES: Mapping[int, AttemptFailure] = MappingProxyType({})
ALL_JOB_TYPES = frozenset(JobType)


@frozen
class Access:
    """What a helper may be told about who it acts for and whom it trusts; files, never secrets themselves.

    Attributes:
        credential: file with the user's delegated proxy; None where none is needed.
        trust_dir: folder with the authorities that storage servers are checked against, but for endpoints of which the
            helper is told others, by URL (``PDM_TRUST``).
        roots: folders on disk that FILE sites serve.
        ssh_key: file with the service's own private key for SSH, for users who have given none.
        ssh_known_hosts: file with the host keys of SSH servers.
        ssh_user: account at SSH servers; empty for the service's own name.
    """

    credential: Path | None = None
    trust_dir: Path | None = None
    roots: Sequence[str] = ()
    ssh_key: Path | None = None
    ssh_known_hosts: Path | None = None
    ssh_user: str = ""

    @property
    def own(self) -> frozenset[CredentialKind]:
        """Kinds of which the service has one of its own, for users who have given none."""
        return frozenset() if self.ssh_key is None else frozenset({CredentialKind.SSH_KEY})


@frozen
class BuiltRequest:
    """What a helper is asked for a batch.

    Attributes:
        request: None if no element of the batch can be in one.
        refused: why elements are not in it that can never be, by key.
        postponed: keys of elements that are left to a later batch, because the request would be too long with them.
    """

    request: Work | None
    refused: Mapping[int, AttemptFailure] = NO_FAILURES
    postponed: frozenset[int] = frozenset()


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
    def needs_credential(self) -> CredentialKind | None:
        """The kind of credential of the user that the helper works with; None if it needs none.

        A proxy is one for the whole route, and its file goes to `environment`. Of SSH keys and tokens each site has its
        own: the helper finds in ``PDM_CREDENTIALS`` of its environment a JSON object that maps each endpoint's URL to
        ``{"file": PATH, "account": NAME or null}``.
        """
        ...

    @property
    def prefers_credential(self) -> CredentialKind | None:
        """A kind that is used instead at each site for which the user has given one; None if there is no such."""
        ...

    def request_for(
        self, batch: Batch, urls: SiteUrl, options: Options, limits: Limits, request_id: int
    ) -> BuiltRequest:
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


def need_of(mover: Mover, access: Access) -> Need | None:
    """What a mover needs at a site that it reaches; None for nothing."""
    kinds = tuple(kind for kind in (mover.prefers_credential, mover.needs_credential) if kind is not None)
    return Need(kinds, optional=not access.own.isdisjoint(kinds)) if kinds else None
