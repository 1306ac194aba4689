"""The metrics of the daemon: their names, labels and meanings, and the counters that are kept for them.

`METRICS` is the whole catalogue; the admin port serves it, and the documentation lists it. Most values are read from
the parts of the service when they are scraped. What must be counted while it happens is kept in a `HistogramTally` or
a dictionary: an observation costs a fraction of a microsecond. Tallies are written and read on the reactor thread only,
so they need no lock, and their number of series is bounded.

No label has a user's name, a path, or an address. Sites that users have registered share one label value.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from attrs import frozen

#: Label value of sites that users have registered, and of those that are in no file any more.
USER_SITES = "user-defined"
#: Label value of what exceeds the bound on series.
OTHER = "other"
#: Label value of credentials for all sites.
EVERY_SITE = "all"


class MetricKind(enum.StrEnum):
    """Types of the Prometheus format."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@frozen(eq=False)
class Metric:
    """One metric.

    Attributes:
        name: as in the answer to a scrape; that of a counter ends with ``_total``.
        meaning: one sentence.
        buckets: upper bounds of a histogram, ascending, without infinity.
        shared: whether it describes the whole service, so that all nodes report the same: take the maximum over nodes,
            not the sum.
    """

    name: str
    kind: MetricKind
    labels: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = ()
    shared: bool = False


METRICS: list[Metric] = []


def _metric(
    name: str, kind: MetricKind, labels: str, meaning: str, buckets: Sequence[float] = (), *, shared: bool = False
) -> Metric:
    metric = Metric(name, kind, tuple(labels.split()), meaning, tuple(buckets), shared)
    METRICS.append(metric)
    return metric


_COUNTER, _GAUGE, _HISTOGRAM = MetricKind.COUNTER, MetricKind.GAUGE, MetricKind.HISTOGRAM
_LONG = (0.1, 1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 86400.0)

BUILD = _metric("pdm_build_info", _GAUGE, "version python", "Always 1; the labels are the versions of this daemon.")
CLAIMING = _metric(
    "pdm_claiming", _GAUGE, "", "1 while this node may start work; 0 while a part that is required is faulty."
)
FAULT = _metric("pdm_service_fault", _GAUGE, "part", "1 while a part of this node is faulty, else 0; as GET /health.")

JOBS = _metric(
    "pdm_jobs",
    _GAUGE,
    "type state",
    "Unfinished jobs by type and status; jobs that wait for other jobs are left out.",
    shared=True,
)
ELEMENTS = _metric(
    "pdm_elements",
    _GAUGE,
    "type state",
    "Elements of unfinished jobs by the type of the job: waiting (also for a retry), running, held.",
    shared=True,
)
QUEUE_OLDEST = _metric(
    "pdm_queue_oldest_seconds",
    _GAUGE,
    "class",
    "Age of the oldest job that could begin and has not begun: class listing, or work (all else); 0 if there is none.",
    shared=True,
)
QUEUE_WAIT = _metric(
    "pdm_queue_wait_seconds",
    _HISTOGRAM,
    "class",
    "Time from the submission of a job to its first attempt on this node; jobs that wait for other jobs are left out.",
    _LONG,
)

ATTEMPTS = _metric(
    "pdm_attempts_total",
    _COUNTER,
    "type result scope code src_site dst_site",
    "Attempts of this node whose results are in the database. Type: of the element, list for the listing of any job."
    " Result: done, failed, cancelled, or returned (to the"
    " queue, because the daemon stopped); scope and code are those of the failure.",
)
FINISHED = _metric(
    "pdm_elements_finished_total",
    _COUNTER,
    "type result code",
    "Elements that an attempt of this node has brought to an end: done, failed or cancelled. Elements that are"
    " cancelled before an attempt are not counted.",
)
BYTES = _metric(
    "pdm_transfer_bytes_total",
    _COUNTER,
    "src_site dst_site",
    "Bytes that attempts of this node have transferred and proven at the destination.",
)
TRANSFER_DURATION = _metric(
    "pdm_transfer_duration_seconds",
    _HISTOGRAM,
    "",
    "Duration of the successful attempts of this node that copied a file.",
    (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0),
)
UNSETTLED = _metric("pdm_results_unsettled", _GAUGE, "", "Results of attempts that are not in the database yet.")

SITE_ACTIVE = _metric(
    "pdm_site_active", _GAUGE, "site direction", "Streams of this node into a site (in) or out of it (out)."
)
SITE_LIMIT = _metric(
    "pdm_site_limit", _GAUGE, "site direction", "Streams that there may be into a site or out of it, at most."
)
SITE_HELD = _metric(
    "pdm_site_held",
    _GAUGE,
    "site reason",
    "Endpoints of a site that this node has paused because they cannot be reached (reason unreachable); sites that an"
    " operator has drained (reason drained).",
)
ROUTE_ACTIVE = _metric("pdm_route_active", _GAUGE, "src_site dst_site", "Streams of this node on a route.")
ROUTE_LIMIT = _metric("pdm_route_limit", _GAUGE, "src_site dst_site", "Adaptive limit of the streams on a route.")

WORKER_UP = _metric(
    "pdm_worker_up",
    _GAUGE,
    "worker",
    "1 for a daemon that holds a lease; 0 for one whose lease has ended and that was not stopped.",
    shared=True,
)
WORKER_SLOTS = _metric(
    "pdm_worker_slots",
    _GAUGE,
    "worker state",
    "Helper processes of this node: busy, idle, and the limit of busy ones.",
)
LEASE_EXPIRED = _metric(
    "pdm_lease_expired_total",
    _COUNTER,
    "",
    "Leases that this node has lost because they were not renewed in time; what it ran was given up.",
)
LEASE_LEFT = _metric("pdm_lease_left_seconds", _GAUGE, "", "Time until the lease of this node ends, unless renewed.")

CREDENTIAL_EXPIRY = _metric(
    "pdm_credential_expiry_seconds",
    _GAUGE,
    "site",
    "Time until the first credential expires, of the users with unfinished jobs; negative if it has. Site all: of"
    " credentials for every site.",
    shared=True,
)
CERTIFICATE_EXPIRY = _metric(
    "pdm_certificate_expiry_seconds", _GAUGE, "", "Time until the host certificate expires, or one of its chain."
)

HTTP_DURATION = _metric(
    "pdm_http_request_duration_seconds",
    _HISTOGRAM,
    "route method status",
    "Duration of requests to the REST API and the pages; event streams and requests that wait last as long as they are"
    " open. Status 0: the client disconnected.",
    (0.005, 0.025, 0.1, 0.5, 2.5, 10.0),
)
HTTP_CONNECTIONS = _metric("pdm_http_connections", _GAUGE, "", "Connections to the REST API and the pages.")

DB_SECONDS = _metric(
    "pdm_db_query_seconds",
    _HISTOGRAM,
    "op",
    "Time from the request for a transaction to its commit, or its failure; it includes waiting for a thread.",
    (0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10.0),
)
DB_UP = _metric(
    "pdm_database_up", _GAUGE, "", "1 if the latest read of the queue for these metrics succeeded in time, else 0."
)
DB_AGE = _metric(
    "pdm_database_read_age_seconds",
    _GAUGE,
    "",
    "Age of the values that are read from the database; without a successful read for a minute they are left out.",
)

REACTOR_LAG = _metric(
    "pdm_reactor_lag_seconds",
    _HISTOGRAM,
    "",
    "How much later than scheduled the reactor has run a call, measured about 50 times a second.",
    (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 1.0, 5.0),
)
LOG_ERRORS = _metric("pdm_log_write_errors_total", _COUNTER, "", "Writes of the logs of attempts that failed.")
WEBHOOK_FAILURES = _metric(
    "pdm_webhook_failures_total",
    _COUNTER,
    "",
    "Messages to webhooks of users that were not accepted; they are tried again.",
)

FREE_BYTES = _metric(
    "pdm_filesystem_free_bytes",
    _GAUGE,
    "directory",
    "Bytes that this account may still write there.",
)
SIZE_BYTES = _metric("pdm_filesystem_size_bytes", _GAUGE, "directory", "Size of the file system of the directory.")
FREE_INODES = _metric("pdm_filesystem_free_inodes", _GAUGE, "directory", "Files that may still be created there.")
DATABASE_BYTES = _metric(
    "pdm_database_bytes", _GAUGE, "", "Size of the SQLite database with its write-ahead log; absent with PostgreSQL."
)


_K = TypeVar("_K", bound=Hashable)


class Distribution(NamedTuple):
    """Observations of one series: how many fell into each bucket (the last has no upper bound), and their sum."""

    counts: Sequence[int]
    total: float


class HistogramTally(Generic[_K]):
    """Observations by key.

    Args:
        metric: a histogram; its buckets are counted.
        other: key of further series when there are ``most`` of them.
        known: keys of series that are there before their first observation: rates are right from the first on.
    """

    def __init__(self, metric: Metric, other: _K, *, known: Iterable[_K] = (), most: int = 1000) -> None:
        self._bounds = metric.buckets
        self._other = other
        self._most = most
        #: Key → counts of the buckets, then the sum.
        self._series: dict[_K, list[float]] = {}
        for key in known:
            self._new(key)

    def observe(self, key: _K, value: float) -> None:
        series = self._series.get(key)
        if series is None:
            if len(self._series) >= self._most:
                key = self._other
            series = self._new(key)
        series[bisect_left(self._bounds, value)] += 1
        series[-1] += value

    def _new(self, key: _K) -> list[float]:
        return self._series.setdefault(key, [0.0] * (len(self._bounds) + 2))

    def series(self) -> dict[_K, Distribution]:
        """A copy of all series."""
        return {key: Distribution([int(count) for count in one[:-1]], one[-1]) for key, one in self._series.items()}
