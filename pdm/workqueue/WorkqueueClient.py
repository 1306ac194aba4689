"""The client of the service: one method for each thing the API can do, each returning a Deferred.

For example::

    client = WorkqueueClient.from_environment(reactor)
    job = await client.copy(1, "/data/run7/", 2, "/archive/run7/")
    job = await client.wait(job.id, on_progress=lambda seen: print(seen.status, seen.progress))
    await client.close()

Scripts and notebooks without a reactor use `pdm.workqueue.blocking.BlockingWorkqueueClient`: same methods, values
instead of Deferreds.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack

import msgspec
from twisted.internet.defer import Deferred
from twisted.web.iweb import IPolicyForHTTPS

from pdm.workqueue.certificates.tls_client import ClientCredentialError, WeakCredentialError, client_policy
from pdm.workqueue.client.connection import Connection, JobPoller, Query, encode_query
from pdm.workqueue.client.delegation import DelegationClient
from pdm.workqueue.client.errors import CredentialError, SettingsError, UnexpectedAnswerError
from pdm.workqueue.client.settings import ClientSettings, find_settings
from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.wire.responses import (
    CheckView,
    CredentialView,
    DelegationView,
    ElementStatusView,
    ElementView,
    JobStatusView,
    JobView,
    OutputView,
    RetriedJobView,
    RouteView,
    SiteView,
    SkippedView,
    WhoamiView,
)
from pdm.workqueue.wire.sites import AuditView, UserView

_T = TypeVar("_T")
_Numbered = TypeVar("_Numbered", JobView, ElementView, SkippedView)
#: Jobs or elements asked for at a time when all of them are read.
_PAGE_SIZE = 500


class SubmitOptions(TypedDict, total=False):
    """What every submission may add.

    Attributes:
        protocol: how to move; GRIDFTP without it.
        priority: 0 (first) to 9.
        max_tries: 1 to 10 attempts for each element.
        label: a word to find the job by.
        options: further members of ``extra_opts``.
        idempotency_key: names this submission; the same key twice makes one job. A new one is made without it.
    """

    protocol: JobProtocol | str
    priority: int
    max_tries: int
    label: str
    options: Mapping[str, Any]
    idempotency_key: str


class Filters(TypedDict, total=False):
    """Which jobs or elements; None is the same as leaving it away.

    Attributes:
        status: only those that stand so.
        type: only those of this type.
        site: only those from or to this site, by number or name.
        label: only those of jobs with this label.
        since: only those registered at or after this moment, which has a time zone.
        after: only those with a greater number.
    """

    status: JobStatus | str | None
    type: JobType | str | None
    site: int | str | None
    label: str | None
    since: datetime | None
    after: int | None


class JobFilters(Filters, total=False):
    """Which jobs, and in which order; None is the same as leaving it away.

    Attributes:
        user: for operators: only those of this user, by number, or ``all``; the caller's own without it.
        order: ``oldest`` or ``newest`` first; with a limit, ``newest`` leaves the newest.
        before: only those with a smaller number.
    """

    user: int | str | None
    order: Literal["oldest", "newest"] | None
    before: int | None


class SiteOptions(TypedDict, total=False):
    """What may be said about a site besides its name and endpoints.

    Attributes:
        description: one line.
        default_folder: where relative paths begin; ``~`` without it.
        public: whether everybody sees and uses it; without it, its owner only.
        limit_in: streams of work that go into it at once, at most; None for what the service has for all.
        limit_out: the same for what comes out of it.
        authorities: PEM of authorities that are trusted for this site only.
        myproxy: ``HOST:PORT`` of the MyProxy server at which its users log on; None for none.
        mover: ``native`` (without it), or ``tools``: globus-url-copy and gfal carry out its jobs.
    """

    description: str
    default_folder: str
    public: bool
    limit_in: int | None
    limit_out: int | None
    authorities: str
    myproxy: str | None
    mover: Literal["native", "tools"]


class SiteChangeOptions(SiteOptions, total=False):
    """What may be changed about a site: all that `SiteOptions` has, and these.

    Attributes:
        name: another name.
        endpoints: instead of all there were.
    """

    name: str
    endpoints: Mapping[str, str | Sequence[str]]


class WorkqueueClient:
    """Calls one service as one user, over one pool of kept connections.

    All methods return Deferreds, which fail with a `pdm.workqueue.client.errors.WorkqueueClientError`; its class and
    text say what happened and what to do. Cancelling a Deferred ends its request, not the job.

    Args:
        reactor: Twisted's.
        base_url: ``https://HOST:PORT`` of the service.
        policy: presents the caller's certificate and judges the service's; see
            `pdm.workqueue.certificates.tls_client.client_policy`.
        certificate: PEM file that `delegate` signs with, None for a client that never delegates.
        key: PEM file of its key, None where it is in the same file.
        passphrase: of an encrypted key.
        timeout_s: how many seconds the service may be silent.
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
    ) -> None:
        self._reactor = reactor
        self._certificate = certificate
        self._key = key
        self._passphrase = passphrase
        self._connection = Connection(reactor, base_url, policy, timeout_s)

    @classmethod
    def from_settings(cls, reactor: Any, settings: ClientSettings, timeout_s: float = 60.0) -> Self:
        """A client for settings that are known.

        Raises:
            SettingsError, CredentialError: a file is missing, expired or does not fit; in words.
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
        )

    @classmethod
    def from_environment(cls, reactor: Any, url: str | None = None) -> Self:
        """A client for what the environment or the user's file names; see `find_settings`."""
        return cls.from_settings(reactor, find_settings(os.environ, Path.home(), os.getuid(), url))

    def close(self) -> Deferred[None]:
        """Close the kept connections; the client can be used again all the same."""
        return Deferred.fromCoroutine(self._connection.close())

    # Submissions

    def list(
        self, site: int, path: str, *, depth: int | None = None, **more: Unpack[SubmitOptions]
    ) -> Deferred[JobView]:
        """Submit a listing; `depth` 0 is the thing itself, 1 what is in it, None all levels."""
        return self._submit("/list", {"src_siteid": site, "src_filepath": path}, {"depth": depth}, more)

    def copy(
        self,
        src_site: int,
        src_path: str,
        dst_site: int,
        dst_path: str,
        *,
        overwrite: Literal["never", "always", "different"] | None = None,
        verify: Literal["checksum", "size"] | None = None,
        **more: Unpack[SubmitOptions],
    ) -> Deferred[JobView]:
        """Submit a copy of a file, or of a tree: its content goes to `dst_path`."""
        body = {
            "src_siteid": src_site,
            "src_filepath": src_path,
            "dst_siteid": dst_site,
            "dst_filepath": dst_path,
        }
        return self._submit("/copy", body, {"overwrite": overwrite, "verify": verify}, more)

    def remove(
        self, site: int, path: str, *, recursive: bool | None = None, **more: Unpack[SubmitOptions]
    ) -> Deferred[JobView]:
        """Submit a removal; `recursive=False` spares a directory that is not empty."""
        return self._submit("/remove", {"src_siteid": site, "src_filepath": path}, {"recursive": recursive}, more)

    def rename(
        self,
        site: int,
        path: str,
        new_path: str,
        *,
        overwrite: Literal["never", "always"] | None = None,
        **more: Unpack[SubmitOptions],
    ) -> Deferred[JobView]:
        """Submit a new name at the same site."""
        body = {"src_siteid": site, "src_filepath": path, "dst_filepath": new_path}
        return self._submit("/rename", body, {"overwrite": overwrite}, more)

    def mkdir(
        self, site: int, path: str, *, parents: bool | None = None, **more: Unpack[SubmitOptions]
    ) -> Deferred[JobView]:
        """Submit a new directory; `parents` makes those above too and does not mind one that is there."""
        return self._submit("/mkdir", {"src_siteid": site, "src_filepath": path}, {"parents": parents}, more)

    def submit(self, type_: JobType | str, body: Mapping[str, Any], **more: Unpack[SubmitOptions]) -> Deferred[JobView]:
        """Submit a job of any type, in the words of the API (``POST /jobs``)."""
        return self._submit("/jobs", {**body, "type": JobType.parse(type_).value}, {}, more)

    # Questions

    def jobs(self, *, limit: int | None = None, **filters: Unpack[JobFilters]) -> Deferred[Sequence[JobView]]:
        """The caller's jobs that fit the filters, newest last unless asked otherwise; at most `limit`."""
        return self._fetch(tuple[JobView, ...], "GET", "/jobs", encode_query(limit=limit, **filters))

    def iterate_jobs(self, /, **filters: Unpack[JobFilters]) -> AsyncIterator[JobView]:
        """All the caller's jobs that fit the filters, newest last unless asked otherwise, read page by page."""
        return self._pages(self.jobs, filters)

    def job(self, job_id: int) -> Deferred[JobView]:
        """One job."""
        return self._fetch(JobView, "GET", f"/jobs/{job_id:d}")

    def elements(
        self, job_id: int, *, limit: int | None = None, **filters: Unpack[Filters]
    ) -> Deferred[Sequence[ElementView]]:
        """The elements of a job that fit the filters, by number; at most `limit`."""
        return self._fetch(
            tuple[ElementView, ...], "GET", f"/jobs/{job_id:d}/elements", encode_query(limit=limit, **filters)
        )

    def iterate_elements(self, job_id: int, /, **filters: Unpack[Filters]) -> AsyncIterator[ElementView]:
        """All elements of a job that fit the filters, by number, read page by page."""
        return self._pages(partial(self.elements, job_id), filters)

    def element(self, job_id: int, element_id: int) -> Deferred[ElementView]:
        """One element."""
        return self._fetch(ElementView, "GET", f"/jobs/{job_id:d}/elements/{element_id:d}")

    def status(self, job_id: int) -> Deferred[JobStatusView]:
        """Where a job stands, and how far it is."""
        return self._fetch(JobStatusView, "GET", f"/jobs/{job_id:d}/status")

    def element_status(self, job_id: int, element_id: int) -> Deferred[ElementStatusView]:
        """Where an element stands, and how fast it moves."""
        return self._fetch(ElementStatusView, "GET", f"/jobs/{job_id:d}/elements/{element_id:d}/status")

    def skipped(
        self, job_id: int, *, limit: int | None = None, after: int | None = None
    ) -> Deferred[Sequence[SkippedView]]:
        """What a job leaves out of its source, each entry with its reason; at most `limit`."""
        path = f"/jobs/{job_id:d}/skipped"
        return self._fetch(tuple[SkippedView, ...], "GET", path, encode_query(limit=limit, after=after))

    def iterate_skipped(self, job_id: int) -> AsyncIterator[SkippedView]:
        """All that a job leaves out of its source, read page by page."""
        return self._pages(partial(self.skipped, job_id), {})

    def output(self, job_id: int) -> Deferred[Sequence[OutputView]]:
        """The latest log (and listing) of each element that has one."""
        return self._fetch(tuple[OutputView, ...], "GET", f"/jobs/{job_id:d}/output")

    def element_output(self, job_id: int, element_id: int, attempt: int | None = None) -> Deferred[OutputView]:
        """The log (and listing) of an element: the latest, or of an attempt (counted from the end if negative)."""
        which = "" if attempt is None else f"/{attempt:d}"
        return self._fetch(OutputView, "GET", f"/jobs/{job_id:d}/elements/{element_id:d}/output{which}")

    def live_output(
        self, job_id: int, element_id: int, attempt: int | None = None, offset: int = 0
    ) -> Deferred[OutputView]:
        """A piece of the log of an attempt, of one that still runs too.

        Args:
            job_id: whose.
            element_id: whose, in the job.
            attempt: which; the latest without it, and from there negative ones count.
            offset: where the piece begins: 0, then the ``offset`` of the piece before.

        Returns:
            Fires with the piece: ``status`` is RUNNING as long as the attempt runs, ``end`` true when nothing follows.
        """
        which = "" if attempt is None else f"/{attempt:d}"
        path = f"/jobs/{job_id:d}/elements/{element_id:d}/output{which}"
        return self._fetch(OutputView, "GET", path, encode_query(live=1, offset=offset))

    def whoami(self) -> Deferred[WhoamiView]:
        """As whom the service sees the caller."""
        return self._fetch(WhoamiView, "GET", "/whoami")

    def sites(self) -> Deferred[Sequence[SiteView]]:
        """The sites and what they offer."""
        return self._fetch(tuple[SiteView, ...], "GET", "/sites")

    def routes(self) -> Deferred[Sequence[RouteView]]:
        """How much the service runs between which sites, and why no more."""
        return self._fetch(tuple[RouteView, ...], "GET", "/routes")

    def site(self, site_id: int) -> Deferred[SiteView]:
        """One site, with the health of its endpoints."""
        return self._fetch(SiteView, "GET", f"/sites/{site_id:d}")

    def users(self, *, limit: int | None = None, after: int | None = None) -> Deferred[Sequence[UserView]]:
        """The users, by number; for operators."""
        return self._fetch(tuple[UserView, ...], "GET", "/users", encode_query(limit=limit, after=after))

    def audit(self, *, limit: int | None = None, after: int | None = None) -> Deferred[Sequence[AuditView]]:
        """Who did what to sites and users, the oldest first; for operators."""
        return self._fetch(tuple[AuditView, ...], "GET", "/audit", encode_query(limit=limit, after=after))

    # Sites

    def add_site(
        self, name: str, endpoints: Mapping[str, str | Sequence[str]], **more: Unpack[SiteOptions]
    ) -> Deferred[SiteView]:
        """Make a site of one's own; `endpoints` maps protocols to a URL, or to several of one storage."""
        body = msgspec.json.encode({"name": name, "endpoints": endpoints, **more})
        return self._fetch(SiteView, "POST", "/sites", body=body, key=_new_key())

    def change_site(self, site_id: int, **changes: Unpack[SiteChangeOptions]) -> Deferred[SiteView]:
        """Change what is said about a site; what is left away stays."""
        return self._fetch(SiteView, "PATCH", f"/sites/{site_id:d}", body=msgspec.json.encode(changes))

    def remove_site(self, site_id: int) -> Deferred[None]:
        """Remove a site that no unfinished job needs."""
        return Deferred.fromCoroutine(self._remove_site(site_id))

    async def _remove_site(self, site_id: int) -> None:
        await self._connection.request("DELETE", f"/sites/{site_id:d}")

    def check_site(self, site_id: int) -> Deferred[Sequence[CheckView]]:
        """Have the service connect to each endpoint of a site with the caller's credential, and say what works."""
        return self._fetch(tuple[CheckView, ...], "POST", f"/sites/{site_id:d}/check", key=_new_key())

    def drain_site(self, site_id: int, message: str) -> Deferred[SiteView]:
        """Let nothing new start at a site; users see the message. For operators."""
        body = msgspec.json.encode({"message": message})
        return self._fetch(SiteView, "POST", f"/sites/{site_id:d}/drain", body=body, key=_new_key())

    def resume_site(self, site_id: int) -> Deferred[SiteView]:
        """End the drain of a site. For operators."""
        return self._fetch(SiteView, "POST", f"/sites/{site_id:d}/resume", key=_new_key())

    def ban(self, user_id: int, message: str) -> Deferred[UserView]:
        """Let a user submit and start nothing more; the user sees the message. For operators."""
        body = msgspec.json.encode({"message": message})
        return self._fetch(UserView, "POST", f"/users/{user_id:d}/ban", body=body, key=_new_key())

    def unban(self, user_id: int) -> Deferred[UserView]:
        """End the ban of a user. For operators."""
        return self._fetch(UserView, "POST", f"/users/{user_id:d}/unban", key=_new_key())

    # Actions

    def wait(
        self,
        job_id: int,
        timeout: float | None = None,
        on_progress: Callable[[JobView], object] | None = None,
        *,
        patience_s: float = 120.0,
    ) -> Deferred[JobView]:
        """Wait until a job has ended, however it ended.

        Args:
            job_id: of the job.
            timeout: seconds; without it, for ever.
            on_progress: called with the job each time it was asked for, its end included; ``progress`` of it tells
                how far it is, how fast it goes and how long it will take.
            patience_s: for how many seconds the service may be away meanwhile (a restart).

        Raises:
            JobTimeoutError: the time is up; the job goes on.
        """
        poller = JobPoller(self._reactor, lambda: self.job(job_id), on_progress or (lambda job: None), patience_s)
        return Deferred.fromCoroutine(poller.until_end(job_id, timeout))

    def cancel(self, job_id: int) -> Deferred[JobView]:
        """Cancel a job; one that has ended stays as it is."""
        return self._fetch(JobView, "DELETE", f"/jobs/{job_id:d}")

    def retry(self, job_id: int) -> Deferred[RetriedJobView]:
        """Try what failed or was cancelled once more."""
        return self._fetch(RetriedJobView, "POST", f"/jobs/{job_id:d}/retry", key=_new_key())

    def delegation(self) -> Deferred[DelegationView | None]:
        """What the service holds of the caller, and until when it is valid; None for nothing."""
        return Deferred.fromCoroutine(self._delegation_client().held())

    def delegate(self, lifetime: timedelta = timedelta(hours=12)) -> Deferred[DelegationView]:
        """Let the service act for the caller at the sites: it makes a key, and gets a proxy signed for it.

        No private key travels. The proxy ends after `lifetime`, or earlier with the caller's own certificate or proxy.

        Raises:
            CredentialError: the client has no certificate and key to sign with, or they have expired.
        """
        return Deferred.fromCoroutine(self._delegation_client().give(lifetime))

    def undelegate(self) -> Deferred[None]:
        """Make the service forget what was delegated."""
        return Deferred.fromCoroutine(self._delegation_client().withdraw())

    def credentials(self) -> Deferred[Sequence[CredentialView]]:
        """All that the service holds of the caller; without what is secret."""
        return self._fetch(tuple[CredentialView, ...], "GET", "/credentials")

    def remove_credential(self, credential_id: int) -> Deferred[None]:
        """Make the service forget a credential."""
        return self._send("DELETE", f"/credentials/{credential_id:d}")

    def ssh_key(
        self,
        site: int | None = None,
        private_key: str | None = None,
        *,
        account: str | None = None,
        label: str | None = None,
    ) -> Deferred[CredentialView]:
        """Have the service make an SSH key, whose ``public_key`` is to be installed at the site; or give it one.

        Args:
            site: for which site; None for every one.
            private_key: text of a private key without passphrase; None to have one made.
            account: who to be at the site.
            label: a word of one's own.
        """
        body = {"kind": "ssh-key", "site": site, "secret": private_key, "account": account, "label": label}
        return self._add_credential("/credentials", body)

    def token(self, token: str, site: int | None = None, *, label: str | None = None) -> Deferred[CredentialView]:
        """Give the service a bearer token, for a site or for every one."""
        return self._add_credential("/credentials", {"kind": "token", "site": site, "secret": token, "label": label})

    def session(self, site: int) -> Deferred[CredentialView | None]:
        """The proxy of the caller's logon at a site; None for none."""
        return self._fetch(CredentialView | None, "GET", f"/sites/{site:d}/session")  # type: ignore[arg-type]  # a union

    def log_on(
        self, site: int, username: str, password: str, lifetime: timedelta | None = None
    ) -> Deferred[CredentialView]:
        """Log on at the MyProxy server of a site: the service fetches a proxy for that site.

        Args:
            site: number.
            username: at the MyProxy server.
            password: used once.
            lifetime: of the proxy; 12 hours without it.
        """
        seconds = None if lifetime is None else int(lifetime.total_seconds())
        body = {"username": username, "password": password, "lifetime": seconds}
        return self._add_credential(f"/sites/{site:d}/session", body)

    def log_off(self, site: int) -> Deferred[None]:
        """Make the service forget the proxy of a logon."""
        return self._send("DELETE", f"/sites/{site:d}/session")

    def pause(self, seconds: float) -> Deferred[None]:
        """Let time pass between two questions."""
        return Deferred.fromCoroutine(self._connection.pause(seconds))

    # Machinery

    def _submit(
        self, path: str, body: Mapping[str, Any], options: Mapping[str, Any], more: SubmitOptions
    ) -> Deferred[JobView]:
        if unknown := sorted(more.keys() - SubmitOptions.__annotations__.keys()):
            raise TypeError(f"unknown options of a submission: {', '.join(unknown)}")
        given = {name: value for name, value in options.items() if value is not None}
        extra = {**more.get("options", {}), **given}
        full = dict(body)
        if extra:
            full["extra_opts"] = extra
        if "protocol" in more:
            full["protocol"] = JobProtocol.parse(more["protocol"]).name
        for name in ("priority", "max_tries", "label"):
            if name in more:
                full[name] = more[name]
        key = more.get("idempotency_key") or _new_key()
        return self._fetch(JobView, "POST", path, body=msgspec.json.encode(full), key=key)

    def _add_credential(self, path: str, body: Mapping[str, Any]) -> Deferred[CredentialView]:
        given = {name: value for name, value in body.items() if value is not None}
        return self._fetch(CredentialView, "POST", path, body=msgspec.json.encode(given), key=_new_key())

    def _send(self, method: str, path: str) -> Deferred[None]:
        async def send() -> None:
            await self._connection.request(method, path)

        return Deferred.fromCoroutine(send())

    def _delegation_client(self) -> DelegationClient:
        return DelegationClient(self._connection, self._certificate, self._key, self._passphrase)

    def _fetch(self, type_: type[_T], method: str, path: str, query: Query = (), **more: Any) -> Deferred[_T]:
        return Deferred.fromCoroutine(self._request(type_, method, path, query, **more))

    async def _request(self, type_: type[_T], method: str, path: str, query: Query = (), **more: Any) -> _T:
        content = await self._connection.request(method, path, query=query, **more)
        try:
            return msgspec.json.decode(content, type=type_)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise UnexpectedAnswerError(
                f"the answer to {method} {path} is not what this client knows ({error})",
                "Check PDM_URL; if it is right, bring client and service to the same version.",
            ) from error

    async def _pages(
        self, page: Callable[..., Deferred[Sequence[_Numbered]]], filters: Filters
    ) -> AsyncIterator[_Numbered]:
        # Where the next page begins; of the newest first, where the one before it ended.
        bound = "before" if filters.get("order") == "newest" else "after"
        begins = dict(filters)
        while True:
            found = await page(limit=_PAGE_SIZE, **begins)
            for each in found:
                yield each
            if len(found) < _PAGE_SIZE:
                return
            begins[bound] = found[-1].id


def _new_key() -> str:
    return str(uuid.uuid4())
