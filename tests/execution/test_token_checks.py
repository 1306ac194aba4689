"""What the scopes of tokens must permit for each type of job, by the paths that its request has."""

from __future__ import annotations

from typing import Any

import pytest

from pdm.workqueue.domain.enums import JobProtocol, JobType
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.jobs import Batch, ElementRecord
from pdm.workqueue.domain.oidc import OidcSettings
from pdm.workqueue.domain.token_profiles import TokenClaims
from pdm.workqueue.execution.token_checks import rules_of, token_failure, unfit_elements
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.sites.storage_urls import EndpointUrls
from pdm.workqueue.wire.agent_requests import TimeLimits
from pdm.workqueue.wire.options import read_options
from tests.support.records import NOW, element_record, job_record

HTTPS = JobProtocol.HTTPS


def site(number: int, oidc: OidcSettings | None = None) -> Site:
    return Site(number, f"S{number}", "", "~", {HTTPS: f"https://s{number}.example.org/pnfs/vo"}, oidc=oidc)


SITES = {1: site(1), 2: site(2)}


def unfit(
    type_: JobType,
    scopes: dict[int, str],
    *elements: ElementRecord,
    element_type: JobType | None = None,
    **options: Any,
) -> dict[int, str]:
    """Key → message of the elements that tokens with these scopes do not permit."""
    copies = type_ is JobType.COPY
    job = job_record(
        type=type_,
        protocol=HTTPS,
        src_filepath="/data/from",
        dst_siteid=2 if copies else None,
        dst_filepath="/data/to" if copies else None,
        options=options,
    )
    batch = Batch.of_one(job, type_ if element_type is None else element_type, elements)
    urls = {number: EndpointUrls(each, HTTPS, each.endpoints[HTTPS]).of for number, each in SITES.items()}
    built = MOVERS[HTTPS].request_for(
        batch, lambda number, path: urls[number](path), read_options(type_, options), TimeLimits(), 1
    )
    assert built.request is not None
    claims = {number: TokenClaims.of({"scope": scope}) for number, scope in scopes.items()}
    found = unfit_elements(batch, built.request, SITES, claims)
    assert all(failure.code is FailureCode.CREDENTIAL_UNFIT and failure.retryable for failure in found.values())
    return {key: failure.message for key, failure in found.items()}


def files(*names: str, **more: Any) -> list[ElementRecord]:
    return [
        element_record(id=number, src_filepath=f"/data/from/{name}", dst_filepath=f"/data/to/{name}", **more)
        for number, name in enumerate(names, start=1)
    ]


def test_a_copy_reads_there_and_creates_here() -> None:
    pair = files("a", "b")
    assert unfit(JobType.COPY, {1: "storage.read:/data", 2: "storage.create:/data"}, *pair) == {}
    # The paths of scopes may be those of the URL, too.
    assert unfit(JobType.COPY, {1: "storage.read:/pnfs/vo/data"}, *pair) == {}
    found = unfit(JobType.COPY, {1: "storage.read:/data/from/a", 2: "storage.read:/data"}, *pair)
    assert "storage.create:/pnfs/vo/data/to or storage.modify:/pnfs/vo/data/to is needed" in found[0]
    assert "the token for site S1" in found[1]
    replaced = {1: "storage.read:/data", 2: "storage.create:/data"}
    assert len(unfit(JobType.COPY, replaced, *pair, overwrite="always")) == 2
    # A scope for the file alone does not permit the temporary file beside it.
    assert len(unfit(JobType.COPY, {2: "storage.modify:/data/to/a"}, *pair)) == 2
    assert unfit(JobType.COPY, {}, *pair) == {}, "opaque tokens are for the storage to judge"


def test_the_listing_of_a_sync_reads_at_both_sites() -> None:
    (listing,) = files("x", type=JobType.LIST)
    scopes = {1: "storage.read:/data", 2: "storage.modify:/data"}
    assert unfit(JobType.COPY, scopes, listing, element_type=JobType.LIST) == {}
    assert 0 in unfit(JobType.COPY, scopes, listing, element_type=JobType.LIST, sync="size")


@pytest.mark.parametrize(
    ("type_", "scope", "permitted"),
    [
        (JobType.LIST, "storage.stage:/data", True),
        (JobType.LIST, "storage.modify:/data", False),
        (JobType.REMOVE, "storage.create:/data", False),
        (JobType.REMOVE, "write:/data", True),
        (JobType.RENAME, "storage.create:/data", True),
        (JobType.RENAME, "storage.create:/data/from", False),
        (JobType.MKDIR, "storage.create:/data", True),
        (JobType.MKDIR, "read:/data", False),
    ],
)
def test_each_type_needs_its_capability(type_: JobType, scope: str, permitted: bool) -> None:
    (element,) = files("a", type=type_)
    if type_ is JobType.MKDIR:
        element = element._replace(dst_filepath=None)
    assert (unfit(type_, {1: scope}, element) == {}) == permitted


def test_the_listing_of_a_removal_is_part_of_it() -> None:
    (listing,) = files("x", type=JobType.LIST)
    assert unfit(JobType.REMOVE, {1: "storage.modify:/data"}, listing, element_type=JobType.LIST) == {}


def test_a_site_says_what_its_tokens_are() -> None:
    oidc = OidcSettings(issuer="https://i", audiences=("ours",), base_path="/pnfs/vo")
    rules = rules_of(site(1, oidc))
    assert (rules.issuer, rules.audiences, rules.base_paths) == ("https://i", ("ours",), ("/pnfs/vo",))
    found = token_failure(site(1, oidc), TokenClaims.of({"iss": "https://j", "aud": "ours"}), NOW)
    assert found is not None
    assert found.message == (
        "the token for site S1 does not fit: its claim 'iss' is https://j, and https://i is needed; no server was asked"
    )
    assert token_failure(site(1, oidc), TokenClaims.of({"iss": "https://i", "aud": "ours"}), NOW) is None
