"""The REST API: all endpoints, in the order in which they are documented."""

from __future__ import annotations

from types import ModuleType

from pdm.workqueue.http.endpoint import Endpoint
from pdm.workqueue.http.endpoints import credentials, elements, jobs, outputs, service, sites

#: All paths begin with it.
ROOT = "/workqueue/api/v1.0"


def _of(module: ModuleType) -> list[Endpoint]:
    return [value for value in vars(module).values() if isinstance(value, Endpoint)]


ENDPOINTS: tuple[Endpoint, ...] = tuple(
    endpoint for module in (jobs, elements, outputs, sites, credentials, service) for endpoint in _of(module)
)
