"""The URL of a path at a site."""

from __future__ import annotations

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.paths import InvalidPathError, checked, encoded, resolved
from pdm.workqueue.sites.site import Site


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
        The percent-encoded URL. For FILE the path is below the root of the endpoint.

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
    if protocol is JobProtocol.FILE:
        return endpoint.removesuffix("/") + _confined(place)
    if protocol is JobProtocol.XROOT:
        # root://host//folder: the first slash ends the host, the second begins the path.
        return endpoint.removesuffix("/") + "/" + _from_root(place)
    return endpoint.removesuffix("/") + _from_root(place)


def _from_root(place: str) -> str:
    return encoded(place if place.startswith("/") else "/" + place)


def _confined(place: str) -> str:
    """The encoded path below a root; ``~`` is the root itself, for a folder has no accounts."""
    inside = place[1:] if place == "~" or place.startswith("~/") else place
    names: list[str] = []
    for name in inside.split("/"):
        if name == "..":
            if not names:
                raise InvalidPathError("the path leads out of the site's folder by '..'")
            names.pop()
        elif name not in ("", "."):
            names.append(name)
    return encoded("/" + "/".join(names))
