"""The URLs at which sites serve paths."""

from __future__ import annotations

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.paths import (
    LONGEST_PATH,
    InvalidPathError,
    bytes_from_text,
    checked,
    encoded,
    is_plain_name,
    resolved,
)
from pdm.workqueue.sites.registry import Site


class NotOfferedError(ValueError):
    """A site does not serve a protocol; the text names those it does."""


def storage_url(site: Site, protocol: JobProtocol, path: str, url: str | None = None) -> str:
    """The URL at which a site serves a path.

    Args:
        path: as the user gave it: absolute, relative to the site's default directory, or beginning with ``~``.
        url: which of the site's URLs for the protocol; the preferred one without it.

    Returns:
        The percent-encoded URL. For FILE and HTTPS the path is below the endpoint. Servers of FILE, HTTPS and XROOT
        know no homes: there ``~`` is their root, and ``//``, ``/./`` and ``/../`` are resolved here.

    Raises:
        NotOfferedError: the site has no endpoint for the protocol.
        InvalidPathError: no site can hold the path, or it leads out of a FILE site's root.
    """
    endpoint = url or site.endpoints.get(protocol)
    if endpoint is None:
        offered = ", ".join(sorted(other.name for other in site.endpoints))
        raise NotOfferedError(f"site {site.name} does not offer {protocol.name}: it offers {offered}")
    place = resolved(checked(path), site.default_folder)
    if place != path:
        # A relative path may be short enough by itself only.
        checked(place)
    if not protocol.info.has_homes:
        inside = _confined(place, "directory" if protocol is JobProtocol.FILE else "server")
    else:
        inside = encoded(place if place.startswith("/") else "/" + place)
    if protocol is JobProtocol.XROOT:
        # root://host//directory: the first slash ends the host, the second begins the path.
        inside = "/" + inside
    return endpoint.removesuffix("/") + inside


class EndpointUrls:
    """The URLs of many paths at one endpoint of a site: the directory of plain names is encoded once.

    Args:
        site, protocol, url: as for `storage_url`.
    """

    def __init__(self, site: Site, protocol: JobProtocol, url: str) -> None:
        self._site = site
        self._protocol = protocol
        self._url = url
        #: By path of a directory: its URL, which ends with a slash, and the bytes that are left for a name in it.
        self._directories: dict[str, tuple[str, int]] = {}

    def of(self, path: str) -> str:
        """The URL of a path.

        Raises:
            InvalidPathError: as of `storage_url`.
        """
        directory, _, name = path.rpartition("/")
        if not path.startswith("/") or not is_plain_name(name):
            return storage_url(self._site, self._protocol, path, self._url)
        known = self._directories.get(directory)
        if known is None:
            url = storage_url(self._site, self._protocol, f"{directory}/x", self._url)[:-1]
            known = self._directories[directory] = url, LONGEST_PATH - len(bytes_from_text(directory)) - 1
        url, left = known
        return url + name if len(name) <= left else storage_url(self._site, self._protocol, path, self._url)


def _confined(place: str, what: str) -> str:
    """The encoded path below a root; ``~`` is the root itself. ``what`` must not be left, as the error says."""
    inside = place[1:] if place == "~" or place.startswith("~/") else place
    names: list[str] = []
    for name in inside.split("/"):
        if name == "..":
            if not names:
                raise InvalidPathError(f"the path leads out of the site's {what} by '..'")
            names.pop()
        elif name not in ("", "."):
            names.append(name)
    return encoded("/" + "/".join(names))
