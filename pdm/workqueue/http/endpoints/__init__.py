"""The table of all endpoints, in the order of the documentation."""

from __future__ import annotations

from types import ModuleType

from pdm.workqueue.http.endpoint import Endpoint
from pdm.workqueue.http.endpoints import (
    activity,
    credentials,
    delegations,
    elements,
    events,
    holds,
    jobs,
    logins,
    nodes,
    notifications,
    receipts,
    schedules,
    service,
    sites,
)

#: Common prefix of all paths.
ROOT = "/workqueue/api/v1.0"


_MODULES = (
    *(jobs, holds, elements, receipts, events, schedules, sites, delegations, credentials, logins),
    *(notifications, activity, nodes, service),
)


def _of(module: ModuleType) -> list[Endpoint]:
    return [value for value in vars(module).values() if isinstance(value, Endpoint)]


ENDPOINTS: tuple[Endpoint, ...] = tuple(endpoint for module in _MODULES for endpoint in _of(module))
