"""``/dm``: list, stat, mkdir, rmdir, unlink and rename at storages, as jobs that the request waits for."""

from __future__ import annotations

import stat
from collections.abc import AsyncGenerator, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from pdm.workqueue.domain.enums import JobStatus, JobType
from pdm.workqueue.domain.failures import FailureCode
from pdm.workqueue.domain.jobs import ElementRecord, JobRecord, ListedEntry
from pdm.workqueue.http.endpoint import JsonStream
from pdm.workqueue.http.endpoints.jobs import submit_job
from pdm.workqueue.http.fts.calls import FtsAnswer, FtsCall, ServersOfUrls, read_url
from pdm.workqueue.http.fts.documents import read_document
from pdm.workqueue.http.fts.storages import LocatedFile, make_sites, sites_of_user
from pdm.workqueue.http.problems import ApiError, ForbiddenError, InvalidInputError, NotFoundError, SiteFailedError
from pdm.workqueue.store import jobs, listings
from pdm.workqueue.wire.requests import SubmitJob

#: Clients give up after 30 s.
_WAIT_S = 25.0
_KINDS = {"directory": stat.S_IFDIR, "link": stat.S_IFLNK, "file": stat.S_IFREG}
#: Assumed where a server reports no permissions.
_MODES = {"directory": 0o755, "link": 0o777, "file": 0o644}
_ERRORS: Mapping[FailureCode, type[ApiError]] = MappingProxyType(
    {
        FailureCode.PERMISSION_DENIED: ForbiddenError,
        FailureCode.NOT_FOUND: NotFoundError,
        FailureCode.NOT_A_DIRECTORY: InvalidInputError,
        FailureCode.IS_A_DIRECTORY: InvalidInputError,
        FailureCode.EXISTS: InvalidInputError,
        FailureCode.NOT_EMPTY: InvalidInputError,
        FailureCode.INVALID_NAME: InvalidInputError,
    }
)


async def _located(call: FtsCall, surl: object) -> tuple[LocatedFile, int]:
    """The site and path of a URL, and the number of its protocol."""
    if not isinstance(surl, str) or not surl:
        raise InvalidInputError("Missing surl parameter")
    try:
        url = read_url(surl, ServersOfUrls(buckets_in_paths=True))
    except ValueError as error:
        raise InvalidInputError(f"surl: {error}") from error
    found = (await sites_of_user(call.api, call.caller)).of_source(url)
    if found is None:
        await make_sites(call.api, call.caller, [url.server])
        found = (await sites_of_user(call.api, call.caller)).of_source(url)
    if found is None:
        raise NotFoundError(f"no site serves {url.server.url}")
    return found, url.server.protocol.value


async def _done(
    call: FtsCall, type_: JobType, surl: object, other: object = None, **options: Any
) -> tuple[JobRecord, ElementRecord]:
    """Run a job and wait for its end; returns it and its first element.

    Raises:
        ApiError: it has failed, or takes too long; in the latter case it continues.
    """
    api, caller = call.api, call.caller
    source, protocol = await _located(call, surl)
    path = None
    if other is not None:
        destination, _ = await _located(call, other)
        if destination.site is not source.site:
            raise InvalidInputError("both URLs must be at one storage")
        path = destination.path
    body = SubmitJob(
        type=type_.value,
        protocol=protocol,
        src_siteid=source.site.id,
        src_filepath=source.path,
        dst_filepath=path,
        extra_opts=options,
    )
    view: Any = await submit_job.handler(api, caller, body=body, key=None)
    until = api.reactor.seconds() + _WAIT_S
    while True:
        job = await api.awaited_job(view.id, caller.scope, max(until - api.reactor.seconds(), 0.0))
        if job.status.is_final or api.reactor.seconds() >= until:
            break
    element = await api.database.read("the first element", jobs.fetch_element, job.id, 0)
    if element is None:
        raise NotFoundError(f"job {job.id} was removed")
    failure = element.failure
    if job.status is JobStatus.DONE:
        return job, element
    if not job.status.is_final:
        reason = f": {failure.message}" if failure is not None else ""
        raise SiteFailedError(f"this takes longer than {_WAIT_S:.0f} s; job {job.id} of the service continues{reason}")
    if failure is None:
        # The listing is done, and what it has found could not be removed.
        removal = await api.database.read("the element after the listing", jobs.fetch_element, job.id, 1)
        failure = None if removal is None else removal.failure
    if failure is None:
        raise SiteFailedError(f"job {job.id} of the service ended {job.status.name}")
    raise _ERRORS.get(failure.code, SiteFailedError)(f"[{failure.code}] {failure.message}")


def _status(entry: ListedEntry) -> dict[str, Any]:
    mode = _MODES.get(entry.type, 0o644) if entry.mode is None else entry.mode
    return {"size": entry.size, "mode": _KINDS.get(entry.type, 0) | mode, "mtime": entry.mtime or 0}


async def _entries(call: FtsCall, job: JobRecord) -> AsyncGenerator[ListedEntry]:
    for number in await call.api.database.read("chunks of a listing", listings.chunks, job.id, 0):
        for entry in await call.api.database.read("chunk of a listing", listings.chunk, job.id, 0, number):
            yield entry


async def list_directory(call: FtsCall) -> FtsAnswer:
    """Names in a directory, with a slash after those of directories, and what they are."""
    job, _ = await _done(call, JobType.LIST, call.query().get("surl"), depth=1)

    async def pieces() -> AsyncGenerator[bytes]:
        separator = b"{"
        async for entry in _entries(call, job):
            if entry.path:
                name = entry.path + ("/" if entry.type == "directory" else "")
                yield separator + msgspec.json.encode(name) + b":" + msgspec.json.encode(_status(entry))
                separator = b","
        yield b"{}" if separator == b"{" else b"}"

    return FtsAnswer(JsonStream(pieces()))


async def show_status(call: FtsCall) -> FtsAnswer:
    """What is at a URL."""
    job, _ = await _done(call, JobType.LIST, call.query().get("surl"), depth=0)
    async for entry in _entries(call, job):
        if not entry.path:
            status = _status(entry)
            return FtsAnswer({**status, "nlink": 1, "atime": status["mtime"], "ctime": status["mtime"]})
    raise NotFoundError("nothing is there")


async def make_directory(call: FtsCall) -> FtsAnswer:
    """Make a directory."""
    await _done(call, JobType.MKDIR, read_document(call.body).get("surl"))
    return FtsAnswer(0)


async def unlink(call: FtsCall) -> FtsAnswer:
    """Remove a file."""
    await _done(call, JobType.REMOVE, read_document(call.body).get("surl"), recursive=False)
    return FtsAnswer(0)


async def rename(call: FtsCall) -> FtsAnswer:
    """Rename at one storage."""
    names = read_document(call.body)
    if not names.get("old") or not names.get("new"):
        raise InvalidInputError("No old or name specified")
    await _done(call, JobType.RENAME, names["old"], names["new"])
    return FtsAnswer(0)


async def remove_directory(call: FtsCall) -> FtsAnswer:
    """Remove an empty directory."""
    await _done(call, JobType.REMOVE, read_document(call.body).get("surl"), only_empty=True)
    return FtsAnswer(0)
