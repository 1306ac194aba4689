"""The client of the service: one method for each operation of the API, each returning a Deferred.

For example::

    client = WorkqueueClient.from_environment(reactor)
    for entry in await client.ls("cern", "/data/run7"):
        print(entry.name, entry.size)
    job = await client.copy("cern", "/data/run7/", "ral", "/archive/run7/", sync="mtime", wait=True)
    await client.close()

A site is a number, or a name; of sites that are named, the protocol is chosen as ``pdm`` does it.

Scripts and notebooks without a reactor use `pdm.workqueue.blocking.BlockingWorkqueueClient`: same methods, values
instead of Deferreds.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack, cast
from urllib.parse import quote

import msgspec
from msgspec import UNSET, UnsetType
from twisted.internet.defer import Deferred
from twisted.web.iweb import IPolicyForHTTPS

from pdm.workqueue.certificates.tls_client import ClientCredentialError, WeakCredentialError, client_policy
from pdm.workqueue.client.connection import Connection, DelegationClient, JobPoller, Query, encode_query
from pdm.workqueue.client.errors import CredentialError, JobFailedError, SettingsError, UnexpectedAnswerError
from pdm.workqueue.client.events import EventReader, JobFollower
from pdm.workqueue.client.inspection import ServerFacts, inspect_server
from pdm.workqueue.client.settings import ClientSettings, choose_protocol, find_settings, find_site
from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.notifications import EventKind
from pdm.workqueue.wire.activity import ActivityView, NodeView, QueueSummaryView, RateView, SiteActivityView, WhyView
from pdm.workqueue.wire.credentials import CredentialView, DelegationView, LoginView
from pdm.workqueue.wire.events import EventView, MailView, WebhookTestView, WebhookView
from pdm.workqueue.wire.receipts import CSV, NDJSON, ErrorGroupView
from pdm.workqueue.wire.responses import (
    ElementStatusView,
    ElementView,
    EntryView,
    HealthView,
    JobStatusView,
    JobView,
    OutputView,
    RetriedJobView,
    SkippedView,
    WhoamiView,
)
from pdm.workqueue.wire.schedules import ScheduleView
from pdm.workqueue.wire.sites import AuditView, CheckView, RouteView, SiteView, UserView

_T = TypeVar("_T")
_Numbered = TypeVar("_Numbered", JobView, ElementView, SkippedView)
#: Items in one page when all are read.
_PAGE_SIZE = 500


class SubmitOptions(TypedDict, total=False):
    """Options of every submission.

    Attributes:
        protocol: transfer protocol; default GRIDFTP.
        priority: 0 (first) to 9.
        max_tries: attempts for each element, 1 to 10.
        label: a word by which to find the job.
        max_active: how many of its elements may run at once; default: no limit of its own.
        after: numbers of jobs; the new one begins when all of them are DONE, and is cancelled if one is not.
        after_any: whether it begins when those have ended in whatever state.
        deadline: when it is cancelled unless it has ended: a time with a time zone, a duration from now, or a text of
            the API.
        notify: what is mailed of it: ``ended``, ``failed``, ``held``; default: as the user has chosen.
        options: further members of ``extra_opts``.
        idempotency_key: submissions with the same key make one job; default: a new key.
        wait: whether to wait for the end of the job; one that ends FAILED or CANCELLED raises a `JobFailedError`.
    """

    protocol: JobProtocol | str
    priority: int
    max_tries: int
    label: str
    max_active: int
    after: Sequence[int]
    after_any: bool
    deadline: datetime | timedelta | str
    notify: Sequence[str]
    options: Mapping[str, Any]
    idempotency_key: str
    wait: bool


class CopyFilter(TypedDict, total=False):
    """A pattern of ``.gitignore``, relative to the source: either `include` or `exclude`."""

    include: str
    exclude: str


class CopyArguments(SubmitOptions, total=False):
    """Options of a copy; None is the same as omitting one.

    Attributes:
        overwrite: whether to replace existing files; default ``never``.
        verify: how copies are verified; default ``checksum``.
        sync: what counts as already there; anything else there is replaced.
        filters: the first that matches decides; what matches none is copied.
        min_size: bytes.
        max_size: bytes.
        newer_than: RFC 3339, or a duration before the submission (``7d``).
        older_than: the same.
        delete_extra: with `sync`, remove at the destination what the source has not.
        max_delete: with `delete_extra`, remove nothing if it would be more; default 100.
        dry_run: only plan.
        move: remove each file from the source once its copy is verified.
        preserve: what to keep of files, where both ends can.
        checksum: by which copies are verified; default ``ADLER32``.
    """

    overwrite: Literal["never", "always", "different"] | None
    verify: Literal["checksum", "size"] | None
    sync: Literal["exists", "size", "mtime", "checksum"] | None
    filters: Sequence[CopyFilter] | None
    min_size: int | None
    max_size: int | None
    newer_than: str | None
    older_than: str | None
    delete_extra: bool | None
    max_delete: int | None
    dry_run: bool | None
    move: bool | None
    preserve: Sequence[Literal["mtime", "mode"]] | None
    checksum: Literal["ADLER32", "MD5", "SHA256"] | None


class Filters(TypedDict, total=False):
    """Filters of jobs and elements; None is the same as omitting one.

    Attributes:
        site: source or destination, by number or name.
        label: of the job.
        since: registered at or after this time, which needs a time zone.
        after: only greater numbers.
    """

    status: JobStatus | str | None
    type: JobType | str | None
    site: int | str | None
    label: str | None
    since: datetime | None
    after: int | None


class ElementFilters(Filters, total=False):
    """Filters of elements; None is the same as omitting one.

    Attributes:
        code: the code with which they failed.
    """

    code: str | None


class JobFilters(Filters, total=False):
    """Filters and order of jobs; None is the same as omitting one.

    Attributes:
        user: for operators: the number of a user, or ``all``; default: the caller.
        order: ``oldest`` or ``newest`` first; with a limit, ``newest`` selects the newest.
        before: only smaller numbers.
    """

    user: int | str | None
    order: Literal["oldest", "newest"] | None
    before: int | None


class SiteOptions(TypedDict, total=False):
    """Definition of a site, besides its name and endpoints.

    Attributes:
        description: one line.
        default_folder: directory to which paths are relative; default ``~``.
        public: whether all users may see and use it; default: only its owner.
        limit_in: maximum concurrent streams into the site; None for the default of the service.
        limit_out: maximum concurrent streams out of the site.
        authorities: PEM of authorities that are trusted for this site only.
        myproxy: ``HOST:PORT`` of the site's MyProxy server; None for none.
        tape: URL of its tape API; None where its HTTPS endpoint names it, or where it has none.
        mover: ``native`` (default), or ``tools``: globus-url-copy and gfal carry out its jobs.
        fts: ``https://HOST:PORT`` of the FTS3 that carries out copies from and to it; None for none.
        oidc: the issuer of its tokens and the client for logins, as the keys of the REST API; None for nothing.
    """

    description: str
    default_folder: str
    public: bool
    limit_in: int | None
    limit_out: int | None
    authorities: str
    myproxy: str | None
    tape: str | None
    mover: Literal["native", "tools"]
    fts: str | None
    oidc: Mapping[str, Any] | None


class SiteChangeOptions(SiteOptions, total=False):
    """Changes to a site; `endpoints` replace all existing ones."""

    name: str
    endpoints: Mapping[str, str | Sequence[str]]


#: Options of a copy that travel in ``extra_opts``.
_COPY_OPTIONS = CopyArguments.__annotations__.keys() - SubmitOptions.__annotations__.keys()
_SITE_KEYS = ("src_siteid", "dst_siteid")


class WorkqueueClient:
    """Calls one service as one user, over a pool of persistent connections.

    All methods return Deferreds, which fail with a `pdm.workqueue.client.errors.WorkqueueClientError`; its class and
    text say what happened and what to do. Cancelling a Deferred cancels its request, not the job.

    Args:
        reactor: of Twisted.
        base_url: ``https://HOST:PORT`` of the service.
        policy: presents the caller's certificate and verifies the service's; see
            `pdm.workqueue.certificates.tls_client.client_policy`.
        certificate: PEM file with which `delegate` signs; None for a client that never delegates.
        key: PEM file; None if the key is in the file of the certificate.
        passphrase: of an encrypted key.
        timeout_s: how many seconds the service may be silent.
        on_wait: called with a sentence before each wait for a service that is temporarily unavailable.
    """

    def __init__(
        self,
        reactor: Any,
        base_url: str,
        policy: IPolicyForHTTPS,
        *,
        certificate: Path | None = None,
        key: Path | None = None,
        passphrase: bytes | None = None,
        timeout_s: float = 60.0,
        on_wait: Callable[[str], object] = lambda sentence: None,
    ) -> None:
        self._reactor = reactor
        self._url = base_url
        self._policy = policy
        self._connection = Connection(reactor, base_url=base_url, policy=policy, timeout_s=timeout_s, on_wait=on_wait)
        self._certificate = certificate
        self._key = key
        self._passphrase = passphrase

    @classmethod
    def from_settings(
        cls,
        reactor: Any,
        settings: ClientSettings,
        timeout_s: float = 60.0,
        on_wait: Callable[[str], object] = lambda sentence: None,
    ) -> Self:
        """A client with explicit settings.

        Raises:
            SettingsError, CredentialError: a file is missing, expired or invalid.
        """
        try:
            policy = client_policy(
                settings.ca,
                settings.certificate,
                settings.key,
                passphrase=settings.passphrase,
                ca_named_by=settings.ca_named_by,
            )
        except WeakCredentialError as error:
            raise SettingsError(str(error).rstrip(".")) from error
        except ClientCredentialError as error:
            raise CredentialError(str(error).rstrip(".")) from error
        return cls(
            reactor,
            settings.url,
            policy,
            certificate=settings.certificate,
            key=settings.key,
            passphrase=settings.passphrase,
            timeout_s=timeout_s,
            on_wait=on_wait,
        )

    @classmethod
    def from_environment(cls, reactor: Any, url: str | None = None) -> Self:
        """A client with settings from the environment or client.conf; see `find_settings`."""
        return cls.from_settings(reactor, find_settings(os.environ, Path.home(), os.getuid(), url))

    def close(self) -> Deferred[None]:
        """Close idle connections; the client can still be used."""
        return Deferred.fromCoroutine(self._connection.close())

    # Submissions

    def list(
        self, site: int | str, path: str, *, depth: int | None = None, **more: Unpack[SubmitOptions]
    ) -> Deferred[JobView]:
        """Submit a listing; `depth` 0 is the path itself, 1 its entries, None all levels."""
        return self._submit("/list", {"src_siteid": site, "src_filepath": path}, {"depth": depth}, more)

    def ls(self, site: int | str, path: str, **more: Unpack[SubmitOptions]) -> Deferred[Sequence[EntryView]]:
        """List a directory (its entries) or a file (itself), and wait for the result.

        Raises:
            JobFailedError: it is not there, or cannot be listed.
        """

        async def listed() -> Sequence[EntryView]:
            more["wait"] = True
            job = await self.list(site, path, depth=1, **more)
            entries = (await self.element(job.id, 0)).entries
            return () if entries is UNSET else tuple(entry for each in entries.values() for entry in each)

        return Deferred.fromCoroutine(listed())

    def copy(
        self, src_site: int | str, src_path: str, dst_site: int | str, dst_path: str, **more: Unpack[CopyArguments]
    ) -> Deferred[JobView]:
        """Submit a copy of a file, or of the content of a directory, to `dst_path`."""
        body = {
            "src_siteid": src_site,
            "src_filepath": src_path,
            "dst_siteid": dst_site,
            "dst_filepath": dst_path,
        }
        common = {name: value for name, value in more.items() if name not in _COPY_OPTIONS}
        options = {name: value for name, value in more.items() if name in _COPY_OPTIONS}
        return self._submit("/copy", body, options, cast(SubmitOptions, common))

    def copy_items(
        self,
        src_site: int | str,
        dst_site: int | str,
        items: Sequence[Mapping[str, Any]],
        **more: Unpack[SubmitOptions],
    ) -> Deferred[JobView]:
        """Submit a copy of up to 100,000 single files: ``src`` and ``dst``, and where known ``size`` and ``checksum``.

        Nothing is submitted if one of them is not valid. With ``options={"check": "destination"}`` (or ``"source"``)
        nothing is copied: the files that are there are compared with ``size`` and ``checksum``.
        """
        body = {"src_siteid": src_site, "dst_siteid": dst_site}
        return self._submit("/copy", body, {"items": list(items)}, more)

    def remove(
        self, site: int | str, path: str, *, recursive: bool | None = None, **more: Unpack[SubmitOptions]
    ) -> Deferred[JobView]:
        """Submit a removal; with `recursive=False` a directory must be empty."""
        return self._submit("/remove", {"src_siteid": site, "src_filepath": path}, {"recursive": recursive}, more)

    def rename(
        self,
        site: int | str,
        path: str,
        new_path: str,
        *,
        overwrite: Literal["never", "always"] | None = None,
        **more: Unpack[SubmitOptions],
    ) -> Deferred[JobView]:
        """Submit a rename within a site."""
        body = {"src_siteid": site, "src_filepath": path, "dst_filepath": new_path}
        return self._submit("/rename", body, {"overwrite": overwrite}, more)

    def mkdir(
        self, site: int | str, path: str, *, parents: bool | None = None, **more: Unpack[SubmitOptions]
    ) -> Deferred[JobView]:
        """Submit the creation of a directory; `parents` also creates its parents, and accepts an existing directory."""
        return self._submit("/mkdir", {"src_siteid": site, "src_filepath": path}, {"parents": parents}, more)

    def submit(self, type_: JobType | str, body: Mapping[str, Any], **more: Unpack[SubmitOptions]) -> Deferred[JobView]:
        """Submit a job of any type, with a body of ``POST /jobs``."""
        return self._submit("/jobs", {**body, "type": JobType.parse(type_).value}, {}, more)

    # Queries

    def jobs(self, *, limit: int | None = None, **filters: Unpack[JobFilters]) -> Deferred[Sequence[JobView]]:
        """The caller's jobs that match the filters, by default oldest first."""
        return self._fetch(tuple[JobView, ...], "GET", "/jobs", encode_query(limit=limit, **filters))

    def iterate_jobs(self, /, **filters: Unpack[JobFilters]) -> AsyncIterator[JobView]:
        """All the caller's jobs that match the filters, read page by page."""
        return self._pages(self.jobs, filters)

    def job(self, job_id: int, *, wait: float = 0.0) -> Deferred[JobView]:
        """A job; with ``wait`` as soon as its status changes, at the latest after so many seconds."""
        return self._fetch(JobView, "GET", f"/jobs/{job_id:d}", encode_query(wait=wait or None))

    def elements(
        self, job_id: int, *, limit: int | None = None, **filters: Unpack[ElementFilters]
    ) -> Deferred[Sequence[ElementView]]:
        """The elements of a job that match the filters, by number."""
        return self._fetch(
            tuple[ElementView, ...], "GET", f"/jobs/{job_id:d}/elements", encode_query(limit=limit, **filters)
        )

    def iterate_elements(self, job_id: int, /, **filters: Unpack[ElementFilters]) -> AsyncIterator[ElementView]:
        """All elements of a job that match the filters, read page by page."""
        return self._pages(partial(self.elements, job_id), filters)

    def element(self, job_id: int, element_id: int) -> Deferred[ElementView]:
        return self._fetch(ElementView, "GET", f"/jobs/{job_id:d}/elements/{element_id:d}")

    def status(self, job_id: int) -> Deferred[JobStatusView]:
        """Status and progress of a job."""
        return self._fetch(JobStatusView, "GET", f"/jobs/{job_id:d}/status")

    def element_status(self, job_id: int, element_id: int) -> Deferred[ElementStatusView]:
        """Status and rate of an element."""
        return self._fetch(ElementStatusView, "GET", f"/jobs/{job_id:d}/elements/{element_id:d}/status")

    def skipped(
        self, job_id: int, *, limit: int | None = None, after: int | None = None
    ) -> Deferred[Sequence[SkippedView]]:
        """Source entries that a job skips, each with its reason."""
        path = f"/jobs/{job_id:d}/skipped"
        return self._fetch(tuple[SkippedView, ...], "GET", path, encode_query(limit=limit, after=after))

    def iterate_skipped(self, job_id: int) -> AsyncIterator[SkippedView]:
        """All source entries that a job skips, read page by page."""
        return self._pages(partial(self.skipped, job_id), {})

    def output(self, job_id: int) -> Deferred[Sequence[OutputView]]:
        """The latest log (and listing) of each element that has one."""
        return self._fetch(tuple[OutputView, ...], "GET", f"/jobs/{job_id:d}/output")

    def element_output(self, job_id: int, element_id: int, attempt: int | None = None) -> Deferred[OutputView]:
        """The log (and listing) of an element: of the latest ended attempt, or of one (negative: from the end)."""
        which = "" if attempt is None else f"/{attempt:d}"
        return self._fetch(OutputView, "GET", f"/jobs/{job_id:d}/elements/{element_id:d}/output{which}")

    def live_output(
        self, job_id: int, element_id: int, attempt: int | None = None, offset: int = 0
    ) -> Deferred[OutputView]:
        """A piece of the log of an attempt, running or not; by default the latest, from which negative numbers count.

        The piece begins at `offset`: 0, then the ``offset`` of the piece before. Its ``status`` is RUNNING while the
        attempt runs; its ``end`` is true if nothing follows.
        """
        which = "" if attempt is None else f"/{attempt:d}"
        path = f"/jobs/{job_id:d}/elements/{element_id:d}/output{which}"
        return self._fetch(OutputView, "GET", path, encode_query(live=1, offset=offset))

    def receipt(
        self, job_id: int, write: Callable[[bytes], object], form: Literal["jsonl", "csv"] = "jsonl"
    ) -> Deferred[None]:
        """Pass the receipt of a job to `write`, piece by piece as it arrives.

        It is complete only when the Deferred fires; `pdm.workqueue.client.receipts.verify_receipt` proves it.
        """

        async def download() -> None:
            accept = NDJSON if form == "jsonl" else CSV
            await self._connection.request("GET", f"/jobs/{job_id:d}/receipt", accept=accept, write=write)

        return Deferred.fromCoroutine(download())

    def errors(self, job_id: int) -> Deferred[Sequence[ErrorGroupView]]:
        """The failures of a job by code and scope, the most frequent first."""
        return self._fetch(tuple[ErrorGroupView, ...], "GET", f"/jobs/{job_id:d}/errors")

    def rate(self, job_id: int) -> Deferred[RateView]:
        """What a job has done over time."""
        return self._fetch(RateView, "GET", f"/jobs/{job_id:d}/rate")

    def why(self, job_id: int, element_id: int | None = None) -> Deferred[WhyView]:
        """Why a job, or one of its elements, does not move."""
        return self._fetch(WhyView, "GET", f"/jobs/{job_id:d}/why", encode_query(element=element_id))

    def health(self) -> Deferred[HealthView]:
        """Whether the service works, and what does not."""
        return self._fetch(HealthView, "GET", "/health")

    def inspect_server(self) -> Deferred[ServerFacts]:
        """Version and health of the service, the end of its certificate, and how its clock differs from this one."""
        return Deferred.fromCoroutine(inspect_server(self._reactor, self._url, self._policy, self._connection))

    def whoami(self) -> Deferred[WhoamiView]:
        """Identity and role of the caller."""
        return self._fetch(WhoamiView, "GET", "/whoami")

    def sites(self) -> Deferred[Sequence[SiteView]]:
        """The sites, with their protocols and endpoints."""
        return self._fetch(tuple[SiteView, ...], "GET", "/sites")

    def routes(self) -> Deferred[Sequence[RouteView]]:
        """Streams between sites, their limits, and the reasons for these."""
        return self._fetch(tuple[RouteView, ...], "GET", "/routes")

    def route_activity(self) -> Deferred[ActivityView]:
        """What ended on all routes in the last 24 hours, and the most frequent failures; for operators."""
        return self._fetch(ActivityView, "GET", "/routes/activity")

    def site_activity(self) -> Deferred[Sequence[SiteActivityView]]:
        """Streams, queue and success of the last hour at each site."""
        return self._fetch(tuple[SiteActivityView, ...], "GET", "/sites/activity")

    def queue(self) -> Deferred[QueueSummaryView]:
        """Who works and waits, and what has waited longest; for operators."""
        return self._fetch(QueueSummaryView, "GET", "/queue")

    def nodes(self) -> Deferred[Sequence[NodeView]]:
        """The nodes: daemons that work on the queue, or did; for operators."""
        return self._fetch(tuple[NodeView, ...], "GET", "/nodes")

    def drain_node(self, name: str, message: str, *, deadline: str | None = None) -> Deferred[NodeView]:
        """Drain a node: it starts nothing more, and what runs finishes. For operators.

        ``deadline``: when the rest goes back to the queue: a time, or a duration such as ``30m``; None for never.
        """
        body = msgspec.json.encode({"message": message, "deadline": deadline})
        return self._fetch(NodeView, "POST", f"/nodes/{quote(name, safe='')}/drain", body=body, key=_new_key())

    def resume_node(self, name: str) -> Deferred[NodeView]:
        """End the drain of a node. For operators."""
        return self._fetch(NodeView, "POST", f"/nodes/{quote(name, safe='')}/resume", key=_new_key())

    def site(self, site: int | str) -> Deferred[SiteView]:
        """One site, with the health of its endpoints."""
        return self._at_site(SiteView, "GET", site)

    def users(self, *, limit: int | None = None, after: int | None = None) -> Deferred[Sequence[UserView]]:
        """The users, by number; for operators."""
        return self._fetch(tuple[UserView, ...], "GET", "/users", encode_query(limit=limit, after=after))

    def audit(self, *, limit: int | None = None, after: int | None = None) -> Deferred[Sequence[AuditView]]:
        """The audit log of sites and users, the oldest first; for operators."""
        return self._fetch(tuple[AuditView, ...], "GET", "/audit", encode_query(limit=limit, after=after))

    # Sites

    def add_site(
        self, name: str, endpoints: Mapping[str, str | Sequence[str]], **more: Unpack[SiteOptions]
    ) -> Deferred[SiteView]:
        """Create a site of the caller; `endpoints` maps protocols to a URL, or to several URLs of one storage."""
        body = msgspec.json.encode({"name": name, "endpoints": endpoints, **more})
        return self._fetch(SiteView, "POST", "/sites", body=body, key=_new_key())

    def change_site(self, site: int | str, **changes: Unpack[SiteChangeOptions]) -> Deferred[SiteView]:
        """Change the given settings of a site."""
        return self._at_site(SiteView, "PATCH", site, body=msgspec.json.encode(changes))

    def remove_site(self, site: int | str) -> Deferred[None]:
        """Remove a site that no unfinished job needs."""
        return self._remove_at_site(site)

    def check_site(self, site: int | str) -> Deferred[Sequence[CheckView]]:
        """Let the service connect to each endpoint of a site with the caller's credential."""
        return self._at_site(tuple[CheckView, ...], "POST", site, "/check", key=_new_key())

    def drain_site(self, site: int | str, message: str) -> Deferred[SiteView]:
        """Drain a site: nothing new starts there, and users see the message. For operators."""
        body = msgspec.json.encode({"message": message})
        return self._at_site(SiteView, "POST", site, "/drain", body=body, key=_new_key())

    def resume_site(self, site: int | str) -> Deferred[SiteView]:
        """End the drain of a site. For operators."""
        return self._at_site(SiteView, "POST", site, "/resume", key=_new_key())

    def ban(self, user_id: int, message: str) -> Deferred[UserView]:
        """Ban a user from submitting and starting jobs; the user sees the message. For operators."""
        body = msgspec.json.encode({"message": message})
        return self._fetch(UserView, "POST", f"/users/{user_id:d}/ban", body=body, key=_new_key())

    def unban(self, user_id: int) -> Deferred[UserView]:
        """End the ban of a user. For operators."""
        return self._fetch(UserView, "POST", f"/users/{user_id:d}/unban", key=_new_key())

    # Jobs

    def wait(
        self,
        job_id: int,
        timeout: float | None = None,
        on_progress: Callable[[JobView], object] | None = None,
        *,
        patience_s: float = 120.0,
        check: bool = False,
    ) -> Deferred[JobView]:
        """Wait until a job has ended, in whatever state.

        Args:
            job_id: number of the job.
            timeout: seconds; None for no limit.
            on_progress: called with each state of the job, the last one included; its ``progress`` has counts, rates
                and the estimated time left.
            patience_s: for how many seconds the service may be unreachable meanwhile (a restart).
            check: whether a job that ends FAILED or CANCELLED is an error.

        Raises:
            JobTimeoutError: the job did not end in time; it continues.
            JobFailedError: with `check`.
        """
        show = on_progress or (lambda job: None)
        # For an earlier version of the service, which has no events.
        poller = JobPoller(
            self._reactor,
            fetch_job=lambda seconds: self.job(job_id, wait=seconds),
            on_progress=show,
            outage_s=patience_s,
        )

        async def ended() -> JobView:
            job = await self._followed_end(job_id, timeout, show, patience_s)
            job = job or await poller.until_end(job_id, timeout)
            return await self._check_end(job) if check else job

        return Deferred.fromCoroutine(ended())

    def events_page(
        self,
        job_id: int | None = None,
        *,
        kinds: Sequence[EventKind | str] = (),
        after: int | None = None,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> Deferred[Sequence[EventView]]:
        """Stored events of a job or of all jobs of the caller (of all users, for operators).

        Args:
            job_id: None for all jobs.
            kinds: only these.
            after: id of the last event of the page before.
            limit: how many at most; by default 100.
            newest_first: whether these are the latest ones, the newest first.
        """
        order = "newest" if newest_first else None
        query = [*_kinds_query(kinds), *encode_query(after=after, limit=limit, order=order)]
        return self._fetch(tuple[EventView, ...], "GET", _events_path(job_id), query)

    async def events(
        self,
        job_id: int | None = None,
        *,
        kinds: Sequence[EventKind | str] = (),
        after: int | None = None,
        patience_s: float = 120.0,
    ) -> AsyncGenerator[EventView]:
        """Follow events as they happen, of a job or of all jobs of the caller (of all users, for operators).

        It does not end by itself. After an interruption, such as a restart of the service, it continues with the next
        event: none is lost or repeated, except for progress.

        Args:
            job_id: None for all jobs.
            kinds: only these; by default all, progress only of one job.
            after: id of the event after which it begins, 0 for the oldest that is stored; None for events from now on.
            patience_s: for how many seconds the service may be unreachable meanwhile.
        """
        reader = self._event_reader(job_id, kinds, after, patience_s)
        try:
            while True:
                for event in await reader.take():
                    yield event
        finally:
            reader.close()

    def cancel(self, job_id: int) -> Deferred[JobView]:
        """Cancel a job; a job that has ended is not changed."""
        return self._fetch(JobView, "DELETE", f"/jobs/{job_id:d}")

    def retry(
        self, job_id: int, *, code: str | Sequence[str] | None = None, force: bool = True
    ) -> Deferred[RetriedJobView]:
        """Retry failed and cancelled elements; with `code` only what failed with one of these codes.

        Without `force`, elements whose failure a retry cannot help are left; ``left`` of the result counts them.
        """
        codes = code if code is None or isinstance(code, str) else ",".join(code)
        query = encode_query(code=codes, force=None if force else 0)
        return self._fetch(RetriedJobView, "POST", f"/jobs/{job_id:d}/retry", query, key=_new_key())

    def hold(self, job_id: int, *, message: str | None = None, until: str | None = None) -> Deferred[JobView]:
        """Hold a job: nothing more of it begins, and what runs ends by itself.

        Args:
            message: why, for people; operators must give one for a job of another user.
            until: when it is resumed by itself: a time, or a duration such as ``12h``; None for never.
        """
        body = msgspec.json.encode({"message": message, "until": until})
        return self._fetch(JobView, "POST", f"/jobs/{job_id:d}/hold", body=body, key=_new_key())

    def resume(self, job_id: int) -> Deferred[JobView]:
        """End the hold of a job; it is no error if it is not held."""
        return self._fetch(JobView, "POST", f"/jobs/{job_id:d}/resume", key=_new_key())

    def change_job(
        self, job_id: int, *, priority: int | None = None, max_active: int | UnsetType | None = UNSET
    ) -> Deferred[JobView]:
        """Change a job from its next claim on.

        Args:
            priority: 0 is served first; None for what it has.
            max_active: how many of its elements may run at once; None for no limit of its own.
        """
        changes: dict[str, int | None] = {} if priority is None else {"priority": priority}
        if max_active is not UNSET:
            changes["max_active"] = max_active
        return self._fetch(JobView, "PATCH", f"/jobs/{job_id:d}", body=msgspec.json.encode(changes))

    # Schedules

    def schedules(self) -> Deferred[Sequence[ScheduleView]]:
        """The caller's schedules, each with its last run."""
        return self._fetch(tuple[ScheduleView, ...], "GET", "/schedules")

    def schedule(self, schedule_id: int) -> Deferred[ScheduleView]:
        """A schedule with its last 100 runs."""
        return self._fetch(ScheduleView, "GET", f"/schedules/{schedule_id:d}")

    def add_schedule(
        self, recurrence: str, job: Mapping[str, Any], *, timezone: str | None = None
    ) -> Deferred[ScheduleView]:
        """Submit a job again and again.

        Args:
            recurrence: five fields of cron (``0 3 * * *``), or an interval (``every 6h``).
            job: a body of ``POST /jobs``.
            timezone: of a cron expression, such as ``Europe/Paris``; default UTC.
        """
        body = {"recurrence": recurrence, "timezone": timezone, "job": job}
        return self._fetch(ScheduleView, "POST", "/schedules", body=msgspec.json.encode(body), key=_new_key())

    def pause_schedule(self, schedule_id: int) -> Deferred[ScheduleView]:
        """Submit no further job of a schedule."""
        return self._edit_schedule(schedule_id, {"paused": True})

    def resume_schedule(self, schedule_id: int) -> Deferred[ScheduleView]:
        """End the pause of a schedule."""
        return self._edit_schedule(schedule_id, {"paused": False})

    def edit_schedule(
        self,
        schedule_id: int,
        *,
        recurrence: str | None = None,
        timezone: str | None = None,
        job: Mapping[str, Any] | None = None,
    ) -> Deferred[ScheduleView]:
        """Change what a schedule submits, and when; arguments as in `add_schedule`, None for what stays."""
        changes = {"recurrence": recurrence, "timezone": timezone, "job": job}
        return self._edit_schedule(schedule_id, {key: value for key, value in changes.items() if value is not None})

    def _edit_schedule(self, schedule_id: int, changes: Mapping[str, Any]) -> Deferred[ScheduleView]:
        body = msgspec.json.encode(changes)
        return self._fetch(ScheduleView, "PATCH", f"/schedules/{schedule_id:d}", body=body)

    def remove_schedule(self, schedule_id: int) -> Deferred[None]:
        """Remove a schedule; the jobs of its runs stay."""
        return self._send("DELETE", f"/schedules/{schedule_id:d}")

    # Notifications

    def webhooks(self) -> Deferred[Sequence[WebhookView]]:
        """The caller's webhooks."""
        return self._fetch(tuple[WebhookView, ...], "GET", "/webhooks")

    def webhook(self, webhook_id: int) -> Deferred[WebhookView]:
        """A webhook with its last 100 deliveries."""
        return self._fetch(WebhookView, "GET", f"/webhooks/{webhook_id:d}")

    def add_webhook(self, url: str, kinds: Sequence[str], *, job: int | None = None) -> Deferred[WebhookView]:
        """Send events to a URL; the result has the secret with which they are signed.

        Args:
            kinds: of events: ``job``, ``failure``, ``held``, ``resumed``, ``site``.
            job: only events of this job.
        """
        body = msgspec.json.encode({"url": url, "kinds": list(kinds), "job": job})
        return self._fetch(WebhookView, "POST", "/webhooks", body=body, key=_new_key())

    def test_webhook(self, webhook_id: int) -> Deferred[WebhookTestView]:
        """Send a test message to a webhook, and wait for the answer."""
        return self._fetch(WebhookTestView, "POST", f"/webhooks/{webhook_id:d}/test", key=_new_key())

    def remove_webhook(self, webhook_id: int) -> Deferred[None]:
        """Remove a webhook."""
        return self._send("DELETE", f"/webhooks/{webhook_id:d}")

    def mail(self) -> Deferred[MailView]:
        """What is mailed to the caller."""
        return self._fetch(MailView, "GET", "/mail")

    def set_mail(self, address: str, notify: Sequence[str], *, per: str = "job") -> Deferred[MailView]:
        """Set the caller's mail address, to which a code is sent first.

        Args:
            notify: of ``ended``, ``failed``, ``held``.
            per: ``job`` or ``day``.
        """
        body = msgspec.json.encode({"address": address, "notify": list(notify), "per": per})
        return self._fetch(MailView, "PUT", "/mail", body=body)

    def confirm_mail(self, code: str) -> Deferred[MailView]:
        """Confirm the caller's mail address by the code that was sent to it."""
        return self._fetch(MailView, "POST", "/mail/confirm", body=msgspec.json.encode({"code": code}), key=_new_key())

    def stop_mail(self) -> Deferred[None]:
        """Get no more mail."""
        return self._send("DELETE", "/mail")

    # Credentials

    def delegation(self) -> Deferred[DelegationView | None]:
        """The delegated proxy that the service holds, and its expiry; None if there is none."""
        return Deferred.fromCoroutine(self._delegation_client().fetch())

    def delegate(self, lifetime: timedelta = timedelta(hours=12)) -> Deferred[DelegationView]:
        """Delegate a proxy to the service, which generates the key; no private key is sent.

        The proxy expires after `lifetime`, or earlier with the caller's own certificate or proxy.

        Raises:
            CredentialError: the client has no certificate and key to sign with, or they have expired.
        """
        return Deferred.fromCoroutine(self._delegation_client().delegate(lifetime))

    def undelegate(self) -> Deferred[None]:
        """Remove the delegated proxy from the service."""
        return Deferred.fromCoroutine(self._delegation_client().remove())

    def credentials(self) -> Deferred[Sequence[CredentialView]]:
        """All credentials of the caller that the service holds, without their secrets."""
        return self._fetch(tuple[CredentialView, ...], "GET", "/credentials")

    def remove_credential(self, credential_id: int) -> Deferred[None]:
        """Remove a credential from the service."""
        return self._send("DELETE", f"/credentials/{credential_id:d}")

    def ssh_key(
        self,
        site: int | str | None = None,
        private_key: str | None = None,
        *,
        account: str | None = None,
        label: str | None = None,
    ) -> Deferred[CredentialView]:
        """Generate an SSH key in the service (install its ``public_key`` at the site), or upload one.

        Args:
            site: None for all sites.
            private_key: text of a private key without passphrase; None to generate one.
            account: user name at the site.
            label: a word by which to find it.
        """
        body = {"kind": "ssh-key", "site": site, "secret": private_key, "account": account, "label": label}
        return self._add_credential(body)

    def token(self, token: str, site: int | str | None = None, *, label: str | None = None) -> Deferred[CredentialView]:
        """Store a bearer token in the service, for one site or for all."""
        return self._add_credential({"kind": "token", "site": site, "secret": token, "label": label})

    def s3_key(
        self,
        access_key: str,
        secret_key: str,
        site: int | str | None = None,
        *,
        session_token: str | None = None,
        valid_until: datetime | None = None,
        label: str | None = None,
    ) -> Deferred[CredentialView]:
        """Store an access key of S3 with its secret key in the service, for one site or for all.

        Temporary ones have a session token, and an end.
        """
        body = {"kind": "s3-key", "site": site, "access_key": access_key, "secret": secret_key, "label": label}
        return self._add_credential({**body, "session_token": session_token, "valid_until": valid_until})

    def session(self, site: int | str) -> Deferred[CredentialView | None]:
        """The proxy of the caller's logon at a site; None if there is none."""
        return self._at_site(CredentialView | None, "GET", site, "/session")  # type: ignore[arg-type]  # a union

    def log_on(
        self, site: int | str, username: str, password: str, lifetime: timedelta | None = None
    ) -> Deferred[CredentialView]:
        """Log on at the MyProxy server of a site: the service fetches a proxy for that site, by default for 12 h."""
        seconds = None if lifetime is None else int(lifetime.total_seconds())
        body = {"username": username, "password": password, "lifetime": seconds}
        given = {name: value for name, value in body.items() if value is not None}
        return self._at_site(CredentialView, "POST", site, "/session", body=msgspec.json.encode(given), key=_new_key())

    def log_off(self, site: int | str) -> Deferred[None]:
        """Remove the proxy of a logon from the service."""
        return self._remove_at_site(site, "/session")

    def logins(self) -> Deferred[Sequence[LoginView]]:
        """The caller's logins at the token issuers of sites."""
        return self._fetch(tuple[LoginView, ...], "GET", "/logins")

    def login_state(self, site: int | str) -> Deferred[LoginView | None]:
        """How far a login at the token issuer of a site is, or None; the issuer is not asked."""
        return self._at_site(LoginView | None, "GET", site, "/login")  # type: ignore[arg-type]  # a union

    def begin_login(self, site: int | str) -> Deferred[LoginView]:
        """Begin a login at the token issuer of a site; the caller approves it at its ``verification_uri``."""
        return self._at_site(LoginView, "POST", site, "/login", key=_new_key())

    def continue_login(self, site: int | str) -> Deferred[LoginView]:
        """Let the service ask the issuer whether a login is approved; its state is ``waiting`` until then."""
        return self._at_site(LoginView, "PUT", site, "/login")

    def put_refresh_token(self, site: int | str, refresh_token: str) -> Deferred[LoginView]:
        """Log in at the token issuer of a site by a refresh token of the site's client."""
        body = msgspec.json.encode({"refresh_token": refresh_token})
        return self._at_site(LoginView, "PUT", site, "/login/refresh-token", body=body)

    def log_out(self, site: int | str) -> Deferred[None]:
        """Remove the tokens of a login from the service, and revoke the refresh token."""
        return self._remove_at_site(site, "/login")

    def pause(self, seconds: float) -> Deferred[None]:
        """Wait, between two queries."""
        return Deferred.fromCoroutine(self._connection.pause(seconds))

    # Internals

    def _submit(
        self, path: str, body: Mapping[str, Any], options: Mapping[str, Any], more: SubmitOptions
    ) -> Deferred[JobView]:
        if unknown := sorted(more.keys() - SubmitOptions.__annotations__.keys()):
            raise TypeError(f"unknown options of a submission: {', '.join(unknown)}")
        given = {name: value for name, value in options.items() if value is not None}
        extra = {**more.get("options", {}), **given}
        if "deadline" in more:
            extra["deadline"] = _deadline_text(more["deadline"])
        if "notify" in more:
            extra["notify"] = list(more["notify"])
        full = dict(body)
        if extra:
            full["extra_opts"] = extra
        if "protocol" in more:
            full["protocol"] = JobProtocol.parse(more["protocol"]).name
        for name in ("priority", "max_tries", "label", "max_active"):
            if name in more:
                full[name] = more[name]
        if more.get("after"):
            full["after"] = list(more["after"])
            full["after_any"] = more.get("after_any", False)
        key = more.get("idempotency_key") or _new_key()

        async def submitted() -> JobView:
            if any(isinstance(full.get(name), str) for name in _SITE_KEYS):
                await self._resolve_sites(full)
            job = await self._register(path, full, key)
            return await self.wait(job.id, check=True) if more.get("wait") else job

        return Deferred.fromCoroutine(submitted())

    async def _register(self, path: str, body: Mapping[str, Any], key: str) -> JobView:
        return await self._request(JobView, "POST", path, body=msgspec.json.encode(body), key=key)

    async def _resolve_sites(self, body: dict[str, Any]) -> None:
        """Replace names of sites by their numbers, and choose the protocol if there is none."""
        known = await self.sites()
        found = {key: find_site(known, str(body[key])) for key in _SITE_KEYS if key in body}
        body.update({key: site.id for key, site in found.items()})
        if "protocol" not in body:
            body["protocol"] = choose_protocol(list(found.values()), body.get("extra_opts", {}).get("mover")).name

    async def _site_number(self, site: int | str) -> int:
        return site if isinstance(site, int) else find_site(await self.sites(), site).id

    def _event_reader(
        self, job_id: int | None, kinds: Sequence[EventKind | str], after: int | None, outage_s: float
    ) -> EventReader:
        return EventReader(
            self._reactor,
            self._connection,
            path=_events_path(job_id),
            query=_kinds_query(kinds),
            after=after,
            outage_s=outage_s,
        )

    async def _followed_end(
        self, job_id: int, timeout_s: float | None, on_progress: Callable[[JobView], object], outage_s: float
    ) -> JobView | None:
        """The ended job, by its events; None if the service gives out none."""
        job = await self.job(job_id)
        on_progress(job)
        if JobStatus.parse(job.status).is_final:
            return job
        # From the begin: what happens between the two requests is not missed.
        events = self._event_reader(job_id, (), 0, outage_s)
        follower = JobFollower(
            self._reactor, fetch_job=lambda: self.job(job_id), events=events, on_progress=on_progress
        )
        return await follower.until_end(job, timeout_s)

    async def _check_end(self, job: JobView) -> JobView:
        """The ended job.

        Raises:
            JobFailedError: it is not DONE.
        """
        if job.status == JobStatus.DONE.name:
            return job
        if job.status == JobStatus.CANCELLED.name:
            why = "" if job.cancel_reason is UNSET else f": {job.cancel_reason.message}"
            raise JobFailedError(f"job {job.id} was cancelled{why}", job=job, code=job.status, hint="")
        failed = await self.elements(job.id, status=JobStatus.FAILED, limit=1)
        failure = failed[0].failure if failed else None
        if failure is None:
            raise JobFailedError(f"job {job.id} failed", job=job, code="UNKNOWN", hint="See its logs.")
        more = f"; {job.num_failed} elements failed" if job.num_failed > 1 else ""
        raise JobFailedError(
            f"job {job.id} failed: {failed[0].src_filepath}: {failure.code} ({failure.scope}): {failure.message}{more}",
            job=job,
            code=failure.code,
            hint=failure.hint,
        )

    def _add_credential(self, body: Mapping[str, Any]) -> Deferred[CredentialView]:
        given = {name: value for name, value in body.items() if value is not None}

        async def added() -> CredentialView:
            if "site" in given:
                given["site"] = await self._site_number(given["site"])
            return await self._request(
                CredentialView, "POST", "/credentials", body=msgspec.json.encode(given), key=_new_key()
            )

        return Deferred.fromCoroutine(added())

    def _at_site(self, type_: type[_T], method: str, site: int | str, suffix: str = "", **more: Any) -> Deferred[_T]:
        async def fetched() -> _T:
            return await self._request(type_, method, f"/sites/{await self._site_number(site):d}{suffix}", **more)

        return Deferred.fromCoroutine(fetched())

    def _remove_at_site(self, site: int | str, suffix: str = "") -> Deferred[None]:
        async def removed() -> None:
            await self._connection.request("DELETE", f"/sites/{await self._site_number(site):d}{suffix}")

        return Deferred.fromCoroutine(removed())

    def _send(self, method: str, path: str) -> Deferred[None]:
        async def send() -> None:
            await self._connection.request(method, path)

        return Deferred.fromCoroutine(send())

    def _delegation_client(self) -> DelegationClient:
        return DelegationClient(
            self._connection, certificate=self._certificate, key=self._key, passphrase=self._passphrase
        )

    def _fetch(self, type_: type[_T], method: str, path: str, query: Query = (), **more: Any) -> Deferred[_T]:
        return Deferred.fromCoroutine(self._request(type_, method, path, query, **more))

    async def _request(self, type_: type[_T], method: str, path: str, query: Query = (), **more: Any) -> _T:
        content = await self._connection.request(method, path, query=query, **more)
        try:
            return msgspec.json.decode(content, type=type_)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UnexpectedAnswerError(
                f"unexpected response to {method} {path} ({error})",
                "Check PDM_URL; if it is right, install the same version of client and service.",
            ) from error

    async def _pages(
        self, page: Callable[..., Deferred[Sequence[_Numbered]]], filters: Filters
    ) -> AsyncIterator[_Numbered]:
        # The filter that selects the next page.
        bound = "before" if filters.get("order") == "newest" else "after"
        selection = dict(filters)
        while True:
            found = await page(limit=_PAGE_SIZE, **selection)
            for each in found:
                yield each
            if len(found) < _PAGE_SIZE:
                return
            selection[bound] = found[-1].id


def _events_path(job_id: int | None) -> str:
    return "/events" if job_id is None else f"/jobs/{job_id:d}/events"


def _kinds_query(kinds: Sequence[EventKind | str]) -> Query:
    return [("kinds", EventKind(kind).value) for kind in kinds]


def _deadline_text(deadline: datetime | timedelta | str) -> str:
    if isinstance(deadline, timedelta):
        return f"{max(round(deadline.total_seconds()), 1)}s"
    return deadline if isinstance(deadline, str) else deadline.isoformat()


def _new_key() -> str:
    return str(uuid.uuid4())
