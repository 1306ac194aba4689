"""The real service on loopback, over TLS, with SQLite and log files, and clients that call it as several users."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlencode

import msgspec
import pytest
import pytest_twisted
from attrs import field, frozen
from treq.client import HTTPClient
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.web.client import Agent, HTTPConnectionPool
from twisted.web.http_headers import Headers

from pdm.workqueue.agents.pool import AgentKind, AgentPool
from pdm.workqueue.agents.process import AgentProcess, AgentStartError
from pdm.workqueue.assembly import Assembly
from pdm.workqueue.certificates import authority
from pdm.workqueue.certificates.authority import Authority, Credential
from pdm.workqueue.certificates.tls_client import client_policy
from pdm.workqueue.config.access_settings import UserSettings
from pdm.workqueue.config.reader import read_settings
from pdm.workqueue.domain.enums import JobProtocol, JobStatus, JobType
from pdm.workqueue.domain.failures import AttemptFailure, FailureCode, FailureScope
from pdm.workqueue.domain.jobs import ClaimToken, JobRecord, ListedEntry, NewElement, Verdict
from pdm.workqueue.execution.claimer import Claimer
from pdm.workqueue.execution.credentials import PROXY, vault_context
from pdm.workqueue.execution.endpoint_checks import EndpointCheck, SiteCheck
from pdm.workqueue.execution.endpoint_health import SiteEndpoint
from pdm.workqueue.execution.progress_board import ProgressBoard
from pdm.workqueue.execution.streams import RouteState
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.logstore.attempt_log import LogRef
from pdm.workqueue.logstore.store import LogStore
from pdm.workqueue.movers import MOVERS
from pdm.workqueue.services import OrderedServices
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.store import claiming, credentials, jobs, leases, listings, results, users
from pdm.workqueue.store.claim_limits import ClaimLimits
from pdm.workqueue.store.credentials import EncryptedCredential
from pdm.workqueue.store.database import Database

#: Twisted has no type for the reactor as a whole.
reactor: Any = _reactor

ROOT = "/workqueue/api/v1.0"
_SUPPORTED = (JobProtocol.GRIDFTP, JobProtocol.DUMMY, JobProtocol.FILE)

#: Site 1 and 2 offer what can be moved; 3 only directories, 4 something that this service cannot move.
_SITES = """
[NORTH]
id = 1
description = the first
default_folder = /store/user
gridftp = gsiftp://north.example.org:2811
dummy = dummy://north
file = file:///srv/north

[SOUTH]
id = 2
gridftp = gsiftp://south.example.org:2811
dummy = dummy://south
file = file:///srv/south

[DIRECTORIES]
id = 3
file = file:///srv/north/directories

[SHELL]
id = 4
ssh = sftp://shell.example.org:22
myproxy = myproxy.example.org:7512
"""

_CONFIGURATION = """
[server]
port = 0
[tls]
certificate = host.crt
key = host.key
trust = trust
[state]
folder = state
[logs]
folder = logs
[database]
url = DATABASE
threads = 2
[credentials]
trust_dir = trust
"""


class Certificates:
    """A test authority and the users of all tests, who have one RSA key: to make many takes longer than the tests."""

    def __init__(self) -> None:
        self._key = authority.new_key()
        self.authority = Authority.create("/DC=org/DC=test/CN=Test CA")
        self.host = self.authority.host(["localhost"], ["127.0.0.1"])
        self.users: dict[str, Credential] = {}

    def of(self, name: str) -> Credential:
        """The certificate of a user, made at first use."""
        if name not in self.users:
            with mock.patch.object(authority, "new_key", return_value=self._key):
                self.users[name] = self.authority.user(name)
        return self.users[name]


@frozen
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, Sequence[str]]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def problem(self) -> str:
        """The stable word of the problem, and what it points at."""
        assert self.header("Content-Type") == "application/problem+json", self.body
        content = self.json
        assert content["status"] == self.status
        assert content["request_id"] == self.header("X-Request-Id")
        assert content["title"]
        assert content["detail"]
        return f"{content['type'].rpartition(':')[2]} {content.get('pointer', '')}".strip()

    def header(self, name: str) -> str:
        (value,) = self.headers[name.lower()]
        return value


class IdleClaimer(Claimer):
    """Claims nothing, so that tests claim by the store; counts how often it is woken."""

    events: Counter[str]

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    def wake(self) -> None:
        self.events.update(["wake"])


class NoAgents(AgentPool):
    """Starts no helper."""

    async def acquire(self, kind: AgentKind, **_: Any) -> AgentProcess:
        raise AgentStartError("this service has no helpers")


class UnreachableSites(SiteCheck):
    """Finds that every endpoint is away."""

    async def check(self, user_id: int, site: Site) -> list[EndpointCheck]:
        return [
            await self.check_endpoint(user_id, site, SiteEndpoint(site.id, protocol, url))
            for protocol in sorted(site.endpoints)
            for url in site.endpoint_urls(protocol)
        ]

    async def check_endpoint(self, user_id: int, site: Site, endpoint: SiteEndpoint) -> EndpointCheck:
        away = AttemptFailure(FailureScope.SOURCE, FailureCode.CONNECTION, "away")
        return EndpointCheck(endpoint, away, 0.5)


@frozen(eq=False)
class Service:
    """One running service.

    Attributes:
        users: settings of who may call.
        events: how often handlers woke the claimer or told of a cancellation.
        routes: what ``GET /routes`` is to tell.
        skip: makes the service's clock fast.
        configuration: further sections of workqueue.conf.
        database_url: a database of several services has one worker for each: the service itself.
    """

    directory: Path
    certificates: Certificates
    users: UserSettings = field(factory=lambda: UserSettings(operators=("/DC=org/DC=test/CN=operator",)))
    events: Counter[str] = field(factory=Counter)
    monotonic: Callable[[], float] = time.monotonic
    skip: list[timedelta] = field(factory=lambda: [timedelta()])
    configuration: str = ""
    database_url: str = "sqlite:///workqueue.sqlite"
    port_wanted: int = 0
    routes: list[RouteState] = field(factory=list)
    _parts: dict[str, Any] = field(factory=dict)
    _clients: dict[str, HTTPClient] = field(factory=dict)
    _pools: list[HTTPConnectionPool] = field(factory=list)

    # -- life

    async def start(self) -> None:
        """Start the daemon's own assembly; it claims nothing, and reaches no site."""
        directory = self.directory
        self.certificates.host.write_certificate(directory / "host.crt")
        self.certificates.host.write_key(directory / "host.key")
        self.certificates.authority.write_trust(directory / "trust")
        (directory / "sites.d").mkdir(exist_ok=True)
        (directory / "sites.d" / "sites.conf").write_text(_SITES)
        (directory / "workqueue.conf").write_text(
            _CONFIGURATION.replace("port = 0", f"port = {self.port_wanted}").replace("DATABASE", self.database_url)
            + self.configuration
        )
        ready: Deferred[None] = Deferred()
        services = OrderedServices(on_ready=lambda: ready.callback(None), on_failed=ready.errback)
        assembly = Assembly(
            reactor=reactor,
            settings=msgspec.structs.replace(read_settings(directory / "workqueue.conf"), users=self.users),
            services=services,
            clock=self.now,
            monotonic=self.monotonic,
            movers={protocol: MOVERS[protocol] for protocol in _SUPPORTED},
            make_pool=NoAgents,
            make_claimer=self._make_claimer,
            make_site_check=UnreachableSites,
            find_missing=lambda command: {},
        )
        assembly.context.routes = lambda: list(self.routes)
        assembly.context.cancelled = lambda job_id: self.events.update([f"cancelled {job_id}"])
        self._parts.update(assembly=assembly, services=services)
        services.startService()
        await ready
        self.events.clear()
        if not self.database.is_shared:
            worker = leases.WorkerIdentity("worker", "worker")
            await self.database.run("register a worker", leases.register_worker, worker, self.now(), 3600.0)

    async def stop(self) -> None:
        for pool in self._pools:
            await pool.closeCachedConnections()
        await self._parts["services"].stopService()

    def _make_claimer(self, **parts: Any) -> IdleClaimer:
        claimer = IdleClaimer(**parts)
        claimer.events = self.events
        return claimer

    @property
    def worker(self) -> str:
        """The incarnation by which tests claim."""
        return self.assembly.lease.worker.incarnation if self.database.is_shared else "worker"

    @property
    def assembly(self) -> Assembly:
        return self._parts["assembly"]

    @property
    def database(self) -> Database:
        return self.assembly.database

    @property
    def logs(self) -> LogStore:
        return self.assembly.logs

    @property
    def context(self) -> ApiContext:
        return self.assembly.context

    @property
    def board(self) -> ProgressBoard:
        return self.assembly.board

    @property
    def port(self) -> int:
        return int(self.assembly.server.api_port.url.rpartition(":")[2])

    def now(self) -> datetime:
        return datetime.now(UTC) + self.skip[0]

    # -- calls

    async def call(
        self,
        user: str | Credential | None,
        method: str,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        root: str = ROOT,
        port: int | None = None,
        **headers: str,
    ) -> Answer:
        """Send a request.

        Args:
            user: a name, a credential, or None for nobody.
            method: of HTTP.
            path: below the root.
            body: sent as JSON.
            raw: sent as it is.
            root: of the API; empty for the pages.
            port: of the API by default.
            headers: with underscores for dashes; an empty one is left out.
        """
        sent = {"Content-Type": "application/json"} if body is not None or raw is not None else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        response = await self._client(user).request(
            method,
            f"https://localhost:{port or self.port}{root}{path}",
            allow_redirects=False,
            data=raw if raw is not None else None if body is None else json.dumps(body).encode(),
            headers=Headers({name: [value] for name, value in sent.items() if value}),
        )
        content = await response.content()
        received = {
            name.decode().lower(): [value.decode() for value in values]
            for name, values in response.headers.getAllRawHeaders()
        }
        return Answer(response.code, received, content)

    async def browse(self, user: str | None, path: str, **headers: Any) -> Answer:
        """Fetch a page."""
        return await self.call(user, "GET", path, root="", **headers)

    async def act(self, user: str | None, path: str, form: Mapping[str, str | Sequence[str]] | None = None) -> Answer:
        """Send a form of a page, and read the answer, which redirects to a view."""
        body = urlencode(form or {}, doseq=True).encode()
        return await self.call(user, "POST", path, raw=body, root="", Content_Type="application/x-www-form-urlencoded")

    def _client(self, user: str | Credential | None) -> HTTPClient:
        credential = self.certificates.of(user) if isinstance(user, str) else user
        name = "" if credential is None else str(credential.serial)
        if name not in self._clients:
            path = None
            if credential is not None:
                path = self.directory / f"client-{name}.pem"
                credential.write_bundle(path)
            pool = HTTPConnectionPool(reactor)
            pool.retryAutomatically = False
            self._pools.append(pool)
            policy = client_policy(self.directory / "trust", path)
            self._clients[name] = HTTPClient(Agent(reactor, policy, connectTimeout=10, pool=pool))
        return self._clients[name]

    async def submit(self, user: str, route: str = "/list", **more: Any) -> dict[str, Any]:
        """Register a job; its object comes back."""
        body = {"src_siteid": 1, "src_filepath": "data", "protocol": "DUMMY"} | more
        if route in ("/copy", "/rename"):
            body = {"dst_filepath": "copy"} | body
        if route == "/copy":
            body = {"dst_siteid": 2} | body
        answer = await self.call(user, "POST", route, body)
        assert answer.status == 200, answer.body
        return answer.json

    # -- what an executor would do, by the real store

    async def user_id(self, name: str) -> int:
        subject = self.certificates.of(name).dn
        record = await self.database.run("register", users.register, subject, "user", self.now())
        return record.id

    async def give_credential(self, name: str, lifetime: timedelta = timedelta(hours=1)) -> None:
        user_id = await self.user_id(name)
        secret = self.context.vault.seal(b"a proxy", vault_context(user_id))
        subject = self.certificates.of(name).dn
        now = self.now()
        new = EncryptedCredential(PROXY, subject, now + lifetime, secret)
        await self.database.run("put", credentials.put, user_id, new, now)

    async def claim(self, job_id: int) -> list[ClaimToken]:
        """Claim all of a job that can run; jobs of other tests are claimed along, and stay so."""
        limits = ClaimLimits(elements=10_000, batches=1000, batch_elements=1000, batch_bytes=2**50)
        batches = await self.database.run("claim", claiming.claim, self.worker, limits, self.now())
        return [batch.token(element) for batch in batches for element in batch.elements if element.job_id == job_id]

    async def settle(
        self,
        token: ClaimToken,
        status: JobStatus = JobStatus.DONE,
        failure: AttemptFailure | None = None,
        log: str | None = "a line",
        **more: Any,
    ) -> None:
        """End an attempt, with its log."""
        if log is not None:
            job = await self.job(token.job_id)
            ref = LogRef(job.log_uid, token.element_id, token.attempt)
            self.logs.open(ref, "the first line")
            self.logs.write(ref, log)
            more["log"] = (await self.logs.close(ref, "the last line")).span
        now = self.now()
        verdict = Verdict(token, status, now - timedelta(seconds=2), now, failure=failure, **more)
        settled = await self.database.run("settle", results.settle, self.worker, [verdict], now)
        assert not settled.lost

    async def job(self, job_id: int) -> JobRecord:
        record = await self.database.read("fetch", jobs.fetch, job_id, None)
        assert record is not None
        return record

    async def list_with(self, token: ClaimToken, *chunks: Sequence[ListedEntry]) -> None:
        """Store what a LIST element found."""
        await self.database.run("begin", listings.begin, token)
        for number, chunk in enumerate(chunks):
            assert await self.database.run("add", listings.add, token, number, chunk)

    async def extend(self, token: ClaimToken, *elements: NewElement) -> None:
        """Add what follows from a listing."""
        assert await self.database.run("extend", results.add_elements, self.worker, token, elements)

    async def copied(self, user: str, *names: str, status: JobStatus = JobStatus.DONE) -> int:
        """A COPY job whose files all ended alike; its number."""
        job = await self.submit(user, "/copy")
        (listing,) = await self.claim(job["id"])
        files = [NewElement(JobType.COPY, f"data/{name}", f"copy/{name}", size=10) for name in names]
        await self.extend(listing, *files)
        await self.settle(listing)
        for token in await self.claim(job["id"]):
            await self.settle(token, status, log=f"log of element {token.element_id}")
        return job["id"]


@pytest.fixture(scope="session")
def certificates() -> Certificates:
    return Certificates()


@pytest.fixture(scope="module")
def service(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for the tests of a module; they keep out of each other's way by the users they act as."""
    yield from running(Service(tmp_path_factory.mktemp("service"), certificates))


@pytest.fixture
def own_service(certificates: Certificates, tmp_path: Path) -> Iterator[Service]:
    """A service for one test alone, which may break it."""
    yield from running(Service(tmp_path, certificates))


def running(service: Service) -> Iterator[Service]:
    """Start a service and stop it afterwards."""
    pytest_twisted.blockon(Deferred.fromCoroutine(service.start()))
    yield service
    pytest_twisted.blockon(Deferred.fromCoroutine(service.stop()))
