"""Collect the metrics of the daemon from its parts when they are scraped, and write them in the Prometheus format.

A scrape waits for the database and for file systems for a limited time; their latest values are kept for a minute.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import Factory, define, field

from pdm.workqueue import __version__
from pdm.workqueue.agents.pool import boot_seconds
from pdm.workqueue.certificates.tls_server import ServerTls
from pdm.workqueue.domain.credentials import ALL_SITES
from pdm.workqueue.domain.enums import JobStatus
from pdm.workqueue.domain.limits import LimitKind
from pdm.workqueue.domain.sites import RestrictionKind
from pdm.workqueue.execution.executor import Executor
from pdm.workqueue.execution.lease import Lease
from pdm.workqueue.execution.service_health import ServicePart
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.request import ApiSite
from pdm.workqueue.store.queue import QueueTotals, queue_totals
from pdm.workqueue.telemetry import metrics
from pdm.workqueue.telemetry.background import SharedCall, run_in_thread
from pdm.workqueue.telemetry.clocks import ReactorLag
from pdm.workqueue.telemetry.metrics import (
    EVERY_SITE,
    OTHER,
    USER_SITES,
    Distribution,
    HistogramTally,
    Metric,
    MetricKind,
)

if TYPE_CHECKING:
    from prometheus_client.core import Metric as MetricFamily

#: The database is read at most so often.
_READ_EVERY_S = 10.0
#: A scrape waits so long for the database and file systems; without it, the values of the last read are used.
_WAIT_S = 2.0
#: A scrape takes so long at most; Prometheus waits for 10 s.
_TEXT_LIMIT_S = 8.0
#: Older values are left out.
_OLDEST_S = 60.0
#: Two scrapes within this time get the same answer.
_KEPT_S = 1.0
#: Parameters in the syntax of Klein.
_CONVERTER = re.compile(r"<\w+:(\w+)>")

#: Metric → labels → value.
Readings = dict[Metric, dict[tuple[str, ...], float | Distribution]]


@define(eq=False, kw_only=True)
class ServiceMetrics:
    """The metrics of one daemon; called on the reactor thread.

    Attributes:
        api_site: the site of the API, once it listens.
    """

    api: ApiContext
    executor: Executor
    lease: Lease
    lag: ReactorLag
    tls: ServerTls
    api_site: Callable[[], ApiSite | None]
    _totals: SharedCall[QueueTotals] = field(
        init=False, default=Factory(lambda self: self._shared(self._read_totals, _READ_EVERY_S), takes_self=True)
    )
    _files: SharedCall[Readings] = field(
        init=False, default=Factory(lambda self: self._shared(self._read_files, _KEPT_S), takes_self=True)
    )
    #: Whether in the format OpenMetrics → text and its media type.
    _texts: dict[bool, SharedCall[tuple[bytes, str]]] = field(
        init=False,
        default=Factory(
            lambda self: {
                openmetrics: self._shared(partial(self._render, openmetrics), _KEPT_S, _TEXT_LIMIT_S)
                for openmetrics in (False, True)
            },
            takes_self=True,
        ),
    )
    #: Site → its label; kept, because counters must not move from one label to another when a site is renamed.
    _labels: dict[int, str] = field(init=False, factory=dict)

    async def text(self, accept: str) -> tuple[bytes, str]:
        """All metrics, and the media type of the text, by the header ``Accept`` of a scrape.

        Raises:
            TimeoutError: they could not be collected in time.
        """
        outcome = await self._texts["application/openmetrics-text" in accept].outcome()
        if outcome.value is None:
            raise outcome.error or TimeoutError
        return outcome.value

    def _shared(self, function: Callable[[], Any], kept_s: float, limit_s: float = _WAIT_S) -> SharedCall[Any]:
        return SharedCall(self.api.reactor, function, kept_s=kept_s, failure_kept_s=_KEPT_S, limit_s=limit_s)

    async def _render(self, openmetrics: bool) -> tuple[bytes, str]:
        totals, files = await self._totals.outcome(), await self._files.outcome()
        readings = self.readings(totals.error is None)
        if files.value is not None:
            readings |= files.value
        return await run_in_thread(_encode, readings, openmetrics)

    # -- from parts that may hang

    async def _read_totals(self) -> QueueTotals:
        now = self.api.clock()
        paused = {site for site, _ in self.executor.context.health.paused(now)}
        drained = self.api.site_directory.restricted(RestrictionKind.SITE)
        banned = self.api.site_directory.restricted(RestrictionKind.USER)
        return await self.api.database.read("sum up the queue", queue_totals, now, {*paused, *drained}, banned)

    async def _read_files(self) -> Readings:
        settings = self.api.settings
        directories = {
            "state": settings.state.folder,
            "logs": settings.logs.folder,
            "credentials": settings.credentials.folder,
        }
        return await run_in_thread(_file_readings, directories, self.api.database.file)

    # -- from parts in memory

    def readings(self, database_answers: bool) -> Readings:
        """All values but those of file systems."""
        found: Readings = {}
        now = self.api.clock()
        _set(found, metrics.BUILD, 1, __version__, platform.python_version())
        _set(found, metrics.CLAIMING, self.executor.context.service_health.may_claim and self.lease.is_held)
        faulty = {fault.part for fault in self.executor.context.service_health.faults}
        for part in ServicePart:
            _set(found, metrics.FAULT, part in faulty, part.value)
        _set(found, metrics.UNSETTLED, self.executor.context.settler.backlog)
        _set(found, metrics.LEASE_EXPIRED, self.lease.expired)
        _set(found, metrics.LEASE_LEFT, max(self.lease.ends_at - boot_seconds(), 0.0))
        _set(found, metrics.LOG_ERRORS, self.executor.context.logs.errors)
        _set(found, metrics.WEBHOOK_FAILURES, self.api.notifications.webhooks.failures)
        _set(found, metrics.CERTIFICATE_EXPIRY, (self.tls.identity.valid_until - now).total_seconds())
        for state, number in self.executor.pool.slots().items():
            _set(found, metrics.WORKER_SLOTS, number, self.lease.worker.name, state)
        self._add_attempts(found)
        self._add_sites(found, now)
        _set_all(found, metrics.REACTOR_LAG, self.lag.latencies, lambda _: ())
        _set_all(found, metrics.DB_SECONDS, self.api.database.durations, lambda name: (name,))
        api_site = self.api_site()
        if api_site is not None:
            _set(found, metrics.HTTP_CONNECTIONS, api_site.connections.count)
            _set_all(found, metrics.HTTP_DURATION, api_site.durations, _request_labels)
        _set(found, metrics.DB_UP, database_answers)
        self._add_totals(found, now)
        return found

    def _add_attempts(self, found: Readings) -> None:
        counts = self.executor.context.settler.counts
        for end, number in counts.ended.items():
            result, kind = _result_of(end.status, end.code), end.work.type.name.lower()
            source, destination = self._label(end.work.source), self._destination(end.work.source, end.work.destination)
            _add(found, metrics.ATTEMPTS, number, kind, result, end.scope, end.code, source, destination)
            if end.status.is_final:
                _add(found, metrics.FINISHED, number, kind, end.status.name.lower(), end.code)
        for (source_id, destination_id), number in counts.bytes.items():
            labels = self._label(source_id), self._destination(source_id, destination_id)
            _add(found, metrics.BYTES, number, *labels)
        _set_all(found, metrics.TRANSFER_DURATION, counts.durations, lambda _: ())
        _set_all(found, metrics.QUEUE_WAIT, counts.waits, lambda name: (name,))

    def _add_sites(self, found: Readings, now: datetime) -> None:
        for site, kind, running, limit in self.executor.streams.of_sites():
            label, direction = self._label(site.id), "in" if kind is LimitKind.INTO else "out"
            _add(found, metrics.SITE_ACTIVE, running, label, direction)
            if label != USER_SITES:
                _add(found, metrics.SITE_LIMIT, limit, label, direction)
        failing = self.executor.context.health.failing(now)
        drained = set(self.api.site_directory.restricted(RestrictionKind.SITE))
        for site_id in {*failing, *drained, *(site.id for site in self.api.sites.all() if site.owner_id is None)}:
            _add(found, metrics.SITE_HELD, failing[site_id], self._label(site_id), "unreachable")
            _add(found, metrics.SITE_HELD, site_id in drained, self._label(site_id), "drained")
        for state in self.executor.streams.routes():
            source, destination = state.route
            labels = self._label(source), self._destination(source, destination)
            _add(found, metrics.ROUTE_ACTIVE, state.running, *labels)
            _add(found, metrics.ROUTE_LIMIT, state.limit, *labels)

    def _add_totals(self, found: Readings, now: datetime) -> None:
        known = self._totals.succeeded
        age_s = _OLDEST_S if known is None else self.api.reactor.seconds() - known.at
        if known is None or known.value is None or age_s >= _OLDEST_S:
            return
        totals: QueueTotals = known.value
        _set(found, metrics.DB_AGE, age_s)
        for (type_, status), number in totals.jobs.items():
            _set(found, metrics.JOBS, number, type_.name.lower(), status.name.lower())
        for (type_, state), number in totals.elements.items():
            _set(found, metrics.ELEMENTS, number, type_.name.lower(), state)
        for name in ("listing", "work"):
            oldest = totals.oldest.get(name)
            age = 0.0 if oldest is None else max((now - oldest).total_seconds(), 0.0)
            _set(found, metrics.QUEUE_OLDEST, age, name)
        for worker, until in totals.leases.items():
            _set(found, metrics.WORKER_UP, until > now, worker)
        for site_id, ends in totals.credentials.items():
            left_s = (ends - now).total_seconds()
            label = EVERY_SITE if site_id == ALL_SITES else self._label(site_id)
            least = found.setdefault(metrics.CREDENTIAL_EXPIRY, {}).get((label,))
            if not isinstance(least, float) or left_s < least:
                _set(found, metrics.CREDENTIAL_EXPIRY, left_s, label)

    # -- labels of sites

    def _label(self, site_id: int | None) -> str:
        if site_id is None:
            return OTHER
        label = self._labels.get(site_id)
        if label is None:
            site = self.api.sites.by_id(site_id)
            label = USER_SITES if site is None or site.owner_id is not None else site.name
            self._labels[site_id] = label
        return label

    def _destination(self, source_id: int | None, site_id: int | None) -> str:
        """The label of a destination; empty for work at one site."""
        return "" if site_id is None and source_id is not None else self._label(site_id)


def _result_of(status: JobStatus, code: str) -> str:
    if status in (JobStatus.DONE, JobStatus.CANCELLED):
        return status.name.lower()
    return "failed" if code else "returned"


def _request_labels(key: tuple[str, str, int]) -> tuple[str, ...]:
    template, method, status = key
    return _CONVERTER.sub(r"{\1}", template), method, str(status)


def _set(found: Readings, metric: Metric, value: float, *labels: str) -> None:
    found.setdefault(metric, {})[labels] = float(value)


def _add(found: Readings, metric: Metric, value: float, *labels: str) -> None:
    """Add to a value: several sites share a label."""
    series = found.setdefault(metric, {})
    before = series.get(labels, 0.0)
    series[labels] = (before if isinstance(before, float) else 0.0) + value


def _set_all(
    found: Readings, metric: Metric, tally: HistogramTally[Any], labels: Callable[[Any], tuple[str, ...]]
) -> None:
    for key, distribution in tally.series().items():
        found.setdefault(metric, {})[labels(key)] = distribution


def _file_readings(directories: Mapping[str, Path], database: Path | None) -> Readings:
    """Values of file systems; blocks."""
    found: Readings = {}
    for name, directory in directories.items():
        try:
            status = os.statvfs(directory)
        except OSError:
            # It is gone: the check of the part that uses it says so.
            continue
        _set(found, metrics.FREE_BYTES, status.f_bavail * status.f_frsize, name)
        _set(found, metrics.SIZE_BYTES, status.f_blocks * status.f_frsize, name)
        if status.f_files:
            # Else the file system has no fixed number of them.
            _set(found, metrics.FREE_INODES, status.f_favail, name)
    if database is not None:
        files = (database, database.with_name(f"{database.name}-wal"))
        _set(found, metrics.DATABASE_BYTES, sum(file.stat().st_size for file in files if file.exists()))
    return found


def _encode(readings: Readings, openmetrics: bool) -> tuple[bytes, str]:
    # Imported by the first scrape: without one, it is never needed.
    from prometheus_client import CollectorRegistry, ProcessCollector
    from prometheus_client.exposition import choose_encoder
    from prometheus_client.registry import Collector

    class Collected(Collector):
        def collect(self) -> Iterable[MetricFamily]:
            return (_family(metric, readings.get(metric, {})) for metric in metrics.METRICS)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collected())
    ProcessCollector(registry=registry)
    encode, media_type = choose_encoder("application/openmetrics-text; version=1.0.0" if openmetrics else "")
    return encode(registry), media_type


def _family(metric: Metric, series: Mapping[tuple[str, ...], float | Distribution]) -> MetricFamily:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    if metric.kind is MetricKind.HISTOGRAM:
        histogram = HistogramMetricFamily(metric.name, metric.meaning, labels=metric.labels)
        for labels, value in series.items():
            if isinstance(value, Distribution):
                histogram.add_metric(labels, _cumulative(metric, value), value.total)
        return histogram
    family = CounterMetricFamily if metric.kind is MetricKind.COUNTER else GaugeMetricFamily
    made = family(metric.name, metric.meaning, labels=metric.labels)
    for labels, value in series.items():
        if isinstance(value, float):
            made.add_metric(labels, value)
    return made


def _cumulative(metric: Metric, distribution: Distribution) -> list[tuple[str, float]]:
    bounds = [*(str(bound) for bound in metric.buckets), "+Inf"]
    total = 0
    found: list[tuple[str, float]] = []
    for bound, count in zip(bounds, distribution.counts, strict=True):
        total += count
        found.append((bound, total))
    return found
