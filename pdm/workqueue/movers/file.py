"""Folders that the service itself can see: local disks and mounted file systems."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from attrs import frozen

from pdm.workqueue.domain.credentials import CredentialKind
from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.failures import AttemptFailure
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.domain.paths import encoded
from pdm.workqueue.movers.judging import judge
from pdm.workqueue.movers.mover import ALL_JOB_TYPES, SiteUrl
from pdm.workqueue.movers.requests import build_request
from pdm.workqueue.wire.agent_messages import Fault, Limits, Work
from pdm.workqueue.wire.options import Options


@frozen
class FileMover:
    """The helper works on the folders of the FILE sites, and refuses to leave them."""

    job_types: frozenset[JobType] = ALL_JOB_TYPES
    helper: str = "pdm.workqueue.agents.helpers.file"
    needs_credential: CredentialKind | None = None

    def request_for(self, batch: Batch, urls: SiteUrl, options: Options, limits: Limits, request_id: int) -> Work:
        return build_request(batch, urls, options, limits, request_id)

    def environment(self, credential: Path | None, trust_dir: Path | None, roots: Sequence[str]) -> Mapping[str, str]:
        return {"PDM_FILE_ROOTS": json.dumps([encoded(root) for root in roots])}

    def judge(self, fault: Fault) -> AttemptFailure:
        return judge(fault)
