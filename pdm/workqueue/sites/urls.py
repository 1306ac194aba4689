"""The URL of a path at a site."""

from __future__ import annotations

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.paths import InvalidPathError, checked, encoded, resolved
from pdm.workqueue.sites.site import Site

#: Whose servers have no home folders, or none that a client could ask for.
_WITHOUT_HOMES = frozenset({JobProtocol.FILE, JobProtocol.HTTPS, JobProtocol.XROOT})


class NotOfferedError(ValueError):
    """A site does not serve a protocol; the text names those it does."""


def storage_url(site: Site, protocol: JobProtocol, path: str, door: str | None = None) -> str:
    """The URL at which a site serves a path.

    Args:
        site: where.
        protocol: how it is reached.
        path: as the user gave it: absolute, relative to the site's default folder, or beginning with ``~``.
        door: which of the site's URLs for the protocol; the preferred one without it.

    Returns:
        The percent-encoded URL. For FILE and HTTPS the path is below the endpoint. Servers of FILE, HTTPS and XROOT
        know no homes: there ``~`` is their root, and ``//``, ``/./`` and ``/../`` are resolved here.

    Raises:
        NotOfferedError: the site has no endpoint for the protocol.
        InvalidPathError: no site can hold the path, or it leads out of a FILE site's root.
    """
    endpoint = door or site.endpoints.get(protocol)
    if endpoint is None:
        offered = ", ".join(sorted(other.name for other in site.endpoints))
        raise NotOfferedError(f"site {site.name} does not offer {protocol.name}: it offers {offered}")
    place = resolved(checked(path), site.default_folder)
    if place != path:
        # A relative path may be short enough by itself only.
        checked(place)
    if protocol in _WITHOUT_HOMES:
        inside = _confined(place, "folder" if protocol is JobProtocol.FILE else "server")
    else:
        inside = encoded(place if place.startswith("/") else "/" + place)
    if protocol is JobProtocol.XROOT:
        # root://host//folder: the first slash ends the host, the second begins the path.
        inside = "/" + inside
    return endpoint.removesuffix("/") + inside


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
