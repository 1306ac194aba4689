"""Registers what a client of FTS3 submits: one job for each pair of sites, one after the other for several sources."""

from __future__ import annotations

import posixpath
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from attrs import define, field

from pdm.workqueue.domain.enums import ChecksumAlgorithm, JobProtocol, JobType
from pdm.workqueue.domain.fts import common_storage, deterministic_id, job_priority, storage_elements
from pdm.workqueue.domain.jobs import JobRecord, NewJob
from pdm.workqueue.http import transactions
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.credential_checks import CredentialNeeds
from pdm.workqueue.http.decoding import credential_needs, job_from_request, stored_sites
from pdm.workqueue.http.fts.bans import check_bans, drain_sites_of_bans
from pdm.workqueue.http.fts.calls import ServerOfUrl
from pdm.workqueue.http.fts.documents import FtsSubmission
from pdm.workqueue.http.fts.storages import SitesOfUrls, make_sites, sites_of_user
from pdm.workqueue.http.problems import ConflictError, InvalidInputError
from pdm.workqueue.store import fts
from pdm.workqueue.store.fts import DuplicateFtsJobError, NewFtsFile, NewFtsJob, NewFtsPart
from pdm.workqueue.store.outages import expect_rows
from pdm.workqueue.telemetry.logging import log_submitted
from pdm.workqueue.wire.requests import SubmitJob


class _MissingSitesError(Exception):
    """Some servers of a submission have no site."""

    def __init__(self, servers: Sequence[ServerOfUrl]) -> None:
        super().__init__(servers)
        self.servers = servers


class _Route(NamedTuple):
    """What the files of one job have in common."""

    source: int
    destination: int
    protocol: JobProtocol
    algorithm: str


@define
class _Part:
    """The files of one job, as items of a COPY."""

    route: _Route
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
    bans = await check_bans(api, await api.in_thread(_storages, submission))
    found = await sites_of_user(api, caller)
    try:
        new = await api.in_thread(_new_job, api, caller, vo_name, fts_id, submission, found)
    except _MissingSitesError as missing:
        await make_sites(api, caller, missing.servers)
        found = await sites_of_user(api, caller)
        await drain_sites_of_bans(api, bans)
        try:
            new = await api.in_thread(_new_job, api, caller, vo_name, fts_id, submission, found)
        except _MissingSitesError:
            # Removed by a request at the same time.
            raise ConflictError("a site of the job was removed meanwhile: submit again") from None
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

    expect_rows(sum(len(part.files) for part in new.parts))
    await api.commit("register a job of FTS", fts.submit, new, register, now, then=then)
    return fts_id


def _storages(submission: FtsSubmission) -> set[str]:
    return storage_elements(url.text for each in submission.transfers for url in (*each.sources, each.destination))


def _new_job(
    api: ApiContext, caller: Caller, vo_name: str, fts_id: str, submission: FtsSubmission, found: SitesOfUrls
) -> NewFtsJob:
    """Validate a submission as the jobs that carry it out. May take seconds: to be called in a thread.

    Raises:
        _MissingSitesError: servers have no site.
        InvalidInputError: it is invalid.
    """
    parts = _parts(api, found, submission)
    make = partial(_job_of_part, api, caller, fts_id, submission)
    alternatives = submission.has_alternatives
    return NewFtsJob(
        fts_id=fts_id,
        user_id=caller.user_id,
        vo_name=vo_name,
        details={
            **submission.details,
            "source_se": common_storage(file.source_surl for part in parts for file in part.files),
            "dest_se": common_storage(file.dest_surl for part in parts for file in part.files),
            "job_type": "R" if alternatives else "N",
        },
        parts=[
            NewFtsPart(make(part), part.files, is_alternative=alternatives and position > 0)
            for position, part in enumerate(parts)
        ],
    )


def _parts(api: ApiContext, found: SitesOfUrls, submission: FtsSubmission) -> list[_Part]:
    """The files by route; each source of a file that has several is a part of its own."""
    parts: list[_Part] = []
    by_route: dict[_Route, _Part] = {}
    places: dict[tuple[int, str], int] = {}
    missing: dict[str, ServerOfUrl] = {}
    duplicate: tuple[int, int] | None = None
    alternatives, compares = submission.has_alternatives, submission.compares
    for transfer in submission.transfers:
        index, end = transfer.file_index, transfer.destination
        algorithm, value = transfer.checksum if compares else ("", "")
        if compares and not algorithm:
            algorithm = ChecksumAlgorithm.ADLER32
        for url in transfer.sources:
            protocol = url.server.protocol
            source, destination = found.of_source(url), found.of_destination(end, protocol, api.relays_to(protocol))
            if source is None:
                missing.setdefault(url.server.url, url.server)
            if destination is None:
                missing.setdefault(end.server.url, end.server)
            if source is None or destination is None:
                continue
            # Files of other routes are in other jobs, which do not know of each other.
            other = places.setdefault((destination.site.id, posixpath.normpath(destination.path)), index)
            if other != index and duplicate is None:
                duplicate = (other, index)
            route = _Route(source.site.id, destination.site.id, protocol, algorithm)
            part = None if alternatives else by_route.get(route)
            if part is None:
                part = by_route[route] = _Part(route)
                parts.append(part)
            item: dict[str, Any] = {"src": source.path, "dst": destination.path}
            if transfer.size:
                item["size"] = transfer.size
            if value:
                item["checksum"] = f"{algorithm}:{value}"
            part.items.append(item)
            part.files.append(NewFtsFile(index, url.text, end.text, transfer.details))
    if missing:
        raise _MissingSitesError(list(missing.values()))
    if duplicate is not None:
        raise InvalidInputError(f"files[{duplicate[0]}] and files[{duplicate[1]}] have the same destination")
    return parts


def _job_of_part(api: ApiContext, caller: Caller, fts_id: str, submission: FtsSubmission, part: _Part) -> NewJob:
    route = part.route
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
