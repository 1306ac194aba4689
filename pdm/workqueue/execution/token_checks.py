"""Whether the tokens of a batch fit its sites and paths, before any server is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime

from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import Batch
from pdm.workqueue.domain.paths import StorageUrl
from pdm.workqueue.domain.token_profiles import (
    Capability,
    Misfit,
    Need,
    TokenClaims,
    TokenRules,
    misfit,
    scope_misfit,
)
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.wire.agent_requests import (
    CheckRequest,
    CopyRequest,
    ListRequest,
    MkdirRequest,
    RemoveRequest,
    RenameRequest,
    WorkRequest,
)

_READ = (Capability.READ, Capability.STAGE)
_CREATE = (Capability.CREATE, Capability.MODIFY)
_MODIFY = (Capability.MODIFY,)


def rules_of(site: Site) -> TokenRules:
    """What a site expects of tokens."""
    oidc = site.oidc
    urls = [StorageUrl(url) for url in site.endpoint_urls(JobProtocol.HTTPS)]
    bases = ("/", *(url.text_path for url in urls))
    if oidc is None:
        return TokenRules(servers=[url.address for url in urls], base_paths=bases)
    return TokenRules(
        servers=[url.address for url in urls],
        issuer=oidc.issuer,
        audiences=oidc.audiences,
        base_paths=bases if oidc.base_path is None else (oidc.base_path,),
    )


def token_failure(site: Site, claims: TokenClaims, now: datetime) -> AttemptFailure | None:
    """Why a token cannot be used at a site at all; None if it can."""
    return _failure(site, misfit(claims, rules_of(site), now))


def unfit_elements(
    batch: Batch, request: WorkRequest, sites: Mapping[int, Site], claims: Mapping[int, TokenClaims]
) -> dict[int, AttemptFailure]:
    """Elements that the scopes of a token do not permit, by key; ``claims``: of the tokens, by site."""
    found: dict[int, AttemptFailure] = {}
    rules = {number: rules_of(sites[number]) for number in claims}
    for key, number, need in _needs(batch, request):
        if number in rules and key not in found:
            failure = _failure(sites[number], scope_misfit(claims[number], rules[number], [need]))
            if failure is not None:
                found[key] = failure
    return found


def _failure(site: Site, why: Misfit | None) -> AttemptFailure | None:
    if why is None:
        return None
    code = FailureCode.CREDENTIAL_EXPIRED if why.is_over else FailureCode.CREDENTIAL_UNFIT
    return AttemptFailure(FailureScope.SERVICE, code, why.sentence(site.name))


def _needs(batch: Batch, request: WorkRequest) -> Iterator[tuple[int, int, Need]]:
    """What the items of a request need: key, site and capability."""
    source = batch.job.src_siteid
    destination = source if batch.job.dst_siteid is None else batch.job.dst_siteid
    match request:
        case ListRequest():
            # The listing of a removal is part of it.
            listing = (*_READ, Capability.MODIFY) if batch.job.type is JobType.REMOVE else _READ
            yield request.key, source, Need(listing, StorageUrl(request.url).path)
            if request.destination is not None:
                yield request.key, destination, Need(_READ, StorageUrl(request.destination).path)
        case CopyRequest():
            writing = _CREATE if request.overwrite == "never" else _MODIFY
            for item in request.items:
                yield item.key, source, Need(_READ, StorageUrl(item.source).path)
                # The file arrives under another name in its directory.
                yield item.key, destination, Need(writing, StorageUrl(item.temporary).path.rpartition(b"/")[0])
        case CheckRequest():
            checked = source if request.at is FailureScope.SOURCE else destination
            for check in request.items:
                yield check.key, checked, Need(_READ, StorageUrl(check.url).path)
        case RenameRequest():
            renaming = _CREATE if request.overwrite == "never" else _MODIFY
            for rename in request.items:
                yield rename.key, source, Need(renaming, StorageUrl(rename.source).path)
                yield rename.key, source, Need(renaming, StorageUrl(rename.destination).path)
        case RemoveRequest():
            for removal in request.items:
                place = destination if removal.at_destination else source
                yield removal.key, place, Need(_MODIFY, StorageUrl(removal.url).path)
        case MkdirRequest():
            for directory in request.items:
                yield directory.key, destination, Need(_CREATE, StorageUrl(directory.url).path)
