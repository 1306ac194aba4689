"""Registers what a client of FTS3 submits: one job for each pair of sites, one after the other for several sources."""

from __future__ import annotations

import posixpath
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from attrs import define, field

from pdm.workqueue.domain.enums import ChecksumAlgorithm, JobProtocol, JobType
from pdm.workqueue.domain.fts import common_storage, deterministic_id, job_priority, storage_element
from pdm.workqueue.domain.jobs import JobRecord, NewJob
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.credential_checks import CredentialNeeds
from pdm.workqueue.http.decoding import credential_needs, job_from_request, stored_sites
from pdm.workqueue.http.fts.bans import check_bans, drain_sites_of_bans
from pdm.workqueue.http.fts.documents import FtsSubmission, FtsTransfer
from pdm.workqueue.http.fts.storages import LocatedFile, SitesOfUrls, make_sites, sites_of_user
from pdm.workqueue.http.fts.urls import FileUrl, ServerOfUrl
from pdm.workqueue.http.problems import ConflictError, InvalidInputError
from pdm.workqueue.store import fts
from pdm.workqueue.store.fts import DuplicateFtsJobError, NewFtsFile, NewFtsJob, NewFtsPart
from pdm.workqueue.telemetry.logging import log_submitted
from pdm.workqueue.wire.requests import SubmitJob


class _Pair(NamedTuple):
    """A file that is copied from one source, or tried to."""

    transfer: FtsTransfer
    source: FileUrl


class _Route(NamedTuple):
    """What the files of one job have in common."""

    source: int
    destination: int
    protocol: JobProtocol
    algorithm: str


@define
class _Part:
    """The files of one job, as items of a COPY."""

    items: list[dict[str, Any]] = field(factory=list)
    files: list[NewFtsFile] = field(factory=list)


async def submit(api: ApiContext, caller: Caller, vo_name: str, submission: FtsSubmission) -> str:
    """Register a submission; returns its id.

    Raises:
        ConflictError: the caller has submitted a job of this ``sid`` before. Nothing else is one: clients take it for a
            job that is there.
        ApiError: as of ``POST /jobs`` of the service's own API.
    """
    try:
        return await _submit(api, caller, vo_name, submission)
    except DuplicateFtsJobError:
        raise ConflictError("The sid provided by the user is duplicated") from None
    except ConflictError as error:
        raise InvalidInputError(error.detail) from error


async def _submit(api: ApiContext, caller: Caller, vo_name: str, submission: FtsSubmission) -> str:
    sid = submission.sid
    fts_id = str(uuid.uuid1()) if sid is None else deterministic_id(vo_name, sid)
    bans = await check_bans(api, _storages(submission))
    found = await sites_of_user(api, caller)
    missing = await api.in_thread(_missing_servers, api, found, submission)
    if missing:
        await make_sites(api, caller, missing)
        found = await sites_of_user(api, caller)
        await drain_sites_of_bans(api, bans)
    new = await api.in_thread(_new_job, api, caller, vo_name, fts_id, submission, found)
    needs = {
        part.job.log_uid: CredentialNeeds(needed, api.lifetimes)
        for part in new.parts
        if (needed := credential_needs(api, part.job))
    }
    now = api.clock()

    def register(session: Any, job: NewJob) -> JobRecord:
        record, _ = transactions.register(session, job, None, now, needs.get(job.log_uid), stored_sites(api, job))
        return record

    def then(registered: Sequence[JobRecord]) -> None:
        for record in registered:
            log_submitted(record)
            if record.deadline is not None:
                api.deadline_added()
        api.wake()

    await api.commit("register a job of FTS", fts.submit, new, register, now, then=then)
    return fts_id


def _storages(submission: FtsSubmission) -> set[str]:
    urls = [url for each in submission.transfers for url in (*each.sources, each.destination)]
    return {storage_element(url.text) for url in {url.server: url for url in urls}.values()}


def _pairs(submission: FtsSubmission) -> list[_Pair]:
    return [_Pair(transfer, source) for transfer in submission.transfers for source in transfer.sources]


def _site_paths(api: ApiContext, found: SitesOfUrls, pair: _Pair) -> tuple[LocatedFile | None, LocatedFile | None]:
    protocol = pair.source.server.protocol
    source = found.of_source(pair.source)
    return source, found.of_destination(pair.transfer.destination, protocol, api.relays_to(protocol))


def _missing_servers(api: ApiContext, found: SitesOfUrls, submission: FtsSubmission) -> list[ServerOfUrl]:
    missing: dict[str, ServerOfUrl] = {}
    for pair in _pairs(submission):
        ends = (pair.source, pair.transfer.destination)
        for url, place in zip(ends, _site_paths(api, found, pair), strict=True):
            if place is None:
                missing.setdefault(url.server.url, url.server)
    return list(missing.values())


def _new_job(
    api: ApiContext, caller: Caller, vo_name: str, fts_id: str, submission: FtsSubmission, found: SitesOfUrls
) -> NewFtsJob:
    """Validate a submission as the jobs that carry it out. May take seconds: to be called in a thread."""
    parts: dict[object, tuple[_Route, _Part]] = {}
    places: dict[tuple[int, str], int] = {}
    for number, pair in enumerate(_pairs(submission)):
        source, destination = _site_paths(api, found, pair)
        if source is None or destination is None:
            # Removed by a request at the same time.
            raise ConflictError("a site of the job was removed meanwhile: submit again")
        # Files of other routes are in other jobs, which do not know of each other.
        index, place = pair.transfer.file_index, (destination.site.id, posixpath.normpath(destination.path))
        if (other := places.setdefault(place, index)) != index:
            raise InvalidInputError(f"files[{other}] and files[{index}] have the same destination")
        algorithm, value = pair.transfer.checksum if submission.compares else ("", "")
        if submission.compares:
            algorithm = algorithm or ChecksumAlgorithm.ADLER32
        route = _Route(source.site.id, destination.site.id, pair.source.server.protocol, algorithm)
        # Each source of a file has a job of its own.
        _, part = parts.setdefault(number if submission.has_alternatives else route, (route, _Part()))
        item: dict[str, Any] = {"src": source.path, "dst": destination.path}
        if pair.transfer.size:
            item["size"] = pair.transfer.size
        if value:
            item["checksum"] = f"{algorithm}:{value}"
        part.items.append(item)
        part.files.append(
            NewFtsFile(
                pair.transfer.file_index, pair.source.text, pair.transfer.destination.text, dict(pair.transfer.details)
            )
        )
    surls = [pair.source.text for pair in _pairs(submission)]
    details = {
        **submission.details,
        "source_se": common_storage(surls),
        "dest_se": common_storage([transfer.destination.text for transfer in submission.transfers]),
        "job_type": "R" if submission.has_alternatives else "N",
    }
    make = partial(_job_of_part, api, caller, fts_id, submission)
    return NewFtsJob(
        fts_id=fts_id,
        user_id=caller.user_id,
        vo_name=vo_name,
        details=details,
        parts=[
            NewFtsPart(make(route, part), part.files, is_alternative=submission.has_alternatives and position > 0)
            for position, (route, part) in enumerate(parts.values())
        ],
    )


def _job_of_part(
    api: ApiContext, caller: Caller, fts_id: str, submission: FtsSubmission, route: _Route, part: _Part
) -> NewJob:
    options: Mapping[str, Any] = {
        "items": part.items,
        "overwrite": "always" if submission.overwrite else None,
        "verify": None if submission.compares else "size",
        "checksum": route.algorithm or None,
        "deadline": _duration(submission.queue_s),
        "stage": submission.stage_s is not None or None,
        "stage_timeout": _duration(submission.stage_s),
        "stage_lifetime": _duration(submission.pin_s),
        "archive": submission.archive_s is not None or None,
        "archive_timeout": _duration(submission.archive_s),
    }
    body = SubmitJob(
        type=JobType.COPY.value,
        protocol=route.protocol.value,
        src_siteid=route.source,
        dst_siteid=route.destination,
        extra_opts={key: value for key, value in options.items() if value is not None},
        priority=job_priority(submission.priority),
        max_tries=submission.max_tries,
        label=fts_id,
    )
    return job_from_request(api, caller.user_id, body)


def _duration(seconds: int | None) -> str | None:
    return None if seconds is None else f"{seconds}s"
