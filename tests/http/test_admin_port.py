"""The admin port: health, readiness and metrics of a real service, over plain HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shutil
import socket
import sqlite3
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import attrs
import pytest
import pytest_twisted
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from twisted.internet import reactor as _reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.logger import LogEvent

from pdm.workqueue import __version__
from pdm.workqueue.agents.process import AgentStartError
from pdm.workqueue.config.settings import AdminSettings
from pdm.workqueue.execution import readiness as readiness_module
from pdm.workqueue.execution.readiness import Stage
from pdm.workqueue.execution.service_health import ServicePart
from pdm.workqueue.http import metrics as metrics_module
from pdm.workqueue.http import ports as admin_port_module
from pdm.workqueue.http.ports import AdminPort
from tests.http.service import Service, certificates, own_service, service

__all__ = ["certificates", "own_service", "service"]

reactor: Any = _reactor


@contextlib.asynccontextmanager
async def admin_port(service: Service) -> AsyncIterator[AdminPort]:
    """The admin port of a service, with nothing kept from before."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    of_daemon = service.assembly.server.admin_port
    made = attrs.evolve(
        of_daemon,
        settings=AdminSettings(port=port),
        metrics=attrs.evolve(of_daemon.metrics),
        readiness=attrs.evolve(of_daemon.readiness, stage=Stage.RUNNING),
    )
    made.start()
    yield made
    await made.stop()


def _ask(url: str, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers


async def ask(
    port: AdminPort, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, bytes, Any]:
    """Status, body and headers of an answer."""
    return await deferToThread(_ask, port.url, method, path, body, headers)


async def scraped(port: AdminPort) -> list[Sample]:
    status, text, _ = await ask(port, "/metrics")
    assert status == 200
    return [sample for family in text_string_to_metric_families(text.decode()) for sample in family.samples]


def value(samples: list[Sample], name: str, **labels: str) -> float:
    (found,) = [sample.value for sample in samples if sample.name == name and sample.labels == labels]
    return found


@pytest_twisted.ensureDeferred
async def test_health_and_version(service: Service) -> None:
    async with admin_port(service) as port:
        status, body, headers = await ask(port, "/healthz")
        assert (status, json.loads(body)["status"]) == (200, "ok")
        assert headers["Content-Type"] == "application/json"
        assert (await ask(port, "/healthz", "HEAD"))[:2] == (200, b"")
        status, body, _ = await ask(port, "/version")
        assert (status, json.loads(body)["version"]) == (200, __version__)


@pytest_twisted.ensureDeferred
async def test_other_requests_are_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_port_module, "_REQUEST_TIMEOUT_S", 0.4)
    async with admin_port(service) as port:
        assert (await ask(port, "/"))[0] == 404
        # Nothing of the API is served without a certificate.
        assert (await ask(port, "/workqueue/api/v1.0/sites"))[0] == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"):
            status, _, headers = await ask(port, "/metrics", method)
            assert (status, headers["Allow"]) == (405, "GET, HEAD")
        assert (await ask(port, "/metrics", "POST", b"x" * 5000))[0] == 413
        assert await deferToThread(_drip, port.url) < 5.0


def _drip(url: str) -> float:
    """Send a byte of a request now and then; returns the seconds until the connection is closed."""
    host, _, number = url.removeprefix("http://").rpartition(":")
    began = time.monotonic()
    with socket.create_connection((host, int(number)), timeout=10) as client:
        client.settimeout(0.05)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 10:
                client.send(b"G")
                with contextlib.suppress(TimeoutError):
                    if not client.recv(1000):
                        break
    return time.monotonic() - began


@pytest_twisted.ensureDeferred
async def test_an_internal_fault_is_logged_and_does_not_show(
    service: Service, lost_errors: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the details")

    monkeypatch.setattr(metrics_module, "_encode", broken)
    async with admin_port(service) as port:
        status, body, _ = await ask(port, "/metrics")
    assert status == 500
    assert b"details" not in body
    (event,) = lost_errors
    assert event["incident"] in body.decode()
    lost_errors.clear()


@pytest_twisted.ensureDeferred
async def test_ready_means_that_a_transaction_a_file_and_a_helper_work(service: Service) -> None:
    async with admin_port(service) as port:
        assert (await ask(port, "/readyz"))[:2] == (200, b'{"status":"ready","reasons":[]}')
        port.readiness.stage = Stage.STOPPING
        assert (await ask(port, "/readyz"))[:2] == (
            503,
            b'{"status":"not ready","reasons":["the daemon is stopping"]}',
        )


@pytest_twisted.ensureDeferred
async def test_each_broken_part_is_a_reason(
    own_service: Service, lost_errors: list[LogEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(kind: object) -> None:
        raise AgentStartError("no such program")

    monkeypatch.setattr(own_service.assembly.pool, "try_start", refuse)
    monkeypatch.setattr(readiness_module, "_FAILURE_KEPT_S", 0.0)
    shutil.rmtree(own_service.directory / "logs")
    with sqlite3.connect(own_service.directory / "workqueue.sqlite") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    connection.close()
    own_service.assembly.lease.ends_at = 0.0
    own_service.assembly.service_health.report(ServicePart.CREDENTIAL_FILES, "disk\nfull")
    async with admin_port(own_service) as port:
        status, body, _ = await ask(port, "/readyz")
    assert status == 503
    reasons = dict(reason.split(": ", 1) for reason in json.loads(body)["reasons"])
    assert reasons.pop("attempt logs").startswith("[Errno 2] No such file or directory")
    assert reasons == {
        "credential files": r"disk\nfull",
        "database": "the schema of the database is 0001, which is older than this version",
        "helpers": "no such program",
        "lease": "the lease of this daemon has ended: nothing is claimed",
    }
    lost_errors.clear()


@pytest_twisted.ensureDeferred
async def test_a_hung_database_delays_no_answer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "_WAIT_S", 0.2)
    monkeypatch.setattr(readiness_module, "_LIMIT_S", 0.2)
    hung: list[Deferred[Any]] = []

    def hanging(call: Any, hung_name: str) -> Any:
        async def hang(name: str, *arguments: Any) -> Any:
            if name != hung_name:
                return await call(name, *arguments)
            hung.append(Deferred())
            return await hung[-1]

        return hang

    async with admin_port(service) as port:
        with monkeypatch.context() as patch:
            patch.setattr(service.database, "read", hanging(service.database.read, "sum up the queue"))
            patch.setattr(service.database, "run", hanging(service.database.run, "is the database written"))
            began = time.monotonic()
            for _ in range(3):
                samples = await scraped(port)
                assert value(samples, "pdm_database_up") == 0
                assert not [sample for sample in samples if sample.name == "pdm_queue_oldest_seconds"]
                status, body, _ = await ask(port, "/readyz")
                assert status == 503
                assert re.search(r'"database: no answer for \d+\.\d s"', body.decode())
                assert (await ask(port, "/healthz"))[0] == 200
            assert time.monotonic() - began < 10
        # One read of the queue, one probe: requests do not pile up.
        assert len(hung) == 2
        for each in hung:
            each.callback(None)


@pytest_twisted.ensureDeferred
async def test_the_queue_as_metrics(own_service: Service) -> None:
    service = own_service
    private = {"name": "zebedee-private", "endpoints": {"DUMMY": "dummy://private"}}
    site = (await service.call("zebedee", "POST", "/sites", private)).json
    copies = [await service.submit("zebedee", "/copy") for _ in range(2)]
    await service.submit("zebedee", "/mkdir", src_siteid=site["id"])
    service.skip[0] += timedelta(seconds=100)
    (listing,) = await service.claim(copies[0]["id"])
    await service.give_credential("zebedee", timedelta(hours=1))
    async with admin_port(service) as port:
        samples = await scraped(port)
    assert value(samples, "pdm_jobs", type="copy", state="running") == 2
    assert value(samples, "pdm_elements", type="copy", state="running") == 2
    assert value(samples, "pdm_elements", type="copy", state="waiting") == 0
    assert value(samples, "pdm_queue_oldest_seconds", **{"class": "listing"}) == 0
    assert value(samples, "pdm_worker_up", worker="worker") == 1
    assert 3500 < value(samples, "pdm_credential_expiry_seconds", site="all") <= 3600
    assert value(samples, "pdm_site_limit", site="NORTH", direction="in") == 1000
    assert value(samples, "pdm_site_held", site="NORTH", reason="drained") == 0
    template = {"route": "/copy", "method": "POST", "status": "200"}
    assert value(samples, "pdm_http_request_duration_seconds_count", **template) == 2
    assert value(samples, "pdm_certificate_expiry_seconds") > 3600
    assert listing.attempt == 1

    text = "".join(f"{sample.labels}" for sample in samples)
    assert "zebedee" not in text
    assert "user-defined" not in text, "a site of a user on which nothing runs"
