"""URLs of the paths that requests name, with errors that point at the key that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.paths import InvalidPathError, checked
from pdm.workqueue.http.problems import InvalidInputError
from pdm.workqueue.sites.registry import Site
from pdm.workqueue.sites.storage_urls import EndpointUrls, NotOfferedError, storage_url

#: Gives the URL of a path; the second argument is the pointer for an `InvalidInputError`.
UrlOf = Callable[[str, str], str]


def url_at(site: Site, protocol: JobProtocol, path: str, pointer: str) -> str:
    """The URL at which a site serves a path; ``pointer`` is that of the path in the request.

    Raises:
        InvalidInputError: the site has no endpoint for the protocol, or no site can hold the path.
    """
    try:
        return storage_url(site, protocol, checked(path))
    except NotOfferedError as error:
        raise InvalidInputError(str(error), "$.protocol") from error
    except InvalidPathError as error:
        raise InvalidInputError(str(error), pointer) from error


def urls_at(site: Site, protocol: JobProtocol) -> UrlOf:
    """Gives the URLs of many paths at a site, as `url_at` that of one."""
    endpoint = site.endpoints.get(protocol)
    if endpoint is None:
        return partial(url_at, site, protocol)
    urls = EndpointUrls(site, protocol, endpoint)

    def url_of(path: str, pointer: str) -> str:
        try:
            return urls.of(path)
        except InvalidPathError as error:
            raise InvalidInputError(str(error), pointer) from error

    return url_of
