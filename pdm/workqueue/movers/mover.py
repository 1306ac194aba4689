"""The seam between the queue and a protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.wire.agent_messages import Fault, Limits, Work
from pdm.workqueue.wire.options import Options

#: URL of a path at a site: ``(site number, path) -> URL``.
SiteUrl = Callable[[int, str], str]

ALL_JOB_TYPES = frozenset(JobType)


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

    def request_for(self, batch: Batch, urls: SiteUrl, options: Options, limits: Limits, request_id: int) -> Work:
        """What the helper is asked for a batch; the key of each item is its element's place in there."""
        ...

    def environment(self, credential: Path | None, trust_dir: Path | None, roots: Sequence[str]) -> Mapping[str, str]:
        """What the helper's environment has to tell it.

        Args:
            credential: file with the user's credential, where one is needed.
            trust_dir: folder with the authorities that storage servers are checked against.
            roots: folders on disk that FILE sites serve.
        """
        ...

    def judge(self, fault: Fault) -> AttemptFailure:
        """What a fault means for the user and the queue."""
        ...
