"""A site: number, name, endpoint URLs by protocol, and the URL of a path there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from attrs import field, frozen

from pdm.workqueue.domain.enums import TOOL_PROTOCOLS, JobProtocol, MoverKind
from pdm.workqueue.domain.paths import InvalidPathError, checked, encoded, resolved


@frozen
class Site:
    """A storage site.

    Attributes:
        id: the number in the REST API and in the database; stays when the site moves.
        name: what people call it; never a number.
        default_folder: where relative paths begin; absolute, or begins with ``~``.
        mover: who carries out the elements of its jobs, unless a job says so itself.
        myproxy: ``HOST:PORT`` of the MyProxy server at which its users log on; None where it has none.
        endpoints: protocol → URL without path (FILE: with the root directory), percent-encoded, no slash at its end.
        alternatives: protocol → further URLs of the same storage.
        owner_id: user that registered it; None for a site of the files.
        public: whether everybody may use it; else only its owner.
        limit_in: streams of work that go into it at once, at most; None for what the configuration says.
        limit_out: likewise, out of it.
        authorities: PEM of authorities that are trusted for this site only; may be empty.
    """

    id: int
    name: str
    description: str
    default_folder: str
    endpoints: Mapping[JobProtocol, str]
    alternatives: Mapping[JobProtocol, Sequence[str]] = field(factory=dict)
    owner_id: int | None = None
    public: bool = True
    limit_in: int | None = None
    limit_out: int | None = None
    authorities: str = ""
    myproxy: str | None = None
    mover: MoverKind = MoverKind.NATIVE

    def endpoint_urls(self, protocol: JobProtocol) -> Sequence[str]:
        """All URLs of a protocol, the preferred one first; empty where it is not offered."""
        first = self.endpoints.get(protocol)
        return () if first is None else (first, *self.alternatives.get(protocol, ()))

    def is_open_to(self, user_id: int) -> bool:
        """Whether a user may use it."""
        return self.public or self.owner_id == user_id


def moved_by_tools(protocol: JobProtocol, asked: object, sites: Iterable[Site]) -> bool:
    """Whether the elements of a job are carried out by the field's own commands.

    Args:
        protocol: of the job.
        asked: its option ``mover``; None where it has none.
        sites: its own; one that is moved by the tools is enough.
    """
    if protocol not in TOOL_PROTOCOLS:
        return False
    if asked is not None:
        return asked == MoverKind.TOOLS
    return any(site.mover is MoverKind.TOOLS for site in sites)


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
