"""A request of a client of FTS3, the URLs in it taken apart, and its answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple
from urllib.parse import parse_qsl

import msgspec
from attrs import field, frozen

from pdm.workqueue.domain.enums import JobProtocol
from pdm.workqueue.domain.fts import vo_of_fqan, vo_of_subject
from pdm.workqueue.domain.paths import InvalidPathError, checked, decoded, host_and_port
from pdm.workqueue.http.access import Caller
from pdm.workqueue.http.context import ApiContext
from pdm.workqueue.http.problems import ApiError, InvalidInputError

_LONGEST_URL = 1100
#: Characters of a URL in an error.
_SHOWN = 100


class ServerOfUrl(NamedTuple):
    """Where a URL leads; the port is that of its protocol if it names none.

    ``bucket`` is that of an S3 server which has it in the path; empty for all others.
    """

    protocol: JobProtocol
    scheme: str
    host: str
    port: int
    bucket: str = ""

    @property
    def url(self) -> str:
        """``SCHEME://HOST:PORT``, and the bucket."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}" + (f"/{self.bucket}" if self.bucket else "")


# As the garbage collector does not track them, a hundred thousand cost it nothing.
class FileUrl(msgspec.Struct, frozen=True, gc=False):
    """A URL of a file, as it came, and its parts; the path is text."""

    text: str
    server: ServerOfUrl
    path: str


class ServersOfUrls:
    """The servers of URLs; remembers those that it has seen.

    Args:
        buckets_in_paths: whether the URLs of S3 have the bucket in their path; else it is in the name of the host.
    """

    def __init__(self, *, buckets_in_paths: bool) -> None:
        self._buckets_in_paths = buckets_in_paths
        #: By scheme and authority.
        self._known: dict[tuple[str, str], ServerOfUrl] = {}

    def of(self, scheme: str, authority: str, path: str, shown: str) -> ServerOfUrl:
        """The server of the parts of a URL; ``path`` has no slash at its begin, ``shown`` is for an error.

        Raises:
            ValueError: it is none.
        """
        server = self._known.get((scheme, authority))
        if server is None:
            server = self._known[scheme, authority] = _server(scheme, authority, shown)
        if server.protocol is not JobProtocol.S3:
            return server
        if not self._buckets_in_paths:
            return server._replace(scheme="s3sv")
        bucket = path.partition("/")[0]
        if not bucket:
            raise ValueError(f"Missing path ({shown})")
        return server._replace(bucket=bucket)


def read_url(text: str, servers: ServersOfUrls) -> FileUrl:
    """Take a URL apart.

    Raises:
        ValueError: it is none, or of a scheme that the service does not speak.
    """
    text = text.strip()
    shown = text[:_SHOWN]
    if len(text) > _LONGEST_URL:
        raise ValueError(f"a URL is longer than {_LONGEST_URL} characters ({shown})")
    scheme, separator, rest = text.partition("://")
    if not separator or not scheme:
        raise ValueError(f"Missing scheme ({shown})")
    authority, _, encoded_path = rest.partition("/")
    server = servers.of(scheme, authority, encoded_path, shown)
    if "?" in text or "#" in text:
        raise ValueError(f"a query or fragment is not carried on ({shown}); write a ? or # of a name as %3F or %23")
    try:
        path = "/" + decoded(encoded_path).lstrip("/")
        if path == "/":
            raise ValueError(f"Missing path ({shown})")
        if path.startswith("/~/"):
            path = path[1:]
        return FileUrl(text, server, checked(path))
    except InvalidPathError as error:
        raise ValueError(f"{error} ({shown})") from error


def _server(scheme: str, authority: str, shown: str) -> ServerOfUrl:
    scheme = scheme.lower()
    if scheme == "file":
        raise ValueError(f"Can not transfer local files ({shown})")
    protocol = JobProtocol.of_scheme(scheme)
    if protocol is None:
        known = ", ".join(each for member in JobProtocol for each in member.info.schemes if each != "file")
        raise ValueError(f"the scheme {scheme[:20]} is not spoken here ({shown}); known are {known}")
    if "@" in authority:
        raise ValueError(f"a URL without user and password is expected ({shown})")
    host, port = host_and_port(authority)
    if not host:
        raise ValueError(f"Missing host ({shown})")
    if port and not (port.isascii() and port.isdecimal() and len(port) < 6 and 1 <= int(port) <= 65535):
        raise ValueError(f"a port from 1 to 65535 is expected ({shown})")
    return ServerOfUrl(protocol, scheme, host.lower(), int(port) if port else protocol.info.default_port or 0)


#: Parameters of one query.
_MOST_PARAMETERS = 50


class DelegationTimeoutError(ApiError):
    """The client is to delegate, then to repeat the request: FTS3's status 419, which HTTP does not know."""

    status: ClassVar[int] = 419
    word: ClassVar[str] = "delegation-needed"
    title: ClassVar[str] = "Authentication Timeout"


@frozen
class FtsUser:
    """Who calls.

    Attributes:
        fqans: VOMS attributes of the presented proxy; shown, not verified.
        vos: of these; without any, one that stands for the user alone.
    """

    caller: Caller
    fqans: Sequence[str]
    vos: Sequence[str]

    @classmethod
    def of(cls, caller: Caller, fqans: Sequence[str]) -> FtsUser:
        found = dict.fromkeys(vo for vo in map(vo_of_fqan, fqans) if vo)
        return cls(caller, tuple(fqans), tuple(found) or (vo_of_subject(caller.subject),))

    @property
    def vo_name(self) -> str:
        """The VO under which the user submits."""
        return self.vos[0]


@frozen(eq=False)
class FtsCall:
    """A request.

    Attributes:
        values: of the path.
        transport: of the connection.
    """

    api: ApiContext
    user: FtsUser
    values: Mapping[str, str]
    raw_query: bytes
    body: bytes = field(repr=False)
    transport: Any = field(repr=False)

    @property
    def caller(self) -> Caller:
        return self.user.caller

    def query(self) -> dict[str, str]:
        """The parameters of the query; the last value of each.

        Raises:
            InvalidInputError: it cannot be read.
        """
        try:
            return dict(
                parse_qsl(
                    self.raw_query.decode("ascii"),
                    keep_blank_values=True,
                    errors="strict",
                    max_num_fields=_MOST_PARAMETERS,
                )
            )
        except ValueError as error:
            raise InvalidInputError(f"the query cannot be read: {error}") from error


@frozen
class FtsAnswer:
    """An answer.

    Attributes:
        content: sent as JSON; bytes and a `JsonStream` as they are.
    """

    content: Any
    status: int = 200
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(factory=dict)


FtsHandler = Callable[[FtsCall], Awaitable[FtsAnswer]]
