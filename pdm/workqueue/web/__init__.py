"""The pages for people in a browser, made of what the REST API has, on the server."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from pdm.workqueue.http.access import Authenticator
from pdm.workqueue.http.app import PageRoute
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.web import copies, credentials, elements, files, job, jobs, operators, pages, sites
from pdm.workqueue.web.pages import PageEndpoint, routes_of


def _of(module: ModuleType) -> list[PageEndpoint]:
    return [value for value in vars(module).values() if isinstance(value, PageEndpoint)]


_MODULES = (jobs, job, elements, files, copies, sites, credentials, operators, pages)
#: All pages and acts.
PAGES: Sequence[PageEndpoint] = tuple(endpoint for module in _MODULES for endpoint in _of(module))


def page_routes(context: ApiContext, authenticator: Authenticator) -> Sequence[PageRoute]:
    """The routes of all pages."""
    return routes_of(PAGES, context, authenticator)
