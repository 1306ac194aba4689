"""Turns a batch of elements into the request for a helper; the same for all protocols."""

from __future__ import annotations

from typing import Any

from pdm.workqueue.domain.enums import JobType
from pdm.workqueue.domain.jobs import Batch, ElementRecord, JobRecord
from pdm.workqueue.movers.mover import SiteUrl
from pdm.workqueue.wire.agent_messages import (
    CopyItem,
    CopyRequest,
    Limits,
    ListRequest,
    MakeRequest,
    PathItem,
    RemoveRequest,
    RenameItem,
    RenameRequest,
    Work,
)
from pdm.workqueue.wire.options import (
    CopyOptions,
    ListOptions,
    MkdirOptions,
    Options,
    RemoveOptions,
    RenameOptions,
)


def build_request(batch: Batch, urls: SiteUrl, options: Options, limits: Limits, request_id: int) -> Work:
    """The request for a batch.

    Args:
        batch: elements of one type; the key of each item is its place in there.
        urls: gives the URL of a path at a site.
        options: of the job.
        limits: for each element.
        request_id: names the request in events.
    """
    match batch.type:
        case JobType.LIST:
            return _list(batch, urls, options, limits, request_id)
        case JobType.COPY:
            return _copy(batch, urls, options, limits, request_id)
        case JobType.REMOVE:
            items = [
                PathItem(
                    key,
                    urls(batch.job.src_siteid, element.src_filepath),
                    element.is_directory,
                    again=element.may_be_done,
                )
                for key, element in enumerate(batch.elements)
            ]
            return RemoveRequest(request_id, items, limits)
        case JobType.RENAME:
            return _rename(batch, urls, options, limits, request_id)
        case JobType.MKDIR:
            return _make(batch, urls, options, limits, request_id)


def temporary_name(log_uid: str, element_id: int, attempt: int) -> str:
    """The name under which a file arrives; hidden, and unlike that of any other attempt anywhere."""
    return f".pdm-{log_uid[:16]}.{element_id}.{attempt}.part"


def _list(batch: Batch, urls: SiteUrl, options: Options, limits: Limits, request_id: int) -> ListRequest:
    if len(batch.elements) != 1:
        raise ValueError("a listing is a batch of its own")
    element, job = batch.elements[0], batch.job
    depth: int | None = None
    if isinstance(options, ListOptions):
        depth = options.depth
    elif isinstance(options, RemoveOptions) and not options.recursive:
        # What the path itself is decides all.
        depth = 0
    # The removal of a link must not empty the directory that it leads to.
    follow = job.type is not JobType.REMOVE
    return ListRequest(request_id, 0, urls(job.src_siteid, element.src_filepath), depth, limits, follow=follow)


def _copy(batch: Batch, urls: SiteUrl, options: Options, limits: Limits, request_id: int) -> CopyRequest:
    if not isinstance(options, CopyOptions):
        raise TypeError(f"a copy with {type(options).__name__}")
    items = [_copy_item(key, batch.job_of(element), element, urls) for key, element in enumerate(batch.elements)]
    return CopyRequest(request_id, items, options.overwrite, options.verify, limits)


def _copy_item(key: int, job: JobRecord, element: ElementRecord, urls: SiteUrl) -> CopyItem:
    if job.dst_siteid is None or element.dst_filepath is None:
        raise ValueError(f"element {element.id} of job {job.id} has no destination")
    site = job.dst_siteid
    destination = urls(site, element.dst_filepath)
    folder, _, _ = destination.rpartition("/")
    names = [temporary_name(job.log_uid, element.id, attempt) for attempt in range(1, element.attempts + 1)]
    urls_of_names = [f"{folder}/{name}" for name in names]
    return CopyItem(
        key,
        urls(job.src_siteid, element.src_filepath),
        destination,
        urls_of_names[-1],
        urls_of_names[:-1],
        element.size,
    )


def _found_before(element: ElementRecord) -> dict[str, Any] | None:
    return None if element.found_before is None else dict(element.found_before)


def _rename(batch: Batch, urls: SiteUrl, options: Options, limits: Limits, request_id: int) -> RenameRequest:
    if not isinstance(options, RenameOptions):
        raise TypeError(f"a rename with {type(options).__name__}")
    job = batch.job
    items = []
    for key, element in enumerate(batch.elements):
        if element.dst_filepath is None:
            raise ValueError(f"element {element.id} of job {element.job_id} has no new name")
        source, destination = (urls(job.src_siteid, path) for path in (element.src_filepath, element.dst_filepath))
        items.append(RenameItem(key, source, destination, found=_found_before(element)))
    return RenameRequest(request_id, items, options.overwrite, limits)


def _make(batch: Batch, urls: SiteUrl, options: Options, limits: Limits, request_id: int) -> MakeRequest:
    job = batch.job
    # The empty directories of a copied tree are made where it goes to.
    parents = options.parents if isinstance(options, MkdirOptions) else True
    items = []
    for key, element in enumerate(batch.elements):
        if element.dst_filepath is not None and job.dst_siteid is not None:
            url = urls(job.dst_siteid, element.dst_filepath)
        else:
            url = urls(job.src_siteid, element.src_filepath)
        items.append(PathItem(key, url, directory=True, found=_found_before(element)))
    return MakeRequest(request_id, items, parents, limits)
